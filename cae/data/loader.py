"""Batches for training and for evaluation. Order and randomness are functions of (seed, epoch, sample) alone,
so the number of workers and an interruption change nothing."""

import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cae.data.shards import ImageShards
from cae.data.transforms import EvalTransform
from cae.errors import UserError

Batch = dict[str, Tensor]
Transform = Callable[[Any, np.random.Generator], dict[str, Any]]


class SampleId(NamedTuple):
    """A sample as drawn: which image, in which epoch."""

    epoch: int
    position: int


class EpochBatches(Sampler[list[SampleId]]):
    """Batches of every epoch's permutation from `start_step` to `total_steps`; incomplete last batches are left out."""

    def __init__(self, num_samples: int, batch_size: int, seed: int, start_step: int, total_steps: int) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.start_step, self.total_steps = start_step, total_steps
        self.steps_per_epoch = steps_per_epoch(num_samples, batch_size)

    def __len__(self) -> int:
        return self.total_steps - self.start_step

    def __iter__(self) -> Iterator[list[SampleId]]:
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        for step in range(self.start_step, self.total_steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
                order_epoch = epoch
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [SampleId(epoch, int(position)) for position in chosen]


class TrainDataset(Dataset[dict[str, Any]]):
    """Applies `transform` to a sample with a generator made from (seed, epoch, position)."""

    def __init__(self, shards: ImageShards, transform: Transform, seed: int) -> None:
        self.shards, self.transform, self.seed = shards, transform, seed

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, sample: SampleId) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, sample.epoch, sample.position])
        item = self.transform(self.shards.image(sample.position), rng)
        return {**item, "labels": self.shards.label(sample.position)}


class EvalDataset(Dataset[dict[str, Any]]):
    """Every image once, in order, with evaluation preprocessing; `target_transform` gives the target's own view."""

    def __init__(
        self, shards: ImageShards, transform: EvalTransform, target_transform: EvalTransform | None = None
    ) -> None:
        self.shards = shards
        self.transforms = {"images": transform}
        if target_transform:
            self.transforms["target_images"] = target_transform

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, position: int) -> dict[str, Any]:
        image = self.shards.image(position)
        views = {name: transform(image) for name, transform in self.transforms.items()}
        return {**views, "labels": self.shards.label(position)}


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Full batches in an epoch; raises UserError when there is not even one."""
    if num_samples < batch_size:
        raise UserError(
            f"batch_size: {batch_size} is more than the {num_samples} training images; choose at most {num_samples}"
        )
    return num_samples // batch_size


def train_loader(
    dataset: TrainDataset, batches: EpochBatches, num_workers: int, device: torch.device
) -> Iterable[Batch]:
    """Batches on the CPU, pinned where the device is a GPU; images uint8 [b, c, h, w]."""
    return _loader(dataset, num_workers, device, batch_sampler=batches)


def eval_loader(dataset: EvalDataset, batch_size: int, num_workers: int, device: torch.device) -> Iterable[Batch]:
    """As `train_loader`, every image once in order, the last batch as small as it is."""
    return _loader(dataset, num_workers, device, batch_size=batch_size)


def _loader(dataset: Dataset[Any], num_workers: int, device: torch.device, **order: Any) -> Iterable[Batch]:
    return DataLoader(
        dataset,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        # A generator of its own: the loader draws a seed, and the global generator belongs to drop path.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_trainer,
        **order,
    )


def _leave_signals_to_the_trainer(_worker: int) -> None:
    # A signal to the process group must let the step under way finish, and that step needs its data.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
