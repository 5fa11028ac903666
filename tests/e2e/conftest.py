"""Real Git clones with real DVC in them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.clones import clone_repository
from tests.tiny import with_values, write_params

TIMEOUT_S = 600


@dataclass(frozen=True)
class Clone:
    """A clone of this repository; commands run in it with its own code first on the path."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # The editable install points at the checkout under test, which the clone's own code must go before.
        return {**os.environ, "PATH": path, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A command as the leader of a process group, so that a test can signal the whole of it."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *command: str) -> str:
        """Output of a command that must succeed."""
        process = self.start(*command)
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == 0, output
        return output

    def repro(self) -> list[str]:
        """The stages that `dvc repro` ran."""
        output = self.run("dvc", "repro")
        return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]

    def hashes(self) -> dict[str, str]:
        """The content hash of every output in dvc.lock but what tells of speed (efficiency, curves, report)."""
        lock = YAML(typ="safe", pure=True).load(self.root / "dvc.lock")
        return {
            out["path"]: out["md5"]
            for stage in lock["stages"].values()
            for out in stage["outs"]
            if not any(part in out["path"] for part in ("efficiency", "curves", "report"))
        }

    def set_params(self, **values: Any) -> None:
        """Change dotted keys of params.yaml (with `__` for the dots)."""
        raw = YAML(typ="safe", pure=True).load(self.root / "params.yaml")
        write_params(self.root, with_values(raw, {key.replace("__", "."): value for key, value in values.items()}))


@pytest.fixture(scope="session")
def make_clone(tiny_params: dict[str, Any]) -> Callable[[Path], Clone]:
    """Clones the repository with its uncommitted changes and makes its parameters tiny."""

    def make(folder: Path) -> Clone:
        clone_repository(folder)
        # Long enough for a signal to come in the middle.
        write_params(folder, with_values(tiny_params, {"pretrain.epochs": 40, "pretrain.checkpoint_every_steps": 5}))
        return Clone(folder)

    return make


@pytest.fixture(scope="session")
def reproduced(make_clone: Callable[[Path], Clone], tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which `dvc repro` has run once without interruption."""
    clone = make_clone(tmp_path_factory.mktemp("reproduced") / "clone")
    assert clone.repro() == [
        "prepare",
        "tokenizer",
        "pretrain",
        "finetune",
        "probe@linear",
        "probe@attentive",
        "probe@knn",
        "export",
        "report",
    ]
    return clone
