"""The real loader over JPEG shards: alone, and feeding our step."""

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import default_collate

from benchmarks.training.ours import OurStep
from benchmarks.training.setting import MASKED_SHARE, VOCAB_SIZE, Setting
from benchmarks.training.timing import synchronize
from cae.config import CropConfig
from cae.data.loader import Batch, TrainDataset, train_loader
from cae.data.order import EpochBatches, SampleOrder
from cae.data.shards import UNLABELLED, ImageShards, Index, Row, ShardWriter
from cae.data.transforms import CropFlip, PretrainTransform, to_array
from cae.masking import MaskSampler

NUM_IMAGES = 128
SIZE_PX = (500, 375)  # width and height, ImageNet's usual ones
JPEG_QUALITY = 90
SHARD_MB = 16.0
MS = 1000
# Every worker fetches two batches ahead. Those that lie ready when the clock starts must be few among those timed.
AHEAD = 2
WARMUP_BATCHES, TIMED_BATCHES = AHEAD, 4 * AHEAD  # for each worker
PAPER_CROP = CropConfig(crop_scale=(0.08, 1.0), flip=0.5)


def measure(setting: Setting) -> dict[str, Any]:
    """Images a second of the loader alone and of our step fed by it, the share of time that it waits, and the parts."""
    with _loader(setting) as batches:
        alone, _ = _run(setting, batches, lambda batch: None)
    tokens = torch.randint(0, VOCAB_SIZE, (setting.batch_size, setting.num_patches), device=setting.device)
    step = OurStep(setting, tokens)
    with _loader(setting) as batches:
        fed, wait = _run(setting, batches, step)
    return {
        "workers": num_workers(setting.device),
        "loader_alone_images_per_s": alone,
        "step_with_loader_images_per_s": fed,
        "data_wait_fraction": wait,
        "one_core_ms_per_image": parts_ms(setting),
    }


def parts_ms(setting: Setting) -> dict[str, float]:
    """Milliseconds of one core for an image, by what the loader does with it, one thing after the other."""
    rng = np.random.default_rng(0)
    with _prepared(setting) as (shards, transform):
        decode, pictures = _each(shards.image, range(len(shards)))
        crop, views = _each(lambda picture: transform.crop(picture, rng), pictures)
        mask, masks = _each(lambda _: transform.masks(rng), views)
        array, arrays = _each(to_array, views)
        rows = [
            {"images": image, "visible": visible, "masked": masked}
            for image, (visible, masked) in zip(arrays, masks, strict=True)
        ]
        size = setting.batch_size
        collate, _ = _each(default_collate, [rows[start : start + size] for start in range(0, len(rows), size)])
    return {
        "decode": decode,
        "crop, resize, flip": crop,
        "mask": mask,
        "array": array,
        "collate": collate / size,
    }


def _each(function: Callable[[Any], Any], items: Sequence[Any]) -> tuple[float, list[Any]]:
    """Milliseconds of one call, the mean, and what all calls gave."""
    start = time.process_time()
    results = [function(item) for item in items]
    return MS * (time.process_time() - start) / len(items), results


def num_workers(device: torch.device) -> int:
    """Processes that decode: about one a core beside a GPU; on a CPU one, for the step wants the cores too."""
    return max(1, len(os.sched_getaffinity(0)) - 1) if device.type == "cuda" else 1


def _run(setting: Setting, batches: Iterator[Batch], use: Callable[[Batch], None]) -> tuple[float, float]:
    """Images a second and the share of the time spent waiting for the next batch, after a warm-up."""
    warmup, timed = (count * num_workers(setting.device) for count in (WARMUP_BATCHES, TIMED_BATCHES))
    for _ in range(warmup):
        use(next(batches))
    synchronize(setting.device)
    start, waited = time.perf_counter(), 0.0
    for _ in range(timed):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        use(batch)
    synchronize(setting.device)
    elapsed = time.perf_counter() - start
    return timed * setting.batch_size / elapsed, waited / elapsed


@contextmanager
def _loader(setting: Setting) -> Iterator[Iterator[Batch]]:
    """Batches of `pretrain` from shards in a temporary folder."""
    with _prepared(setting) as (shards, transform):
        # Some more than are timed, or the workers would idle at the end.
        steps = (WARMUP_BATCHES + TIMED_BATCHES + AHEAD) * num_workers(setting.device)
        order = EpochBatches(SampleOrder(shards.counts, 0), setting.batch_size, 0, steps)
        dataset = TrainDataset(shards, transform, 0)
        yield iter(train_loader(dataset, order, num_workers(setting.device), setting.device))


@contextmanager
def _prepared(setting: Setting) -> Iterator[tuple[ImageShards, PretrainTransform]]:
    side = setting.image_size
    masks = MaskSampler(setting.grid, setting.num_masked(MASKED_SHARE), "block", 0.08)
    transform = PretrainTransform(CropFlip((side, side), PAPER_CROP), masks)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), max(NUM_IMAGES, setting.batch_size))
        yield ImageShards(Path(folder), "train"), transform


def write_shards(folder: Path, count: int, num_val: int = 0) -> None:
    """Prepared data of so many JPEGs of each split: crops of the two photographs that scikit-learn ships."""
    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    rng = np.random.default_rng(0)
    writers = {"train": ShardWriter(folder, "train", SHARD_MB), "val": ShardWriter(folder, "val", SHARD_MB)}
    for number in range(count + num_val):
        photograph = photographs[number % len(photographs)]
        scale = rng.uniform(0.5, 1)
        width, height = (int(scale * side) for side in SIZE_PX)
        left, top = (int(rng.integers(n)) for n in (photograph.width - width + 1, photograph.height - height + 1))
        crop = photograph.resize(SIZE_PX, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        buffer = io.BytesIO()
        crop.save(buffer, "JPEG", quality=JPEG_QUALITY)
        writers["train" if number < count else "val"].add(Row(str(number), UNLABELLED, buffer.getvalue()))
    shards = [shard for writer in writers.values() for shard in writer.close()]
    Index(
        source="bench",
        count={"train": count, "val": num_val},
        classes=[],
        channels=3,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        shards=shards,
        hash="",
    ).write(folder)
