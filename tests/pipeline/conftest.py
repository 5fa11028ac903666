"""A workspace in which every stage has run once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import export, finetune, prepare, pretrain, probe, report, tokenizer
from pipeline.workspace import Workspace
from tests.tiny import write_params

STAGES: dict[str, Callable[[Workspace], None]] = {
    "prepare": prepare.run,
    "tokenizer": tokenizer.run,
    "pretrain": pretrain.run,
    "finetune": finetune.run,
    "probe_linear": lambda workspace: probe.run(workspace, "linear"),
    "probe_attentive": lambda workspace: probe.run(workspace, "attentive"),
    "probe_knn": lambda workspace: probe.run(workspace, "knn"),
    "export": export.run,
    "report": report.run,
}

MakeWorkspace = Callable[[Path, dict[str, Any]], Workspace]


@pytest.fixture(scope="session")
def make_workspace(new_root: Callable[[Path], Path]) -> MakeWorkspace:
    """A workspace with these parameters and nothing else."""

    def make(folder: Path, raw: dict[str, Any]) -> Workspace:
        root = new_root(folder)
        write_params(root, raw)
        return Workspace(root, root / "params.yaml")

    return make


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, make_workspace: MakeWorkspace, tiny_params: dict[str, Any]
) -> Workspace:
    """A tiny workspace after all stages; tests read it and leave it as it is."""
    workspace = make_workspace(tmp_path_factory.mktemp("finished"), tiny_params)
    for run in STAGES.values():
        run(workspace)
    return workspace
