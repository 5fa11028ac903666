"""Stage `prepare`: any source to shards, index, channel statistics and a list of what was not used."""

import csv
import hashlib
import io
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cae.config import OptimizationConfig, Params, PrepareConfig
from cae.data.shards import UNLABELLED, Index, Row, ShardInfo, ShardWriter, Split
from cae.data.sources import Source, open_source
from cae.errors import UserError
from pipeline.workspace import Workspace
from serving.preprocess import ImageError, decode, to_mode

logger = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970
GREY_MODES = ("1", "L", "I;16", "I;16B", "I;16L", "I")
SPLITS: tuple[Split, Split] = ("train", "val")
SHOWN_REJECTS = 5
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Prepared:
    """An image ready to be stored, with the sums that mean and standard deviation come from."""

    row: Row
    split: Split | None
    num_pixels: int
    sums: np.ndarray  # [c], of pixels in 0-1
    squares: np.ndarray  # [c]


@dataclass(frozen=True)
class Reject:
    """A file that is not used, and why."""

    key: str
    reason: str


class Preparation(Dataset[Prepared | Reject]):
    """Decodes and, where needed, re-encodes the images of a source; run by the workers of a DataLoader."""

    def __init__(self, source: Source, channels: int, short_side_px: int) -> None:
        self.source, self.channels, self.short_side_px = source, channels, short_side_px

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> Prepared | Reject:
        item = self.source[position]
        try:
            data = self.source.read(position)
            image = decode(data, max_pixels=MAX_PIXELS)
            image, data = self._store(image, data)
        except (ImageError, OSError) as error:
            return Reject(item.key, str(error))
        pixels = np.asarray(image, dtype=np.float64).reshape(-1, self.channels) / 255
        label = UNLABELLED if item.label is None else item.label
        return Prepared(
            Row(item.key, label, data), item.split, len(pixels), pixels.sum(axis=0), (pixels**2).sum(axis=0)
        )

    def _store(self, image: Image.Image, data: bytes) -> tuple[Image.Image, bytes]:
        """The image as training will see it, and its bytes: the file's own wherever they decode to just that."""
        with Image.open(io.BytesIO(data)) as original:
            plain = original.format in ("JPEG", "PNG") and original.getexif().get(0x0112, 1) == 1
            plain = plain and original.mode == ("L" if self.channels == 1 else "RGB")
        stored = to_mode(image, self.channels)
        plain = plain and not image.has_transparency_data
        shrink = self.short_side_px / min(stored.size)
        if shrink < 1:
            size = (max(1, round(stored.width * shrink)), max(1, round(stored.height * shrink)))
            stored = stored.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
            return stored, _encode(stored, "JPEG", quality=JPEG_QUALITY)
        return stored, data if plain else _encode(stored, "PNG")


def run(workspace: Workspace) -> None:
    """Write `data/prepared`; raise UserError when nothing, or too little, of the source can be used."""
    started = time.perf_counter()
    params = workspace.params
    config = params.prepare
    source = open_source(config.source, workspace.root, workspace.downloads)
    num_workers = params.runtime.num_workers
    channels = count_channels(source, num_workers) if config.channels == "auto" else config.channels
    with workspace.publish(workspace.prepared) as folder:
        splits = assign_splits(source, config.val_fraction, params.seed)
        writers = {split: ShardWriter(folder, split, config.shard_mb) for split in SPLITS}
        rejects: list[Reject] = []
        moments = np.zeros((2, channels))
        num_pixels = 0
        results = _in_order(Preparation(source, channels, config.short_side_px), num_workers, "prepare")
        for result, split in zip(results, splits, strict=True):
            if isinstance(result, Reject):
                rejects.append(result)
                continue
            writers[split].add(result.row)
            if split == "train":
                num_pixels += result.num_pixels
                moments += np.stack([result.sums, result.squares])
        _write_rejects(folder / "rejects.csv", rejects)
        _check_rejects(rejects, len(source), config, workspace)
        shards = [shard for split in SPLITS for shard in writers[split].close()]
        index = _index(public_name(config.source), source.classes, channels, moments / max(num_pixels, 1), shards)
        check_batch_sizes(params, index)
        index.write(folder)
    _check_labels(index)
    workspace.write_metrics(
        "prepare",
        {
            "num_train": index.count["train"],
            "num_val": index.count["val"],
            "num_classes": len(index.classes),
            "num_rejected": len(rejects),
        },
        {"images_per_s": len(source) / (time.perf_counter() - started), "wall_s": time.perf_counter() - started},
    )


