"""The pipeline's image: `dvc repro` in a mounted repository, as its owner, with the bytes of outside."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.containers.container import Image, running
from tests.containers.container import serving as serving_from
from tests.e2e.conftest import Clone
from tests.tiny import TINY, shipped_params, with_values, write_digits, write_params

# Long enough for a signal to come in the middle.
PARAMETERS = {**TINY, "prepare.source": "folder:digits", "pretrain.epochs": 40, "pretrain.checkpoint_every_steps": 5}
# Workers hand their batches over in shared memory.
PARAMETERS["runtime.num_workers"] = 2
UID = 23456
SMALL = ("--read-only", "--tmpfs", "/tmp", "--tmpfs", "/home/cae", "--cap-drop", "ALL")
SMALL += ("--security-opt", "no-new-privileges", "--memory", "8g", "--pids-limit", "1024", "--shm-size", "1g")


@dataclass(frozen=True)
class Mounted:
    """A clone that belongs to another user than root, mounted in a container that runs as that user."""

    clone: Clone
    uid: int

    @property
    def options(self) -> tuple[str, ...]:
        threads = ("--env", "OMP_NUM_THREADS=1")
        return (*SMALL, *threads, "--user", f"{self.uid}:{self.uid}", "--volume", f"{self.clone.root}:/work")

    def foreign_files(self) -> list[Path]:
        """What lies in the clone and is not its owner's."""
        found = [self.clone.root, *self.clone.root.rglob("*")]
        return [path for path in found if path.lstat().st_uid != self.uid]


@pytest.fixture(scope="module")
def mounted(checkout: Callable[[str], Path]) -> Callable[[str], Mounted]:
    # As root the tests can give files away, and then they see that a container keeps to the owner.
    uid = UID if os.geteuid() == 0 else os.geteuid()

    def make(name: str) -> Mounted:
        root = tiny_clone(checkout(name))
        if os.geteuid() == 0:
            subprocess.run(["chown", "--recursive", f"{uid}:{uid}", str(root)], check=True)
        return Mounted(Clone(root), uid)

    return make


def tiny_clone(root: Path) -> Path:
    write_digits(root / "digits")
    write_params(root, with_values(shipped_params(), PARAMETERS))
    return root


@pytest.fixture(scope="module")
def outside(checkout: Callable[[str], Path], pipeline: Image) -> dict[str, str]:
    """The hashes of every output, made by the environment that runs the tests."""
    clone = Clone(tiny_clone(checkout("outside")))
    clone.repro()
    return clone.hashes()


def test_repro_gives_the_bytes_of_outside_and_files_of_the_owner(
    pipeline: Image, serving: Image, mounted: Callable[[str], Mounted], outside: dict[str, str]
) -> None:
    here = mounted("inside")
    code, output = pipeline.outcome(options=here.options)
    assert code == 0, output
    assert output.count("Running stage") == 9
    assert here.clone.hashes() == outside
    assert here.foreign_files() == []
    code, again = pipeline.outcome(options=here.options)
    assert code == 0, again
    assert "Running stage" not in again
    with serving_from(serving, here.clone.root / "models/bundle") as server:
        digit = (here.clone.root / "docs/images/digit.png").read_bytes()
        assert server.client.post("/embed", content=digit).status_code == 200


# `docker stop` sends the image's own signal; other orchestrators send SIGTERM whatever the image says.
@pytest.mark.parametrize("stop", [("stop", "-t", "60"), ("kill", "--signal", "TERM")], ids=["stop", "sigterm"])
def test_stopped_in_the_middle_it_saves_and_goes_on(
    pipeline: Image, mounted: Callable[[str], Mounted], outside: dict[str, str], stop: tuple[str, ...]
) -> None:
    here = mounted("stopped")
    with running(pipeline, options=here.options) as container:
        _wait_for_checkpoint(here.clone)
        pipeline.engine.run("docker", *stop, container.identity)
        assert container.exit_code() not in (0, 137)
        stopped = container.logs()
    assert "which is saved" in stopped
    code, output = pipeline.outcome(options=here.options)
    assert code == 0, output
    assert "going on from step" in output
    assert here.clone.hashes() == outside


def _wait_for_checkpoint(clone: Clone) -> None:
    deadline = time.monotonic() + 300
    while not list(clone.root.glob("scratch/pretrain-*/checkpoints/step-*.pt")):
        assert time.monotonic() < deadline, "pretrain wrote no checkpoint"
        time.sleep(0.05)


def test_another_user_is_told_how_to_run_it(pipeline: Image, mounted: Callable[[str], Mounted]) -> None:
    here = mounted("wrong_user")
    if os.geteuid() != 0:
        pytest.skip("a folder of another user takes root to make")
    for user in ("0:0", "34567:34567"):
        code, output = pipeline.outcome(options=("--user", user, "--volume", f"{here.clone.root}:/work"))
        assert code == 2
        assert f"--user {UID}:{UID}" in output
        assert f"CAE_UID={UID}" in output
    assert here.foreign_files() == []


def test_any_command_works_the_same_way(pipeline: Image, mounted: Callable[[str], Mounted]) -> None:
    here = mounted("commands")
    assert pipeline.outcome("cae-pipe", "doctor", options=here.options)[0] == 0
    assert pipeline.outcome("dvc", "stage", "list", "--name-only", options=here.options)[0] == 0
    # Git reads the mounted repository without asking whose it is.
    somebody = ("--user", "34567:34567", "--entrypoint", "git", "--volume", f"{here.clone.root}:/work:ro")
    assert pipeline.outcome("status", options=somebody)[0] == 0
    assert pipeline.outcome("sh", "-c", "exit 7", options=here.options)[0] == 7


def test_without_a_repository_it_still_has_its_commands(pipeline: Image) -> None:
    code, output = pipeline.outcome("cae-pipe", "--version", options=SMALL)
    assert code == 0, output
    assert pipeline.shell("git config --get-all safe.directory").split() == ["/work"]
