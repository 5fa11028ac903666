"""What happens to an image on its way into training. Everything random comes from one generator per sample.

The crop is drawn in NumPy and done by one Pillow call: seeding and restoring torch's generator for every sample, which
the torchvision transforms would need, costs four times as much as the crop itself on small images.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from timm.data import rand_augment_transform

from cae.config import CropConfig, FinetuneConfig
from cae.data.shards import Picture
from cae.errors import UserError
from cae.masking import MaskSampler

ASPECT_RATIOS = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10

EvalTransform = Callable[[Picture], UInt8[np.ndarray, "c h w"]]
"""Evaluation preprocessing; the pipeline passes the server's, so that the two cannot differ."""


def random_crop_box(
    rng: np.random.Generator, size: tuple[int, int], scale: tuple[float, float], target_aspect: float = 1.0
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a crop of `size` (width, height) that keeps a share of the area within `scale`.

    The aspect ratio is 3/4 to 4/3 of `target_aspect` (width by height of what it is resized to); after ten draws that
    do not fit, the largest centred crop within those ratios.
    """
    width, height = size
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        aspect = target_aspect * math.exp(rng.uniform(math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(rng.integers(width - crop_width + 1))
            top = int(rng.integers(height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width = min(width, max(1, round(height * target_aspect * ASPECT_RATIOS[1])))
    crop_height = min(height, max(1, round(width / (target_aspect * ASPECT_RATIOS[0]))))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


@dataclass(frozen=True)
class CropFlip:
    """Random resized crop, bicubic, and a horizontal flip."""

    size_px: tuple[int, int]  # height, width
    config: CropConfig

    def __call__(self, image: Picture, rng: np.random.Generator) -> Picture:
        return self.views(image, rng, [self.size_px])[0]

    def views(self, image: Picture, rng: np.random.Generator, sizes_px: list[tuple[int, int]]) -> list[Picture]:
        """The same crop and flip once for each size (height, width), each from the original."""
        height, width = self.size_px
        size = image.size if isinstance(image, Image.Image) else image[0].size
        box = random_crop_box(rng, size, self.config.crop_scale, width / height)
        flips = rng.random() < self.config.flip
        return [each_band(partial(_view, box=box, size_px=size_px, flips=flips), image) for size_px in sizes_px]


def _view(image: Image.Image, box: tuple[int, int, int, int], size_px: tuple[int, int], flips: bool) -> Image.Image:
    height, width = size_px
    if box != (0, 0, width, height) or image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flips else image


@dataclass(frozen=True)
class PretrainTransform:
    """One crop and one mask of an image; a second view of the crop where the target reads another size than the model.

    `target_px` (height, width) is that size, None where model and target read the same view.
    """

    crop: CropFlip
    masks: MaskSampler
    target_px: tuple[int, int] | None = None

    def __call__(self, image: Picture, rng: np.random.Generator) -> dict[str, Any]:
        visible, masked = self.masks(rng)
        sizes_px = {"images": self.crop.size_px} | ({"target_images": self.target_px} if self.target_px else {})
        views = self.crop.views(image, rng, list(sizes_px.values()))
        arrays = {name: to_array(view) for name, view in zip(sizes_px, views, strict=True)}
        return {**arrays, "visible": visible, "masked": masked}


@dataclass(frozen=True)
class CropTransform:
    """One view of an image, for the tokenizer and for heads on a frozen encoder."""

    crop: CropFlip

    def __call__(self, image: Picture, rng: np.random.Generator) -> dict[str, Any]:
        return {"images": to_array(self.crop(image, rng))}


class FinetuneTransform:
    """Crop, flip and RandAugment, the last by timm under the sample's own seed; erasing and mixing work on batches."""

    def __init__(self, size_px: tuple[int, int], config: FinetuneConfig, mean: list[float]) -> None:
        self.crop = CropFlip(size_px, config)
        fill = tuple(round(255 * value) for value in mean)
        self.augment: Callable[[Image.Image], Image.Image] | None = None
        if config.rand_augment:
            if len(mean) not in (1, 3):
                raise UserError(
                    f"finetune.rand_augment: {config.rand_augment} changes grey and colour images, and these have "
                    f"{len(mean)} channels; set it to null"
                )
            hparams = {"translate_const": int(min(size_px) * 0.45), "img_mean": fill if len(fill) > 1 else fill[0]}
            self.augment = rand_augment_transform(config.rand_augment, hparams)

    def __call__(self, image: Picture, rng: np.random.Generator) -> dict[str, Any]:
        image = self.crop(image, rng)
        if self.augment and isinstance(image, Image.Image):
            with seeded(int(rng.integers(2**32))):
                image = self.augment(image)
        return {"images": to_array(image)}


def each_band(change: Callable[[Image.Image], Image.Image], image: Picture) -> Picture:
    """The change done to a picture, or to every channel of an image that is one picture a channel."""
    return change(image) if isinstance(image, Image.Image) else tuple(change(band) for band in image)


def to_array(image: Picture) -> UInt8[np.ndarray, "c h w"]:
    """Channels first, a copy that PyTorch may own."""
    if not isinstance(image, Image.Image):
        return np.stack([np.asarray(band) for band in image])
    array = np.array(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's global generators seeded inside and as before outside, for libraries."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        # Of the CPU alone: torch.manual_seed would also seed the GPUs, whose state is not restored here.
        torch.random.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