def public_name(source: str) -> str:
    """The source without the folders above it: a path of this machine has no place in what is published."""
    kind, _, location = source.partition(":")
    return f"{kind}:{Path(location).name}" if location else kind


def count_channels(source: Source, num_workers: int) -> int:
    """1 when every image is grey by its header, else 3."""
    return 1 if all(_in_order(_GreyCheck(source), num_workers, "look")) else 3


class _GreyCheck(Dataset[bool]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> bool:
        try:
            with Image.open(io.BytesIO(self.source.read(position))) as image:
                return image.mode in GREY_MODES
        except Exception:
            # A damaged file is the business of the pass that decodes; Pillow raises errors of many types.
            return True


def assign_splits(source: Source, val_fraction: float, seed: int) -> list[Split]:
    """The split of every item: the source's own, else a random one that takes the same share of every class."""
    items = [source[position] for position in range(len(source))]
    if all(item.split for item in items):
        return [item.split for item in items if item.split]
    labels = np.array([UNLABELLED if item.label is None else item.label for item in items])
    rng = np.random.default_rng(seed)
    splits: list[Split] = ["train"] * len(labels)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        # At least one stays for training, and a class of two or more is seen in validation.
        num_val = min(max(round(val_fraction * len(members)), 1), len(members) - 1)
        for position in members[:num_val]:
            splits[position] = "val"
    return splits


def check_batch_sizes(params: Params, index: Index) -> None:
    """Raise UserError where a later stage could not fill one batch, before hours of the stages between."""
    num_train = index.count["train"]
    sections: dict[str, OptimizationConfig] = {"pretrain": params.pretrain}
    if params.tokenizer.kind == "dvae":
        sections["tokenizer"] = params.tokenizer
    if index.classes:
        sections |= {"finetune": params.finetune, "probe.linear": params.probe.linear}
        sections["probe.attentive"] = params.probe.attentive
    wrong = [f"{name}.batch_size: {s.batch_size}" for name, s in sections.items() if s.batch_size > num_train]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: more than the {num_train} training images; set at most {num_train}")


def _in_order(dataset: Dataset[Any], num_workers: int, name: str) -> Iterable[Any]:
    # The loader keeps the order whatever the number of workers, and bounds what waits in memory.
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
    return tqdm(loader, desc=name, unit="image", disable=None)


def _index(source: str, classes: list[str], channels: int, moments: np.ndarray, shards: list[ShardInfo]) -> Index:
    mean = moments[0]
    std = np.sqrt(np.maximum(moments[1] - mean**2, 0))
    count: dict[Split, int] = {split: sum(s.count for s in shards if s.split == split) for split in SPLITS}
    for split in SPLITS:
        if not count[split]:
            raise UserError(
                f"prepare.source: {source} leaves no {split} images; expected at least 2 usable images "
                "(and 2 of every class), or another prepare.val_fraction"
            )
    return Index(
        source=source,
        count=count,
        classes=classes,
        channels=channels,
        mean=[round(float(value), 6) for value in mean],
        # A constant channel would divide by zero.
        std=[round(max(float(value), 1e-3), 6) for value in std],
        shards=shards,
        hash=hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest(),
    )


def _write_rejects(path: Path, rejects: list[Reject]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "reason"])
        writer.writerows((reject.key, reject.reason) for reject in rejects)


def _check_rejects(rejects: list[Reject], total: int, config: PrepareConfig, workspace: Workspace) -> None:
    for reject in rejects[:SHOWN_REJECTS]:
        logger.warning("%s is not used: %s", reject.key, reject.reason)
    if len(rejects) > config.max_reject_fraction * total or len(rejects) == total:
        workspace.scratch.mkdir(exist_ok=True)
        path = workspace.scratch / "rejects.csv"
        _write_rejects(path, rejects)
        raise UserError(
            f"prepare.source: {len(rejects)} of {total} files of {config.source} cannot be used, more than "
            f"prepare.max_reject_fraction {config.max_reject_fraction}; {path} names each with its reason. "
            "Mend or remove them, or raise the fraction"
        )


def _check_labels(index: Index) -> None:
    if not index.classes:
        logger.warning("%s has no labels: fine-tuning and the probes will be skipped", index.source)


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
