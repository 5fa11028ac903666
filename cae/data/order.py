"""Which samples a training step takes: one endless stream, a function of (seed, epoch) and the sizes of the shards.

The stream is the orders of the epochs, one after the other; step s takes samples s*B to (s+1)*B of it. So every image
comes exactly once in every epoch, and a batch may hold the end of one epoch and the start of the next (an image that is
in both parts is two samples: its crop and mask are drawn from the epoch).

The order of an epoch, with a window of WINDOW images:

- A set of at most WINDOW images is shuffled whole.
- A larger one in two levels: the shards are permuted by (seed, epoch) and taken in windows of consecutive shards, as
  many as stay within WINDOW images (a shard that is larger is a window of its own); the images of a window are permuted
  by (seed, epoch, window). Reading is then local, and memory is that of a window, however large the set.

Ranks, workers and accumulation have no say in it: they share out each step's batch.
"""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from cae.errors import UserError

WINDOW = 2**20


class SampleId(NamedTuple):
    """A sample as drawn: which image, in which epoch."""

    epoch: int
    position: int


class Share(NamedTuple):
    """The part of every batch that one process takes, in `num_accumulated` micro-batches."""

    rank: int = 0
    num_ranks: int = 1
    num_accumulated: int = 1


WHOLE = Share()


class SampleOrder:
    """The stream of samples over shards of `counts` images; `window` is the most images that are shuffled together."""

    def __init__(self, counts: Sequence[int] | np.ndarray, seed: int, window: int = WINDOW) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.starts = np.cumsum(self.counts) - self.counts
        self.num_samples = int(self.counts.sum())
        self.seed, self.window = seed, window
        self._epoch = -1
        self._shards = np.empty(0, dtype=np.int64)  # of the epoch, in its order
        self._windows = np.empty(0, dtype=np.int64)  # where each begins among `_shards`, and the end of the last
        self._window_starts = np.empty(0, dtype=np.int64)  # in images of the epoch, and the end of the last
        self._held = -1, -1  # epoch and number of the window in `_positions`
        self._positions = np.empty(0, dtype=np.int64)

    def take(self, start: int, count: int) -> list[SampleId]:
        """Samples `start` to `start + count` of the stream."""
        samples: list[SampleId] = []
        while len(samples) < count:
            epoch, number = self.window_of(start + len(samples))
            positions = self._in_window(epoch, number)
            first = (start + len(samples)) % self.num_samples - int(self._window_starts[number])
            chosen = positions[first : first + count - len(samples)].tolist()
            samples += [SampleId(epoch, position) for position in chosen]
        return samples

    def window_of(self, sample: int) -> tuple[int, int]:
        """Epoch and number of the window that holds a sample of the stream."""
        epoch, offset = divmod(sample, self.num_samples)
        self._plan(epoch)
        return epoch, int(np.searchsorted(self._window_starts, offset, side="right")) - 1

    def end_of(self, window: tuple[int, int]) -> int:
        """The first sample of the stream after a window."""
        epoch, number = window
        self._plan(epoch)
        return epoch * self.num_samples + int(self._window_starts[number + 1])

    def shards_of(self, window: tuple[int, int]) -> list[int]:
        epoch, number = window
        self._plan(epoch)
        return self._shards[self._windows[number] : self._windows[number + 1]].tolist()

    def _plan(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._epoch = epoch
        if self.num_samples <= self.window:
            self._shards = np.arange(len(self.counts))
            cuts = [0, len(self.counts)]
        else:
            self._shards = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts))
            cuts = self._cut(np.cumsum(self.counts[self._shards]))
        ends = np.concatenate([[0], np.cumsum(self.counts[self._shards])])
        self._windows = np.asarray(cuts)
        self._window_starts = ends[self._windows]

    def _cut(self, ends: np.ndarray) -> list[int]:
        cuts = [0]
        while cuts[-1] < len(ends):
            taken = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
            cuts.append(max(int(np.searchsorted(ends, taken + self.window, side="right")), cuts[-1] + 1))
        return cuts

    def _in_window(self, epoch: int, number: int) -> np.ndarray:
        if self._held != (epoch, number):
            shards = self._shards[self._windows[number] : self._windows[number + 1]]
            counts = self.counts[shards]
            firsts = np.repeat(self.starts[shards] - (np.cumsum(counts) - counts), counts)
            key = [self.seed, epoch] if self.num_samples <= self.window else [self.seed, epoch, number]
            self._positions = np.random.default_rng(key).permutation(firsts + np.arange(len(firsts)))
            self._held = epoch, number
        return self._positions


