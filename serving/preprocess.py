"""Evaluation preprocessing: the bytes of an image file to uint8 [C, H, W]. Pillow and NumPy only.

This is the one definition: the server and the pipeline both call it, so a served feature and an evaluated one come from
the same pixels. Normalisation is not here: it is part of the exported graph.
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MIN_SIDE_PX = 8
# Above this Pillow refuses by itself, whatever the caller allows.
PILLOW_MAX_PIXELS = 178_956_970

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Reason = Literal["unsupported", "truncated", "too_large", "too_small"]


class ImageError(ValueError):
    """An image that cannot be used; the message says why and what would be accepted.

    `reason` is `unsupported` (not an image, or a kind that is not read), `truncated` (cut off or damaged), `too_large`
    (more pixels than allowed) or `too_small` (a side below MIN_SIDE_PX).
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


class Preprocessing(BaseModel):
    """What `prepare` does to an image, as written in `bundle.json`.

    `height` and `width` are in pixels. `crop_fraction` is the share of the short side (of the side that limits, for a
    target that is not square) that the centre crop keeps: 0.875 is the usual resize to 256 and crop of 224.
    """

    # An unknown key would change the pixels if it were obeyed, so it must not be skipped in silence.
    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    crop_fraction: float = Field(gt=0, le=1)
    resample: Literal["bicubic"]


def decode(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode one image file completely and turn it upright by its EXIF orientation.

    Of an animation or a document with several pages the first is taken. The checks on the header come before any pixel
    is decoded, so a small file that unfolds to a huge picture costs nothing.

    Errors: ImageError with its four reasons.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError(
            "unsupported", f"not an image of a kind that is read; expected one of {', '.join(FORMATS)}"
        ) from None
    except Image.DecompressionBombError:
        raise ImageError("too_large", f"more than {max_pixels} pixels; send a smaller picture") from None
    except Exception as error:  # Pillow's readers raise errors of many types on hostile bytes
        raise ImageError("truncated", f"the file's header is damaged ({error}); send the whole file") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            "too_large", f"{width} x {height} pixels; at most {max_pixels} in all are read, send a smaller picture"
        )
    if min(width, height) < MIN_SIDE_PX:
        raise ImageError("too_small", f"{width} x {height} pixels; each side must have at least {MIN_SIDE_PX}")
    try:
        image.load()
    except Exception as error:  # as above
        raise ImageError(
            "truncated", f"the {image.format} file is cut off or damaged ({error}); send the whole file"
        ) from error
    return _upright(image)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened file, 1 (upright) where it has none or none that can be read."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # damaged EXIF beside good pixels says nothing about them
        return 1
    return value if value in _UPRIGHT else 1


def _upright(image: Image.Image) -> Image.Image:
    method = _UPRIGHT.get(orientation(image))
    return image if method is None else image.transpose(method)


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """The image as 8-bit grey (`channels` 1) or RGB (`channels` 3).

    Transparent pixels are composited over white, as a page would show them. 16-bit grey is scaled by 1/257, so that
    65535 becomes 255. Colour profiles are not applied.

    Errors: ImageError `unsupported` for pixels whose range is not known (32-bit and float); ValueError for other
    numbers of channels.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; image files give 1 (grey) or 3 (RGB)")
    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ImageError(
            "unsupported", f"pixels of mode {image.mode} have no known range; save the picture with 8 or 16 bits"
        )
    if image.mode == mode and not image.has_transparency_data:
        return image
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    # Grey by way of RGB, so that CMYK and palettes take the same path for both.
    return image.convert("RGB").convert(mode)


def prepare(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Centre crop and antialiased bicubic resize to uint8 [C, H, W], the aspect kept.

    Crop and resize are one step, so that a very long picture is never blown up as a whole. Where nothing is to be
    cropped and the size already fits, the pixels are those of the file.

    Errors: as `to_mode`.
    """
    image = to_mode(image, preprocessing.channels)
    size = (preprocessing.width, preprocessing.height)
    # Pixels of the source for each pixel of the target, so that the crop fits into the source on both sides.
    scale = preprocessing.crop_fraction * min(image.width / size[0], image.height / size[1])
    crop_width, crop_height = scale * size[0], scale * size[1]
    left, top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
    if image.size != size or preprocessing.crop_fraction != 1:
        # Rounding may put the far edge a hair outside, which Pillow refuses.
        right, bottom = min(left + crop_width, image.width), min(top + crop_height, image.height)
        box = (max(left, 0.0), max(top, 0.0), right, bottom)
        image = image.resize(size, Image.Resampling.BICUBIC, box=box)
    # A copy: Pillow's own memory is read-only, and PyTorch warns of tensors that share such memory.
    pixels = np.array(image, dtype=np.uint8).reshape(size[1], size[0], preprocessing.channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
