"""Batches for training and for evaluation. Order and randomness are functions of (seed, epoch, sample) alone,
so the number of workers and an interruption change nothing."""

import signal
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cae.data.order import EpochBatches, SampleId
from cae.data.shards import ImageShards
from cae.data.transforms import EvalTransform
from cae.data.watch import Reading, WatchedLoader

Batch = dict[str, Tensor]
Transform = Callable[[Any, np.random.Generator], dict[str, Any]]


class TrainDataset(Dataset[dict[str, Any]]):
    """Applies `transform` to a sample with a generator made from (seed, epoch, position)."""

    def __init__(self, shards: ImageShards, transform: Transform, seed: int) -> None:
        self.shards, self.transform, self.seed = shards, transform, seed
        self.reading = Reading(shards, 0)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, sample: SampleId) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, sample.epoch, sample.position])
        with self.reading.image(sample.position):
            item = self.transform(self.shards.image(sample.position), rng)
            return {**item, "labels": self.shards.label(sample.position), "positions": sample.position}


class EvalDataset(Dataset[dict[str, Any]]):
    """Every image once, in order, with evaluation preprocessing; `target_transform` gives the target's own view."""

    def __init__(
        self, shards: ImageShards, transform: EvalTransform, target_transform: EvalTransform | None = None
    ) -> None:
        self.shards = shards
        self.reading = Reading(shards, 0)
        self.transforms = {"images": transform}
        if target_transform:
            self.transforms["target_images"] = target_transform

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, position: int) -> dict[str, Any]:
        with self.reading.image(position):
            image = self.shards.image(position)
            views = {name: transform(image) for name, transform in self.transforms.items()}
            return {**views, "labels": self.shards.label(position)}


def train_loader(
    dataset: TrainDataset, batches: EpochBatches, num_workers: int, device: torch.device
) -> Iterable[Batch]:
    """Micro-batches on the CPU, pinned where the device is a GPU: uint8 [b, c, h, w], labels and positions [b]."""
    return _loader(dataset, num_workers, device, batch_sampler=batches)


def eval_loader(dataset: EvalDataset, batch_size: int, num_workers: int, device: torch.device) -> Iterable[Batch]:
    """As `train_loader`, every image once in order, the last batch as small as it is."""
    return _loader(dataset, num_workers, device, batch_size=batch_size)


def _loader(
    dataset: TrainDataset | EvalDataset, num_workers: int, device: torch.device, **order: Any
) -> Iterable[Batch]:
    dataset.reading = Reading(dataset.shards, num_workers)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        # A generator of its own: the loader draws a seed, and the global generator belongs to drop path.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_trainer,
        **order,
    )
    return WatchedLoader(loader, dataset.reading)


def _leave_signals_to_the_trainer(_worker: int) -> None:
    # A signal to the process group must let the step under way finish, and that step needs its data.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
