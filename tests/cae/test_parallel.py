"""Several processes train what one process trains, and none of them can hang the others or lose work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cae.train.compile import missing_compiler
from tests.serving.running_server import free_port
from tests.tiny import ROOT

TIMEOUT_S = 240
KEYS = ("loss", "decoding_loss", "alignment_loss", "grad_norm")


def start(folder: Path, num_processes: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """The processes of one training, as torchrun would start them."""
    folder.mkdir(exist_ok=True)
    # With one process no variable is set, as on a laptop.
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes), **port}
        for rank in range(num_processes)
    ]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.cae.shared_training", str(folder), *arguments],
            cwd=ROOT,
            env={**os.environ, **(variables if num_processes > 1 else {})},
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for variables in shared
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and standard error of each; they end by themselves or the test fails."""
    ended = []
    try:
        for process in processes:
            _, stderr = process.communicate(timeout=TIMEOUT_S)
            ended.append((process.returncode, stderr))
    finally:
        for process in processes:
            process.kill()
    return ended


def train(folder: Path, num_processes: int, parallel: str = "ddp", accumulate: int = 1) -> Path:
    """A training that must succeed; its folder."""
    for code, stderr in finish(start(folder, num_processes, parallel, str(accumulate), "-1")):
        assert code == 0, stderr
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_curves(first: Path, second: Path) -> None:
    ours, theirs = rows(first), rows(second)
    assert len(ours) == len(theirs) == 50
    for one, other in zip(ours, theirs, strict=True):
        for key in KEYS:
            assert one[key] == pytest.approx(other[key], abs=1e-9, rel=0), (key, one["step"])
    weights, others = (torch.load(folder / "weights.pt") for folder in (first, second))
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training of one process."""
    return train(tmp_path_factory.mktemp("shared") / "alone", 1)


slow = pytest.mark.skipif(
    not os.environ.get("CAE_SOAK") or missing_compiler("cpu") is not None,
    reason="compiles for minutes, where there is a C++ compiler; `make soak` asks for it",
)


@pytest.mark.parametrize(
    ("num_processes", "parallel", "accumulate"),
    [
        (1, "ddp", 4),
        (2, "ddp", 1),
        (2, "fsdp", 2),
        pytest.param(2, "ddp compiled", 1, marks=slow),
        pytest.param(2, "fsdp compiled", 2, marks=slow),
    ],
)
def test_the_same_batch_has_the_same_losses_however_it_is_shared(
    tmp_path: Path, alone: Path, num_processes: int, parallel: str, accumulate: int
) -> None:
    assert_same_curves(alone, train(tmp_path / "shared", num_processes, parallel, accumulate))


def test_a_process_that_is_killed_stops_the_others_and_any_number_goes_on(tmp_path: Path, alone: Path) -> None:
    folder = tmp_path / "killed"
    (code, stderr), (killed, _) = finish(start(folder, 2, "fsdp", "1", "25"))
    assert killed == -signal.SIGKILL
    assert code > 0
    assert "Connection" in stderr, "it says that the other is gone"
    assert sorted(path.name[:14] for path in (folder / "checkpoints").iterdir()) == ["step-000000010", "step-000000020"]
    # On one process in place of two, in the middle of the epoch.
    train(folder, 1)
    assert_same_curves(alone, folder)


def test_asked_to_stop_one_process_all_save_and_stop_after_the_same_step(tmp_path: Path, alone: Path) -> None:
    folder = tmp_path / "stopped"
    processes = start(folder, 2, "ddp", "1", "-1")
    deadline = time.monotonic() + TIMEOUT_S
    log = folder / "log.jsonl"
    # The first row means that both are in their first step or beyond.
    while time.monotonic() < deadline and not (log.exists() and log.read_text()):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGUSR1)
    ended = finish(processes)
    assert {code for code, _ in ended} == {1}, "Interrupted is a Python error here; `cae-pipe` gives it a code"
    messages = {stderr.strip().splitlines()[-1].partition(": ")[2] for _, stderr in ended}
    assert len(messages) == 1
    assert "stopped by SIGUSR1 after step" in messages.pop()
    train(folder, 2, "fsdp")
    assert_same_curves(alone, folder)
