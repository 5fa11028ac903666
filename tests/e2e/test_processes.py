"""One training on two processes in a real clone: not to be stopped for good by the death of one."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.e2e.conftest import Clone
from tests.e2e.test_repro import wait_for_step

# From the death of a rank: the launcher's grace for the others, and the time to notice and to report.
BOUND_S = 60


def ranks_of(launcher: int) -> dict[int, int]:
    """The process of each rank that this launcher has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = {}
    for child in map(int, children):
        variables = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        numbers = [int(text.removeprefix("RANK=")) for text in variables if text.startswith("RANK=")]
        found.update(dict.fromkeys(numbers, child))
    return found


def test_a_rank_that_is_killed_stops_the_run_which_then_goes_on(
    make_clone: Callable[[Path], Clone], tmp_path: Path
) -> None:
    clone = make_clone(tmp_path / "clone")
    clone.set_params(runtime__num_processes=2, runtime__device="cpu")
    clone.run("dvc", "repro", "tokenizer")

    process = clone.start("cae-pipe", "pretrain")
    try:
        wait_for_step(clone, 20, process)
        victim = ranks_of(process.pid)[1]
        os.kill(victim, signal.SIGKILL)
        output, _ = process.communicate(timeout=BOUND_S)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 1
    assert f"rank 1 (process {victim} on " in output
    assert "ended by SIGKILL" in output
    assert "Traceback" not in output

    output = clone.run("dvc", "repro", "pretrain")
    assert "going on from step" in output
    assert (clone.root / "models/pretrain/cae.safetensors").exists()


def test_torchrun_starts_the_same_training(make_clone: Callable[[Path], Clone], tmp_path: Path) -> None:
    clone = make_clone(tmp_path / "clone")
    clone.set_params(runtime__device="cpu", pretrain__epochs=2)
    clone.run("dvc", "repro", "tokenizer")
    clone.run("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "pipeline.cli", "pretrain")
    assert (clone.root / "models/pretrain/cae.safetensors").exists()
