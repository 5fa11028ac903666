"""One contender in a process of its own: `python -m benchmarks.training.alone NAME THREADS SETTING`.

Nothing that one of them sets or leaves behind, such as what our step asks of malloc, touches another. It writes the
peak of its memory once it is warm, and from then on, for each number of steps that it reads, the seconds of one.
Memory is counted from just before the model is built to the end of the third step. CUDA: what torch allocated at most.
CPU: the peak of resident memory, less what was resident before.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

import torch

from benchmarks.training import changes
from benchmarks.training.contenders import Batch
from benchmarks.training.setting import Setting
from benchmarks.training.timing import seconds_per_call
from cae.errors import UserError

WARMUP_STEPS = 3  # the moments are there from the first on, and gradients of one step meet the next one's activations
KIB = 1024
LAST_LINES = 3


class Contender:
    """The process, seen from the benchmark."""

    def __init__(self, name: str, process: "subprocess.Popen[str]", errors: IO[str]) -> None:
        self.name, self.process, self.errors = name, process, errors
        self.peak_bytes = int(self._answer())

    def seconds_per_step(self, count: int) -> float:
        """Over `count` steps, now."""
        assert self.process.stdin
        # A process that is gone takes nothing, and has no answer.
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{count}\n")
            self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return line
        self.errors.seek(0)
        words = "".join(self.errors.readlines()[-LAST_LINES:]).strip()
        raise UserError(
            f"cae-pipe bench: the process of {self.name} ended with {self.process.wait()}; expected its figures. Its "
            f"last words: {words}"
        )


@contextmanager
def started(name: str, setting: Setting, threads: int) -> Iterator[Contender]:
    """A contender, built and warm. Raises UserError where it ends too early."""
    fields = {**asdict(setting), "device": setting.device.type}
    command = [sys.executable, "-m", "benchmarks.training.alone", name, str(threads), json.dumps(fields)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            yield Contender(name, process, errors)
        finally:
            process.kill()
            # Closing it would flush what the process no longer takes.
            with suppress(BrokenPipeError):
                process.communicate()


def main() -> None:
    name, threads, fields = sys.argv[1:]
    values = json.loads(fields)
    torch.set_num_threads(int(threads))
    setting = Setting(**{**values, "device": torch.device(values["device"])})
    if name in ("beit", "mae"):
        import transformers.models.beit.modeling_beit
        import transformers.models.vit_mae.modeling_vit_mae  # noqa: F401
    batch = Batch.draw(setting)
    step, peak = warm(lambda: changes.build(name, batch), setting.device)
    make_room(setting.device)
    answer(peak)
    for line in sys.stdin:
        if setting.device.type == "cuda":
            step()
        seconds = seconds_per_call(step, int(line), setting.device)
        make_room(setting.device)
        answer(seconds)


def make_room(device: torch.device) -> None:
    """For the others on this GPU, who have their turns while this one waits."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def answer(value: float) -> None:
    sys.stdout.write(f"{value}\n")
    sys.stdout.flush()


def warm(build_step: Callable[[], Callable[[], object]], device: torch.device) -> tuple[Callable[[], object], int]:
    """The step, and the bytes at the peak of building it and running it a few times, in a process that did nothing."""
    # What is imported or set up at first use is no memory of the step.
    (torch.randn(64, 64, device=device) @ torch.randn(64, 64, device=device)).sum().item()
    import benchmarks.training.ours  # noqa: F401

    before = start_memory(device)
    step = build_step()
    for _ in range(WARMUP_STEPS):
        step()
    return step, peak_memory(device) - before


def start_memory(device: torch.device) -> int:
    """Bytes in use now; the peak counts from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far, since `start_memory` on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return KIB * int(next(line for line in lines if line.startswith(key)).split()[1])


if __name__ == "__main__":
    main()
