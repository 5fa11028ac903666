"""Which patches are hidden, and the pictures that are drawn from a reconstruction. NumPy and Pillow only."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serving.preprocess import shown

View = Literal["completion", "pasted", "side_by_side"]

_HIDDEN_GREY = 128


def random_mask(num_patches: int, mask_ratio: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the patch indices 0..num_patches-1 at random into (visible [V], masked [M]), both sorted.

    M is `mask_ratio * num_patches` rounded, but both parts get at least one patch. The same arguments give the same
    mask; NumPy does not promise that across its own versions, so keep the indices where a mask must last.

    Errors: ValueError for fewer than two patches or a ratio outside 0 to 1.
    """
    if num_patches < 2:
        raise ValueError(f"num_patches is {num_patches}; at least 2 are needed to hide one and show one")
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio is {mask_ratio}; it must lie between 0 and 1, both excluded")
    num_masked = min(max(round(mask_ratio * num_patches), 1), num_patches - 1)
    order = np.random.default_rng(seed).permutation(num_patches).astype(np.int64)
    return np.sort(order[num_masked:]), np.sort(order[:num_masked])


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
