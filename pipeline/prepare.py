"""Stage `prepare`: any source to shards, index, channel statistics and a list of what was not used.

With `prepare.shards_at` the shards go to that URL when all are written, so the disk must hold one preparation; then
only the index and the list stay.
"""

import hashlib
import io
import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cae.config import OptimizationConfig, Params
from cae.data.formats import HEAD_BYTES, image_kind
from cae.data.remote import filesystem, upload
from cae.data.shards import UNLABELLED, Index, Row, ShardInfo, ShardWriter, Split
from cae.data.sources import Reject, Source, Unusable, open_source
from cae.errors import UserError
from pipeline.duplicates import Hashes, pixel_hash, remove_duplicates
from pipeline.rejects import check_rejects, explain, write_rejects
from pipeline.workspace import Workspace, published
from serving.preprocess import ImageError, Picture, decode, header_channels, orientation, to_array, to_mode

logger = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970
SPLITS: tuple[Split, Split] = ("train", "val")
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Prepared:
    """An image ready to be stored, with the sums that mean and standard deviation come from."""

    row: Row
    num_pixels: int
    sums: np.ndarray  # [c], of pixels in 0-1
    squares: np.ndarray  # [c]
    pixel_hash: int


class Opened(NamedTuple):
    """A file as it is, and the picture in it: upright, of the wanted channels, over white."""

    data: bytes
    picture: Picture
    has_transparency: bool


class Preparation(Dataset[Prepared | Reject]):
    """Decodes and, where needed, re-encodes the images of a source; run by the workers of a DataLoader."""

    def __init__(self, source: Source, channels: int, short_side_px: int) -> None:
        self.source, self.channels, self.short_side_px = source, channels, short_side_px

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> Prepared | Reject:
        opened = self.load(position)
        if isinstance(opened, Reject):
            return opened
        image, data = self._store(opened)
        item = self.source[position]
        pixels = to_array(image).reshape(self.channels, -1) / 255
        label = UNLABELLED if item.label is None else item.label
        return Prepared(
            row=Row(item.key, label, data),
            num_pixels=pixels.shape[1],
            sums=pixels.sum(axis=1),
            squares=(pixels**2).sum(axis=1),
            pixel_hash=pixel_hash(image),
        )

    def load(self, position: int) -> Opened | Reject:
        """The image, or why it cannot be used."""
        key = self.source[position].key
        try:
            data = self.source.read(position)
        except Unusable as error:
            return Reject(key, error.reason, str(error))
        except OSError as error:
            return Reject(key, "unreadable", error.strerror or str(error))
        decoded = None
        try:
            decoded = decode(data, max_pixels=MAX_PIXELS)
            has_transparency = isinstance(decoded, Image.Image) and decoded.has_transparency_data
            return Opened(data, to_mode(decoded, self.channels), has_transparency)
        except ImageError as error:
            return explain(key, error, data, decoded is not None)

    def _store(self, opened: Opened) -> tuple[Picture, bytes]:
        """The image as training will see it, and its bytes: the file's own wherever they decode to just that."""
        if not isinstance(opened.picture, Image.Image):
            bands = tuple(self._shrink(band) for band in opened.picture)
            return bands, _encode_npy(to_array(bands))
        stored = self._shrink(opened.picture)
        if stored is not opened.picture:
            return stored, _encode(stored, "JPEG", quality=JPEG_QUALITY)
        return stored, opened.data if self._is_plain(opened) else _encode(stored, "PNG")

    def _shrink(self, picture: Image.Image) -> Image.Image:
        """The picture itself where its short side is not above the stated one."""
        shrink = self.short_side_px / min(picture.size)
        if shrink >= 1:
            return picture
        size = (max(1, round(picture.width * shrink)), max(1, round(picture.height * shrink)))
        return picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)

    def _is_plain(self, opened: Opened) -> bool:
        if opened.has_transparency or image_kind(opened.data[:HEAD_BYTES]) == "NPY":
            return False
        with Image.open(io.BytesIO(opened.data)) as original:
            plain = original.format in ("JPEG", "PNG") and orientation(original) == 1
            return plain and original.mode == ("L" if self.channels == 1 else "RGB")


