"""Being asked to stop: the step under way finishes and is saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGUSR1 is what SLURM sends ahead of the end of a job's time.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that the stop signals append to in place of ending the process."""
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
