"""Which patches are hidden, and the pictures that are drawn from a reconstruction. NumPy and Pillow only."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serving.preprocess import shown

Indices = NDArray[np.int64]
MaskKind = Literal["random", "block"]
View = Literal["completion", "pasted", "side_by_side"]

_HIDDEN_GREY = 128
# Of BEiT, as in pretraining: the smallest rectangle as a share of the grid (16 of 196), and the aspect of the flattest.
_MIN_BLOCK = 16 / 196
_MIN_ASPECT = 0.3


class Mask(NamedTuple):
    """Indices of the visible [V] and of the masked patches [M], row by row, each ascending."""

    visible: Indices
    masked: Indices


def random_mask(num_patches: int, mask_ratio: float, seed: int) -> Mask:
    """Patches hidden at random, each as likely as the next.

    As many as `mask_ratio * num_patches` rounded, but at least one is hidden and one is shown. The same arguments give
    the same mask; NumPy does not promise that across its own versions, so keep the indices where a mask must last.

    Errors: ValueError for fewer than two patches or a ratio outside 0 to 1.
    """
    num_masked = _num_masked(num_patches, mask_ratio)
    order = np.random.default_rng(seed).permutation(num_patches).astype(np.int64)
    return Mask(np.sort(order[num_masked:]), np.sort(order[:num_masked]))


def block_mask(grid: tuple[int, int], mask_ratio: float, seed: int) -> Mask:
    """Patches hidden in rectangles as in pretraining (paper, section 4.1; `cae.masking` draws the same).

    `grid` is (rows, columns). Count, seed and errors are those of `random_mask`.
    """
    rows, columns = grid
    remaining = _num_masked(rows * columns, mask_ratio)
    smallest = max(1, round(_MIN_BLOCK * rows * columns))
    rng = np.random.default_rng(seed)
    hidden = np.zeros(grid, dtype=bool)
    while remaining:
        # The last rectangles must fit what is left, however small, or the count would never be exact.
        area = rng.uniform(min(smallest, remaining), remaining)
        aspect = math.exp(rng.uniform(math.log(_MIN_ASPECT), -math.log(_MIN_ASPECT)))
        height = min(rows, max(1, round(math.sqrt(area * aspect))))
        width = min(columns, max(1, round(math.sqrt(area / aspect))))
        top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
        block = hidden[top : top + height, left : left + width]
        added = block.size - int(block.sum())
        if 0 < added <= remaining:
            block[:] = True
            remaining -= added
    return _split(hidden.reshape(-1))


def given_mask(num_patches: int, masked: Sequence[int]) -> Mask:
    """The mask that hides just these patches.

    Errors: ValueError for an index that is not there or comes twice, and where nothing or everything would be hidden.
    """
    hidden = np.zeros(num_patches, dtype=bool)
    for index in masked:
        if not 0 <= index < num_patches:
            raise ValueError(f"{index} is not a patch; they are numbered 0 to {num_patches - 1}, row by row")
        if hidden[index]:
            raise ValueError(f"{index} is there twice")
        hidden[index] = True
    return _checked(hidden)


def painted_mask(picture: Image.Image, grid: tuple[int, int]) -> Mask:
    """The mask that a grey picture (mode L) of any size paints over the cropped image: white hides, black shows.

    A patch is hidden where more than half of it is white. Errors: ValueError where nothing or everything is hidden.
    """
    rows, columns = grid
    shares = np.asarray(picture.resize((columns, rows), Image.Resampling.BOX))
    return _checked(shares.reshape(-1) > 127)


def _num_masked(num_patches: int, mask_ratio: float) -> int:
    if num_patches < 2:
        raise ValueError(f"num_patches is {num_patches}; at least 2 are needed to hide one and show one")
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio is {mask_ratio}; it must lie between 0 and 1, both excluded")
    return min(max(round(mask_ratio * num_patches), 1), num_patches - 1)


def _checked(hidden: NDArray[np.bool_]) -> Mask:
    count = int(hidden.sum())
    if not 0 < count < hidden.size:
        raise ValueError(f"{count} of {hidden.size} patches are hidden; at least one must be hidden and one shown")
    return _split(hidden)


def _split(hidden: NDArray[np.bool_]) -> Mask:
    # flatnonzero's own type is that of the platform.
    return Mask(np.flatnonzero(~hidden).astype(np.int64), np.flatnonzero(hidden).astype(np.int64))


def paste(
    image: NDArray[np.uint8], reconstruction: NDArray[np.float32], masked: NDArray[np.int64], patch_size: int
) -> NDArray[np.uint8]:
    """The image uint8 [C, H, W] with its masked patches taken from the reconstruction float32 [C, H, W] in 0-1."""
    hidden = _hidden_pixels(image, masked, patch_size)
    return np.where(hidden, _to_uint8(reconstruction), image)


def draw(
    view: View,
    image: NDArray[np.uint8],
    reconstruction: NDArray[np.float32],
    masked: NDArray[np.int64] | None,
    patch_size: int,
) -> Image.Image:
    """One view of a reconstruction float32 [C, H, W] of an image uint8 [C, H, W], at its true size.

    Grey stays grey; of other numbers of channels than 1 and 3 those that `shown` names are drawn.

    - `completion`: the reconstruction alone.
    - `pasted`: the masked patches from the reconstruction, the visible ones from the image.
    - `side_by_side`: from left to right the image, the image with its masked patches in mid-grey, and `pasted`.

    `masked` is None where nothing was hidden and every patch was predicted (the path without regressor): then `pasted`
    equals `completion`, and `side_by_side` is the image beside the completion.
    """
    completion = _to_uint8(reconstruction)
    pasted = completion if masked is None else paste(image, reconstruction, masked, patch_size)
    if view == "completion":
        return picture(completion)
    if view == "pasted":
        return picture(pasted)
    panels = [image, pasted]
    if masked is not None:
        panels.insert(1, np.where(_hidden_pixels(image, masked, patch_size), np.uint8(_HIDDEN_GREY), image))
    return picture(np.concatenate(panels, axis=2))


def png(picture: Image.Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _hidden_pixels(image: NDArray[np.uint8], masked: NDArray[np.int64], patch_size: int) -> NDArray[np.bool_]:
    """Whether each pixel lies in a masked patch, [H, W]."""
    height, width = image.shape[1:]
    hidden = np.zeros((height // patch_size) * (width // patch_size), dtype=np.bool_)
    hidden[masked] = True
    grid = hidden.reshape(height // patch_size, width // patch_size)
    return grid.repeat(patch_size, axis=0).repeat(patch_size, axis=1)


def _to_uint8(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def picture(pixels: NDArray[np.uint8]) -> Image.Image:
    """uint8 [C, H, W] as a grey or RGB picture of the channels that are `shown`."""
    channels = shown(pixels)
    return Image.fromarray(channels[0] if len(channels) == 1 else np.ascontiguousarray(channels.transpose(1, 2, 0)))