def run(workspace: Workspace) -> None:
    """Write `data/prepared`; raise UserError when nothing, or too little, of the source can be used."""
    started = time.perf_counter()
    params = workspace.params
    config = params.prepare
    if config.shards_at:
        filesystem(config.shards_at)  # hours before it is needed
    source = open_source(config.source, workspace.root, workspace.downloads)
    num_workers = params.runtime.num_workers
    channels = count_channels(source, num_workers) if config.channels == "auto" else config.channels
    with published(workspace.prepared) as folder:
        splits = assign_splits(source, config.val_fraction, params.seed)
        writers = {split: ShardWriter(folder, split, config.shard_mb) for split in SPLITS}
        broken: list[Reject] = []
        hashes = Hashes()
        moments = np.zeros((2, channels))
        num_pixels = 0
        results = _in_order(Preparation(source, channels, config.short_side_px), num_workers, "prepare")
        for result, split in zip(results, splits, strict=True):
            if isinstance(result, Reject):
                broken.append(result)
                continue
            writers[split].add(result.row)
            hashes.add(split, result.pixel_hash)
            if split == "train":
                num_pixels += result.num_pixels
                moments += np.stack([result.sums, result.squares])
        train, val = (writers[split].close() for split in SPLITS)
        val, duplicates = remove_duplicates(folder, train, val, hashes.duplicates(), config.shard_mb)
        write_rejects(folder / "rejects.csv", [*broken, *duplicates, *source.strays])
        check_rejects(broken, source.strays, len(source), config, workspace.scratch)
        index = _index(config.source, source.classes, channels, moments / max(num_pixels, 1), [*train, *val])
        check_batch_sizes(params, index)
        if config.shards_at:
            index = _moved(index, folder, config.shards_at)
        index.write(folder)
    _tell(index, duplicates)
    workspace.write_metrics(
        "prepare",
        {
            "num_train": index.count["train"],
            "num_val": index.count["val"],
            "num_classes": len(index.classes),
            "num_rejected": len(broken),
            "num_duplicates": len(duplicates),
            "num_other_files": len(source.strays),
        },
        {"images_per_s": len(source) / (time.perf_counter() - started), "wall_s": time.perf_counter() - started},
    )


def public_name(source: str) -> str:
    """The source without the folders above it: a path of this machine has no place in what is published."""
    kind, _, location = source.partition(":")
    if kind == "hf" and location.count("/") == 1 and not location.startswith(("/", ".", "~")):
        return source  # the owner is part of a name on the hub
    return f"{kind}:{location.rstrip('/').rpartition('/')[2]}" if location else kind


def count_channels(source: Source, num_workers: int) -> int:
    """What `common_channels` says of the headers of all images."""
    return common_channels(_in_order(ChannelLook(source), num_workers, "look"))


def common_channels(found: Iterable[int]) -> int:
    """The number of channels that most images have, 0 standing for a file that cannot be read.

    Grey and colour make one set: 1 when every one of it is grey, else 3. Of two numbers that are as common the smaller.
    """
    counts = Counter(found)
    del counts[0]
    if counts[3]:
        counts[3] += counts.pop(1, 0)
    return min((number for number in counts), key=lambda number: (-counts[number], number), default=1)


class ChannelLook(Dataset[int]):
    """The number of channels of each image by its header, 0 where that cannot be read."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> int:
        try:
            return header_channels(self.source.read(position))
        except (Unusable, OSError, ImageError):
            # The business of the pass that decodes.
            return 0


def assign_splits(source: Source, val_fraction: float, seed: int) -> list[Split]:
    """The split of every item: the source's own, else a random one that takes the same share of every class."""
    own: list[Split] = []
    labels = np.empty(len(source), dtype=np.int32)
    for position in range(len(source)):
        item = source[position]
        labels[position] = UNLABELLED if item.label is None else item.label
        if item.split:
            own.append(item.split)
    if len(own) == len(source):
        return own
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
                f"prepare.source: {source} leaves no {split} images; expected at least 2 different usable images "
                "(and 2 of every class), or another prepare.val_fraction"
            )
    return Index(
        source=public_name(source),
        count=count,
        classes=classes,
        channels=channels,
        mean=[round(float(value), 6) for value in mean],
        # A constant channel would divide by zero.
        std=[round(max(float(value), 1e-3), 6) for value in std],
        shards=shards,
        hash=hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest(),
    )


def _moved(index: Index, folder: Path, url: str) -> Index:
    """The index after its shards went from `folder` to a folder of their own at the URL."""
    # By the hash: what an older preparation left there is still what its index names.
    index = index.model_copy(update={"shards_at": f"{url.rstrip('/')}/{index.hash[:16]}"})
    assert index.shards_at
    upload(folder, index.shards, index.shards_at)
    for shard in index.shards:
        (folder / shard.file).unlink()
    return index


def _tell(index: Index, duplicates: Sequence[Reject]) -> None:
    if duplicates:
        logger.warning("%d validation images are also in training and were taken out", len(duplicates))
    if not index.classes:
        logger.warning("%s has no labels: fine-tuning and the probes will be skipped", index.source)


def _encode_npy(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pixels, allow_pickle=False)
    return buffer.getvalue()


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
