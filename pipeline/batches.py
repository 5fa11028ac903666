"""Loaders over the prepared data, as every training and every evaluation of the pipeline uses them."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from cae.config import ModelConfig
from cae.data.loader import Batch, EvalDataset, TrainDataset, Transform, eval_loader, train_loader
from cae.data.order import EpochBatches, SampleOrder, Share, part_size
from cae.data.remote import FetchAhead, ShardCache
from cae.data.shards import INDEX_NAME, ImageShards, Picture, Split
from cae.masking import MaskSampler
from cae.train.device import Hardware
from cae.train.loop import BatchSource
from cae.train.parallel import Ranks
from cae.weights import Trained
from pipeline.workspace import Workspace
from serving.preprocess import Preprocessing, prepare


class Evaluation:
    """The server's preprocessing as a transform; a class, so that it can be sent to loader workers."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, image: Picture) -> np.ndarray:
        return prepare(image, self.preprocessing)


def train_batches(
    workspace: Workspace,
    transform: Transform,
    *,
    batch_size: int,
    total_steps: int,
    share: Share,
    hardware: Hardware,
) -> BatchSource:
    """A share of the batches of training images from any step on, each image transformed with its own seed."""
    params = workspace.params
    shards = workspace.shards("train")
    dataset = TrainDataset(shards, transform, params.seed)
    order = SampleOrder(shards.counts, params.seed)
    part_size(batch_size, share)
    # The processes of a machine share what is fetched.
    fetches = isinstance(shards.files, ShardCache) and Ranks.from_environment().local_rank == 0
    announce = FetchAhead(shards) if fetches else None

    def from_step(start: int) -> Iterable[Batch]:
        batches = EpochBatches(order, batch_size, start, total_steps, share, announce)
        return train_loader(dataset, batches, params.runtime.num_workers, hardware.device)

    return from_step


def evaluation_batches(
    workspace: Workspace,
    split: Split,
    preprocessing: Preprocessing,
    batch_size: int,
    hardware: Hardware,
    target_px: tuple[int, int] | None = None,
) -> Iterable[Batch]:
    """Every image of the split once, in order, with evaluation preprocessing.

    With `target_px` (height, width) also the same crop at that size, under `target_images`.
    """
    target_transform = Evaluation(resized(preprocessing, target_px)) if target_px else None
    dataset = EvalDataset(workspace.shards(split), Evaluation(preprocessing), target_transform)
    return eval_loader(dataset, batch_size, workspace.params.runtime.num_workers, hardware.device)


def resized(preprocessing: Preprocessing, size_px: tuple[int, int]) -> Preprocessing:
    """The same crop at another height and width of the same shape."""
    height, width = size_px
    return preprocessing.model_copy(update={"height": height, "width": width})


def second_view_px(model: ModelConfig, patch_px: int) -> tuple[int, int] | None:
    """Height and width of the view of a target that reads `patch_px` pixels a patch; None where it is the model's."""
    rows, columns = model.grid
    size_px = rows * patch_px, columns * patch_px
    return None if size_px == model.size_px else size_px


def view_for_target(batch: Batch) -> Tensor:
    """The view that the target reads, float32 in 0-1: its own where the batch has one."""
    return unit_range(batch.get("target_images", batch["images"]))


def first_images(workspace: Workspace, split: Split, preprocessing: Preprocessing, count: int) -> Tensor:
    """The first images of a split after evaluation preprocessing, uint8 [b, c, h, w]."""
    shards = workspace.shards(split)
    transform = Evaluation(preprocessing)
    arrays = [transform(shards.image(position)) for position in range(min(count, len(shards)))]
    return torch.from_numpy(np.stack(arrays))


def spread_over_classes(shards: ImageShards, count: int) -> list[int]:
    """Positions of at most `count` images, the classes in turn, so that each is seen; without labels the first."""
    labels = np.concatenate(list(shards.labels()))
    # Within each class in order; then the first of every class, the second of every class, and so on.
    rank = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    return [int(position) for position in np.lexsort((labels, rank))[:count]]


def fits_prepared(workspace: Workspace, trained: Trained) -> bool:
    """Whether there are prepared images, and of as many channels as the model takes."""
    return (workspace.prepared / INDEX_NAME).exists() and workspace.index.channels == trained.architecture.channels


def draw_masks(sampler: MaskSampler, seed: int, positions: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Indices of the visible [b, v] and the masked patches [b, m]; each mask depends on (seed, position) alone."""
    drawn = [sampler(np.random.default_rng([seed, position])) for position in positions]
    visible, masked = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
    return visible, masked


def unit_range(images: Tensor) -> Tensor:
    """uint8 [b, c, h, w] as float32 in 0-1."""
    return images.float() / 255
