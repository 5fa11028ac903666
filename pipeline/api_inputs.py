"""What callers of the Python API hand in, checked: images, masks and tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from cae.errors import UserError
from cae.targets.files import AnyTarget
from pipeline.inference import read_image
from serving.preprocess import MAX_CHANNELS, ImageError, Preprocessing, from_array, prepare, upright

Array = np.ndarray | Tensor
Image = str | Path | PIL.Image.Image | Array
Images = Image | Sequence[Image]

_EXPECTED = "a path, a Pillow image, or a uint8 array or tensor [channels, height, width] of 1 to 16 channels"


def listed(images: Images) -> Sequence[Image]:
    """One image or many as a sequence; UserError for what is neither, and for none at all."""
    if isinstance(images, Array):
        given: Any = {3: [images], 4: images}.get(images.ndim)
    elif isinstance(images, str | Path | PIL.Image.Image):
        given = [images]
    else:
        given = images if isinstance(images, Sequence) else None
    if given is None:
        raise UserError(
            f"images: {describe(images)}; expected a sequence of images (a list of what a generator gives), or one: "
            f"{_EXPECTED}"
        )
    if len(given) == 0:
        raise UserError("images: there are none; give at least one")
    return given


def read(image: Image, position: int, preprocessing: Preprocessing) -> UInt8[np.ndarray, "c h w"]:
    """The pixels of an image as the model sees them; UserError names it by its path, or else by its position."""
    if isinstance(image, str | Path):
        return read_image(Path(image), preprocessing)
    try:
        if isinstance(image, PIL.Image.Image):
            return prepare(upright(image), preprocessing)
        if isinstance(image, Array):
            pixels = to_numpy(image)
            if pixels.shape == (preprocessing.channels, preprocessing.height, preprocessing.width):
                if pixels.dtype == np.uint8:
                    return pixels
            elif pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.size and len(pixels) <= MAX_CHANNELS:
                return prepare(from_array(pixels), preprocessing)
    except (ImageError, OSError) as error:
        raise UserError(f"images[{position}]: {error}") from None
    raise UserError(f"images[{position}]: {describe(image)}; expected {_EXPECTED}")


def checked_mask(mask: Array, num_images: int, grid: tuple[int, int]) -> Bool[np.ndarray, "b n"]:
    """Whether each patch is hidden, one row for each image; UserError for a mask that does not fit."""
    hidden = to_numpy(mask)
    if hidden.dtype != np.bool_ or hidden.shape not in (grid, (num_images, *grid)):
        raise UserError(
            f"mask: {describe(mask)}; expected a share between 0 and 1, or bool {list(grid)} or "
            f"{[num_images, *grid]}, True for a hidden patch"
        )
    num_patches = grid[0] * grid[1]
    hidden = np.broadcast_to(hidden.reshape(-1, num_patches), (num_images, num_patches))
    counts = hidden.sum(axis=1)
    if counts.min() != counts.max():
        raise UserError(
            f"mask: hides {counts.min()} to {counts.max()} patches; it must hide equally many in each image of a "
            "call, so make one call for each number"
        )
    if counts[0] in (0, num_patches):
        raise UserError(f"mask: hides {counts[0]} of {num_patches} patches; hide at least one, and not all")
    return hidden


def split_mask(hidden: Bool[np.ndarray, "b n"]) -> tuple[Int[np.ndarray, "b v"], Int[np.ndarray, "b m"]]:
    """Indices of the visible and of the masked patches, in order."""
    num_visible = int((~hidden[0]).sum())
    order = np.argsort(hidden, axis=1, kind="stable")
    return np.ascontiguousarray(order[:, :num_visible]), np.ascontiguousarray(order[:, num_visible:])


def checked_codes(tokens: Array, target: AnyTarget) -> np.ndarray:
    """Codes [b, h, w] or [b, h, w, k] that the target can decode; UserError where it cannot."""
    codes = to_numpy(tokens)
    grid = target.architecture.grid
    if target.predicts_tokens:
        fits = codes.ndim == 3 and codes.dtype.kind in "iu"
        expected = f"integers [b, {grid[0]}, {grid[1]}] from 0 to {target.num_outputs - 1}"
    else:
        fits = codes.ndim == 4 and codes.dtype.kind == "f" and codes.shape[3] == target.num_outputs
        expected = f"floats [b, {grid[0]}, {grid[1]}, {target.num_outputs}]"
    if not fits or codes.shape[1:3] != grid or len(codes) == 0:
        raise UserError(f"tokens: {describe(tokens)}; expected {expected}, as tokenize gives them")
    if target.predicts_tokens and (codes.min() < 0 or codes.max() >= target.num_outputs):
        raise UserError(f"tokens: from {codes.min()} to {codes.max()}; expected {expected}")
    return codes.astype(np.int64 if target.predicts_tokens else np.float32, copy=False)


def to_numpy(array: Array) -> np.ndarray:
    """The array, or the tensor's values."""
    return array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)


def describe(thing: Any) -> str:
    """Type and shape of what was handed in."""
    if isinstance(thing, Array):
        return f"{str(thing.dtype).removeprefix('torch.')} {list(thing.shape)}"
    return f"{type(thing).__name__}"