class EpochBatches(Sampler[list[SampleId]]):
    """The micro-batches of one process from `start_step` to `total_steps`.

    Each batch is cut into num_accumulated * num_ranks equal parts, in order; micro-batch a of rank r is part
    a * num_ranks + r. Whatever the share, together they are the same batch. Raises UserError where it cannot be cut so.
    `announce` hears of the shards of a window and of the next before the first of its batches.
    """

    def __init__(
        self,
        order: SampleOrder,
        batch_size: int,
        start_step: int,
        total_steps: int,
        share: Share = WHOLE,
        announce: Callable[[list[int]], None] | None = None,
    ) -> None:
        check_batch_size(order.num_samples, batch_size)
        self.order, self.batch_size, self.share = order, batch_size, share
        self.start_step, self.total_steps = start_step, total_steps
        self.announce = announce
        self.part_size = part_size(batch_size, share)

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.share.num_accumulated

    def __iter__(self) -> Iterator[list[SampleId]]:
        rank, num_ranks, num_accumulated = self.share
        announced = None
        for step in range(self.start_step, self.total_steps):
            start = step * self.batch_size
            if self.announce and (window := self.order.window_of(start)) != announced:
                self.announce(self._shards_from(window))
                announced = window
            batch = self.order.take(start, self.batch_size)
            for number in range(num_accumulated):
                first = (number * num_ranks + rank) * self.part_size
                yield batch[first : first + self.part_size]

    def _shards_from(self, window: tuple[int, int]) -> list[int]:
        """Those of a window, then those of the next if the training comes to it."""
        shards, end = self.order.shards_of(window), self.order.end_of(window)
        if end < self.total_steps * self.batch_size:
            shards += self.order.shards_of(self.order.window_of(end))
        return shards


def total_steps(num_samples: int, batch_size: int, epochs: int) -> int:
    """Steps in which every sample comes at least `epochs` times; raises UserError when one batch cannot be filled."""
    check_batch_size(num_samples, batch_size)
    return -(-epochs * num_samples // batch_size)


def steps_in(epochs: float, num_samples: int, batch_size: int) -> int:
    """Steps in a number of epochs that need not be whole, to the nearest step."""
    # A decimal as it was written: 0.3 epochs of 10 samples are 3 samples.
    return round(Fraction(str(epochs)) * num_samples / batch_size)


def part_size(batch_size: int, share: Share) -> int:
    """Samples of a micro-batch; raises UserError where the batch cannot be cut into equal ones."""
    parts = share.num_ranks * share.num_accumulated
    if batch_size % parts:
        below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
        nearest = below if below and batch_size - below <= above - batch_size else above
        raise UserError(
            f"batch_size: {batch_size} cannot be cut into {parts} equal parts ({share.num_ranks} processes, "
            f"runtime.accumulate_steps {share.num_accumulated}); the nearest that fits is {nearest}"
        )
    return batch_size // parts


def check_batch_size(num_samples: int, batch_size: int) -> None:
    """Raise UserError where a batch would need more images than there are."""
    if num_samples < batch_size:
        raise UserError(
            f"batch_size: {batch_size} is more than the {num_samples} training images; choose at most {num_samples}"
        )
