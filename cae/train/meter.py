"""How fast a training runs, and for how much of the time it waits for data."""

import resource
import sys
import time
from collections.abc import Iterable, Iterator

import torch

from cae.data.loader import Batch
from cae.train.log import Row


class Meter:
    """Images per second, over all processes, and the share of time spent waiting for data: lately and in all."""

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.wait_s, self.images, self.steps = 0.0, 0, 0
        self.start = self._mark = time.perf_counter()
        self._mark_wait, self._mark_images = 0.0, 0
        self._total_images, self._total_wait, self._total_start = 0, 0.0, self.start

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches, with the time noted that each was waited for."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(iterator, None)
            self.wait_s += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def add(self, images: int) -> None:
        """A step over `images` images is done."""
        self.images += images
        self.steps += 1
        if self.steps == self.warmup_steps:
            # Start-up of workers, compilation and first allocations say nothing about the run.
            self._total_images, self._total_wait = self.images, self.wait_s
            self._total_start = time.perf_counter()

    def recent(self) -> Row:
        """Figures since the last call."""
        now = time.perf_counter()
        row = _rates(self.images - self._mark_images, self.wait_s - self._mark_wait, now - self._mark)
        self._mark, self._mark_wait, self._mark_images = now, self.wait_s, self.images
        return row

    def summary(self) -> Row:
        """Figures of the whole run, without its first steps."""
        now = time.perf_counter()
        rates = _rates(self.images - self._total_images, self.wait_s - self._total_wait, now - self._total_start)
        return {**rates, "wall_s": now - self.start}


def peak_memory_mb(device: torch.device) -> float:
    """The most memory so far: of the GPU by this process, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _rates(images: int, wait_s: float, elapsed_s: float) -> Row:
    elapsed_s = max(elapsed_s, 1e-9)
    return {"images_per_s": images / elapsed_s, "data_wait_fraction": wait_s / elapsed_s}
