"""Before the first caller: every shape that will run is run, and the batch sizes that are worth it are found."""

from __future__ import annotations

import time
from collections.abc import Callable

# A larger batch must be faster for each image by this share, or it only keeps callers waiting.
MIN_GAIN = 0.03
LARGEST_TRIAL = 64
_TRIAL_S = 0.3
_MAX_TRIAL_RUNS = 5


def batch_sizes(run: Callable[[int], object], limit: int | None) -> tuple[int, ...]:
    """Powers of two, run at least once each: those that pay, or with a `limit` all up to it, and the limit itself.

    `run` runs a batch of so many images. On a CPU the largest that pays is often 1, with int8 weights or a GPU it is
    large; so it is tried, for a fraction of a second each, until two sizes in a row have gained nothing.
    """
    if limit is not None:
        sizes = sorted({limit, *(2**power for power in range(limit.bit_length()))})
        for size in sizes:
            run(size)
        return tuple(sizes)
    kept, best, size, misses = [1], _rate(run, 1), 2, 0
    while size <= LARGEST_TRIAL and misses < 2:
        rate = _rate(run, size)
        if rate > best * (1 + MIN_GAIN):
            kept, best, misses = [2**power for power in range(size.bit_length())], rate, 0
        else:
            misses += 1
        size *= 2
    return tuple(kept)


def _rate(run: Callable[[int], object], size: int) -> float:
    """Images per second, the fastest of some runs: what else the machine does only ever makes one slower."""
    run(size)
    fastest, spent, count = float("inf"), 0.0, 0
    while count == 0 or (spent < _TRIAL_S and count < _MAX_TRIAL_RUNS):
        started = time.perf_counter()
        run(size)
        seconds = time.perf_counter() - started
        fastest, spent, count = min(fastest, seconds), spent + seconds, count + 1
    return size / fastest
