"""`python launched.py BEHAVIOUR`: a launcher of two ranks that behave in this way; run by test_launch.py.

The ranks run this file again.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from cae.errors import UserError
from cae.train.signals import STOP_SIGNALS
from pipeline import failures, launch
from pipeline.launch import Machines
from tests.tiny import shipped_params

FOLDER = Path(os.environ["LAUNCHED_FOLDER"])


def main() -> None:
    if launch.is_rank():
        launch.follow_launcher()
        rank(sys.argv[1])
        return
    from cae.config import RuntimeConfig

    runtime = RuntimeConfig(**{**shipped_params()["runtime"], "device": "cpu", "num_processes": 2})
    launch.GRACE_S = int(os.environ.get("LAUNCHED_GRACE_S", "30"))
    launch.MACHINES_TIMEOUT_S = int(os.environ.get("LAUNCHED_TIMEOUT_S", "60"))
    sys.exit(launch.launch([sys.executable, *sys.argv], Machines.here(runtime), FOLDER / "logs"))


def rank(behaviour: str) -> None:
    number = int(os.environ["RANK"])
    caught: list[int] = []
    for name in STOP_SIGNALS:
        signal.signal(name, lambda given, _frame: caught.append(given))
    # torch takes seconds, and most behaviours need none.
    with adder(number) if behaviour in ("adds", "ends") else nullcontext(lambda: 0) as add:
        behave(behaviour, number, caught, add)


def behave(behaviour: str, number: int, caught: list[int], add: Callable[[], int]) -> None:
    note(f"rank-{number}", f"{os.getpid()} {add()} {os.environ['OMP_NUM_THREADS']}")
    sys.stderr.write(f"rank {number} is at work\n")
    if behaviour == "ends":
        return
    if behaviour == "fails" and number == 1:
        raise RuntimeError("rank 1 is broken")
    if behaviour == "all-refuse":
        raise UserError("params.yaml: wrong for everybody")
    if behaviour == "one-refuses" and number == 1:
        raise UserError("params.yaml: wrong for rank 1")
    while not caught or behaviour == "is-deaf":
        add()
        time.sleep(0.05)
    note(f"saved-{number}", str(caught))
    sys.exit(128 + caught[0])


@contextmanager
def adder(number: int) -> Iterator[Callable[[], int]]:
    """Adds `number` + 1 up over all ranks."""
    import torch
    import torch.distributed as dist

    from cae.train.parallel import joined

    def add() -> int:
        total = torch.tensor([number + 1])
        dist.all_reduce(total)
        return int(total)

    # Left without it, gloo's threads abort the process as it ends, now and then.
    with joined(torch.device("cpu")):
        yield add


def note(name: str, text: str) -> None:
    """Written whole or not at all."""
    (FOLDER / f"{name}.partial").write_text(text)
    (FOLDER / f"{name}.partial").rename(FOLDER / name)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    failures.run(main)
