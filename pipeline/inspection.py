"""What a source holds: everything counted, a seeded sample looked into."""

import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from cae.data.formats import HEAD_BYTES, image_kind
from cae.data.sources import Reject, Source
from pipeline.prepare import SPLITS, ChannelLook, Preparation, assign_splits, common_channels
from serving.preprocess import picture_size

SAMPLE = 2000
SEED = 0
# No picture is this large, so nothing is made smaller while it is looked at.
ANY_SIZE_PX = 1 << 30


@dataclass(frozen=True)
class Findings:
    """A source in numbers. What is said of sizes, formats and broken files holds for the sample."""

    num_images: int
    num_train: int  # that can be used, by the share of broken files in the sample
    num_val: int
    has_split: bool
    class_counts: dict[str, int]  # empty without labels
    num_strays: int
    num_sampled: int
    sizes_px: np.ndarray  # [n, 2], width and height, upright
    formats: dict[str, int]
    channels: int
    broken: list[Reject]
    decode_s: float  # for one image

    @property
    def short_side_px(self) -> int:
        """The median of the shorter sides."""
        return int(np.median(self.sizes_px.min(axis=1)))

    @property
    def grey(self) -> bool:
        return self.channels == 1

    @property
    def broken_fraction(self) -> float:
        return len(self.broken) / self.num_sampled


def sample_positions(num_images: int, most: int = SAMPLE) -> list[int]:
    """All positions, or `most` drawn ones in rising order; the same in every call."""
    if num_images <= most:
        return list(range(num_images))
    return sorted(np.random.default_rng(SEED).choice(num_images, most, replace=False).tolist())


def inspect(source: Source, val_fraction: float, most: int = SAMPLE) -> Findings:
    """Look at `most` images of the source and at the labels of all. `sizes_px` is empty when none can be read."""
    positions = sample_positions(len(source), most)
    look = ChannelLook(source)
    channels = common_channels(look[position] for position in positions)
    preparation = Preparation(source, channels, ANY_SIZE_PX)
    sizes, formats, broken = [], Counter[str](), []
    started = time.perf_counter()
    for position in positions:
        opened = preparation.load(position)
        if isinstance(opened, Reject):
            broken.append(opened)
            continue
        sizes.append(picture_size(opened.picture))
        formats[image_kind(opened.data[:HEAD_BYTES]) or "unknown"] += 1
    decode_s = (time.perf_counter() - started) / max(1, len(positions))
    splits = Counter(assign_splits(source, val_fraction, SEED))
    usable = len(sizes) / max(1, len(positions))
    train, val = (int(splits[split] * usable) for split in SPLITS)
    return Findings(
        num_images=len(source),
        num_train=train,
        num_val=val,
        has_split=source[0].split is not None if len(source) else False,
        class_counts=_class_counts(source),
        num_strays=len(source.strays),
        num_sampled=len(positions),
        sizes_px=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        formats=dict(formats.most_common()),
        channels=channels,
        broken=broken,
        decode_s=decode_s,
    )


def _class_counts(source: Source) -> dict[str, int]:
    if not source.classes:
        return {}
    counts = Counter(source[position].label for position in range(len(source)))
    return {name: counts[number] for number, name in enumerate(source.classes)}
