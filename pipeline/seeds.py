"""`cae-pipe seeds`: the pipeline once for every seed, and the figures of all of them in seeds.json."""

import json
import logging
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

from cae.errors import UserError
from pipeline import params_file
from pipeline.workspace import METRIC_STAGES, Workspace

logger = logging.getLogger(__name__)


def run(workspace: Workspace, seeds: list[int]) -> None:
    """Run `dvc repro` for each seed and record its metrics; at the end params.yaml is as it was, and reproduced.

    Raises UserError when a run fails; the seeds that were finished before it are recorded.
    """
    original = workspace.params_file.read_text()
    dvc = shutil.which("dvc")
    if dvc is None:
        raise UserError("dvc is not on the PATH; run through `make`, or activate .venv")
    try:
        for seed in seeds:
            raw = params_file.read(workspace.params_file)
            params_file.change(raw, "seed", seed, str(workspace.params_file))
            params_file.write(workspace.params_file, params_file.text_of(raw))
            started = time.perf_counter()
            logger.info("seed %d", seed)
            _repro(dvc, workspace, seed, "export")
            here = Workspace(workspace.root, workspace.params_file)
            record(here, time.perf_counter() - started)
    finally:
        workspace.params_file.write_text(original)
    _repro(dvc, workspace, workspace.params.seed)


def record(workspace: Workspace, wall_s: float) -> None:
    """Put the figures of the workspace's last run into seeds.json, in place of older ones of the same parameters."""
    run = {
        "params": workspace.params.model_dump(mode="json"),
        "wall_s": round(wall_s, 1),
        "metrics": {stage: values for stage in METRIC_STAGES if (values := workspace.read_metrics(stage))},
    }
    others = [other for other in load(workspace) if other["params"] != run["params"]]
    runs = sorted([*others, run], key=lambda item: item["params"]["seed"])
    workspace.seeds.write_text(json.dumps(runs, indent=1) + "\n")


def load(workspace: Workspace) -> list[dict[str, Any]]:
    """All recorded runs, whatever their parameters."""
    return json.loads(workspace.seeds.read_text()) if workspace.seeds.exists() else []


def comparable(workspace: Workspace) -> list[dict[str, Any]]:
    """The recorded runs whose parameters differ from the current ones in nothing but the seed."""
    current = workspace.params.model_dump(mode="json")
    return [run for run in load(workspace) if {**run["params"], "seed": 0} == {**current, "seed": 0}]


def spread(runs: list[dict[str, Any]], stage: str, key: str) -> tuple[float, float] | None:
    """Mean and standard deviation of a figure over several runs; None where fewer than two have it."""
    values = [run["metrics"][stage][key] for run in runs if key in run["metrics"].get(stage, {})]
    return (statistics.mean(values), statistics.stdev(values)) if len(values) > 1 else None


def _repro(dvc: str, workspace: Workspace, seed: int, *targets: str) -> None:
    done = subprocess.run([dvc, "repro", *targets], cwd=workspace.root, stdout=sys.stderr)  # noqa: S603 (fixed words)
    if done.returncode:
        raise UserError(f"seed {seed}: `dvc repro` failed with code {done.returncode}; its message stands above")
