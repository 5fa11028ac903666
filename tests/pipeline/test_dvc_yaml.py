"""dvc.yaml says what the code does: its dependencies are the modules that a stage really imports."""

from pathlib import Path
from typing import Any

import grimp
import pytest
from ruamel.yaml import YAML

from cae.config import Params
from cae.section import Section
from tests.pipeline.test_parameters import keys_of
from tests.tiny import ROOT, shipped_params

STAGES: dict[str, Any] = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("cae", "pipeline", "serving")


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_are_the_imported_modules(stage: str, imports: grimp.ImportGraph) -> None:
    module = f"pipeline.{stage}"
    files = set()
    for name in {module, *imports.find_upstream_modules(module)}:
        path = ROOT / name.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        # An __init__ with nothing but a docstring changes no result.
        if file.name != "__init__.py" or "import" in file.read_text():
            files.add(str(file.relative_to(ROOT)))
    listed = {dependency for dependency in STAGES[stage]["deps"] if dependency.endswith(".py")}
    assert listed == files


@pytest.mark.parametrize("stage", STAGES)
def test_data_dependencies_are_made_by_earlier_stages_or_kept_in_git(stage: str) -> None:
    earlier: set[str] = set()
    for name, entry in STAGES.items():
        if name == stage:
            break
        items = entry.get("matrix", {"name": [""]})["name"]
        plots = [path for plot in entry.get("plots", []) for path in plot]
        for made in (*entry["outs"], *entry["metrics"], *plots):
            earlier |= {made.replace("${item.name}", item) for item in items}
    needed = {dependency for dependency in STAGES[stage]["deps"] if not dependency.endswith(".py")}
    kept_in_git = {"seeds.json", "pipeline/report.html.j2"}
    assert needed <= earlier | kept_in_git


def test_every_parameter_is_tracked_by_a_stage() -> None:
    tracked = set()
    for entry in STAGES.values():
        for item in entry.get("matrix", {"name": [""]})["name"]:
            tracked |= {key.replace("${item.name}", item) for key in entry["params"]}
    untracked = {
        key for key in keys_of(shipped_params()) if not any(key == t or key.startswith(f"{t}.") for t in tracked)
    }
    # How a training is spread over processes and memory changes no result but by rounding, and what is kept of it
    # none: see test_data.py, test_prepare.py and test_parallel.py.
    assert untracked == {
        "runtime.num_workers",
        "runtime.num_processes",
        "runtime.parallel",
        "runtime.accumulate_steps",
        "runtime.activation_checkpointing",
        "runtime.keep_checkpoints",
        "runtime.keep_every_steps",
        "runtime.max_skipped_steps",
        "runtime.tensorboard",
    }


def test_no_stage_keeps_outputs_from_run_to_run() -> None:
    assert "persist" not in Path(ROOT / "dvc.yaml").read_text()
    assert "always_changed" not in Path(ROOT / "dvc.yaml").read_text()


def test_params_yaml_comments_every_section() -> None:
    text = (ROOT / "params.yaml").read_text()
    for name, info in Params.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            line = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
            assert "#" in line, name
