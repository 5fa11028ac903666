"""Evaluation preprocessing: the bytes of an image file to uint8 [C, H, W]. Pillow and NumPy only.

This is the one definition: the server and the pipeline both call it, so a served feature and an evaluated one come from
the same pixels. Normalisation is not here: it is part of the exported graph.
"""

from __future__ import annotations

import io
import re
from typing import Literal, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MIN_SIDE_PX = 8
MAX_CHANNELS = 16
# Above this Pillow refuses by itself, whatever the caller allows.
PILLOW_MAX_PIXELS = 178_956_970

# Cameras and encoders write about ten.
_MAX_JPEG_SCANS = 100
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_MAX_NPY_SIDE_PX = 2**31
_TILE_WIDTH, _TILE_LENGTH = 322, 323

_NPY_MAGIC = b"\x93NUMPY"
_GREY_MODES = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I")
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
Picture = Image.Image | tuple[Image.Image, ...]
"""An image; where it has neither 1 nor 3 channels one grey (mode L) Pillow image for each of them, all of one size."""
_Channels = TypeVar("_Channels", tuple[Image.Image, ...], NDArray[np.uint8], NDArray[np.float32])


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

    channels: int = Field(ge=1, le=MAX_CHANNELS)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    crop_fraction: float = Field(gt=0, le=1)
    resample: Literal["bicubic"]


def decode(data: bytes, *, max_pixels: int, min_side_px: int = MIN_SIDE_PX) -> Picture:
    """Decode one image file completely and turn it upright by its EXIF orientation.

    A file is an image of FORMATS, or a NumPy file (.npy) with one array, uint8 or uint16: [C, H, W], [H, W, C] or
    [H, W]. Of an animation or a document with several pages the first is taken. The checks on the header come before
    any pixel is decoded, so a small file that unfolds to a huge picture costs nothing.

    Errors: ImageError with its four reasons.
    """
    if data.startswith(_NPY_MAGIC):
        return _decode_npy(data, max_pixels, min_side_px)
    image = _open(data, max_pixels)
    _check_size(*image.size, max_pixels, min_side_px)
    _check_labour(image, data, max_pixels)
    try:
        image.load()
    except Exception as error:  # Pillow's readers raise errors of many types on hostile bytes
        raise ImageError(
            "truncated", f"the {image.format} file is cut off or damaged ({error}); send the whole file"
        ) from error
    return upright(image)


def header_pixels(data: bytes, *, max_pixels: int) -> int:
    """Width x height by the header alone; of a NumPy file a third of its numbers. Errors: as `decode`."""
    if data.startswith(_NPY_MAGIC):
        layout = _read_layout(data)
        return -(-layout.width * layout.height * layout.channels // 3)
    width, height = _open(data, max_pixels).size
    return width * height


def header_channels(data: bytes) -> int:
    """By the header alone: 1 for a grey image file, 3 for any other, for a NumPy file as many as its array has.

    Errors: as `decode`.
    """
    if data.startswith(_NPY_MAGIC):
        return _read_layout(data).channels
    return 1 if _open(data, PILLOW_MAX_PIXELS).mode in _GREY_MODES else 3


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError(
            "unsupported",
            f"not an image of a kind that is read; expected one of {', '.join(FORMATS)}, or a NumPy file (.npy)",
        ) from None
    except Image.DecompressionBombError:
        raise ImageError("too_large", f"more than {max_pixels} pixels; send a smaller picture") from None
    except Exception as error:  # as in `decode`
        raise ImageError("truncated", f"the file's header is damaged ({error}); send the whole file") from error


def _check_size(width: int, height: int, max_pixels: int, min_side_px: int) -> None:
    if width * height > max_pixels:
        raise ImageError(
            "too_large", f"{width} x {height} pixels; at most {max_pixels} in all are read, send a smaller picture"
        )
    if min(width, height) < min_side_px:
        raise ImageError("too_small", f"{width} x {height} pixels; each side must have at least {min_side_px}")


def _check_labour(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Errors: ImageError for a file whose decoding costs far more than its pixels."""
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        tile = (tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0))
        if not all(isinstance(side, int) for side in tile) or tile[0] * tile[1] > max_pixels:
            raise ImageError("too_large", f"a tile of the TIFF file has more than {max_pixels} pixels; save it anew")
    # A scan without data takes a few bytes, and the time of a pass over the whole picture.
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > _MAX_JPEG_SCANS and _has_many_scans(data):
        raise ImageError("unsupported", f"the JPEG file has more than {_MAX_JPEG_SCANS} scans; save it anew")


def _has_many_scans(data: bytes) -> bool:
    """By the markers of the first picture in the file: what stands behind it, a film say, is not decoded."""
    num_scans, place = 0, 0
    while match := _JPEG_MARKER.search(data, place):
        marker, place = match[1][0], match.end()
        if marker == 0xD9:
            break
        num_scans += marker == 0xDA
        if num_scans > _MAX_JPEG_SCANS:
            return True
        # 01 and D0 to D8 stand alone; all others name the length of what follows.
        if marker != 0x01 and not 0xD0 <= marker <= 0xD8:
            place += int.from_bytes(data[place : place + 2])
    return False


class _Layout(NamedTuple):
    """What the header of a NumPy file says of the image behind it."""

    channels: int
    height: int
    width: int
    channel_axis: int | None  # None for [H, W]
    num_bytes: int  # of header and array


def _read_layout(data: bytes) -> _Layout:
    """Errors: ImageError for a damaged header, or an array that is no image."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read(stream)
    except Exception as error:  # the header is Python's syntax, so its reader raises errors of many types
        raise ImageError("truncated", f"the NumPy file's header is damaged ({error}); send the whole file") from error
    # Longer numbers cannot even be written into a message.
    if any(not -_MAX_NPY_SIDE_PX < side < _MAX_NPY_SIDE_PX for side in shape):
        raise ImageError("too_large", f"the NumPy file's header names a side of {_MAX_NPY_SIDE_PX} or more")
    axis = None
    if len(shape) == 3:
        axis = 2 if shape[0] > MAX_CHANNELS >= shape[2] else 0
    channels = 1 if axis is None else shape[axis]
    # An array of objects is a pickle, and would run code: refused here with all other types.
    if dtype not in (np.dtype("u1"), np.dtype("<u2"), np.dtype(">u2")) or len(shape) not in (2, 3):
        raise ImageError(
            "unsupported",
            f"the NumPy file holds {dtype.name} {list(shape[:5])}; expected one image, uint8 or uint16, as [C, H, W], "
            "[H, W, C] or [H, W]",
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise ImageError(
            "unsupported", f"the NumPy file holds {list(shape)}, {channels} channels; expected 1 to {MAX_CHANNELS}"
        )
    height, width = (side for place, side in enumerate(shape) if place != axis)
    return _Layout(channels, height, width, axis, stream.tell() + dtype.itemsize * channels * height * width)


def _decode_npy(data: bytes, max_pixels: int, min_side_px: int) -> Picture:
    layout = _read_layout(data)
    _check_size(layout.width, layout.height, max_pixels, min_side_px)
    if len(data) < layout.num_bytes:
        raise ImageError(
            "truncated",
            f"the NumPy file is cut off: {len(data)} of {layout.num_bytes} bytes are there; send the whole file",
        )
    array = np.load(io.BytesIO(data), allow_pickle=False)
    return from_array(array[None] if layout.channel_axis is None else np.moveaxis(array, layout.channel_axis, 0))


def from_array(channels: NDArray[np.uint8] | NDArray[np.uint16]) -> Picture:
    """uint8 or uint16 [C, H, W] as a picture; uint16 is scaled so that 65535 becomes 255."""
    bands = tuple(_grey(channel) for channel in channels)
    if len(bands) == 3:
        return Image.merge("RGB", bands)
    return bands[0] if len(bands) == 1 else bands


def _grey(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> Image.Image:
    """uint8 or uint16 [H, W] as a picture of mode L; 65535 becomes 255."""
    if pixels.dtype.itemsize > 1:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels))


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened file, 1 (upright) where it has none or none that can be read."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # damaged EXIF beside good pixels says nothing about them
        return 1
    return value if value in _UPRIGHT else 1


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says."""
    method = _UPRIGHT.get(orientation(image))
    return image if method is None else image.transpose(method)


@overload
def to_mode(image: Picture, channels: Literal[1, 3]) -> Image.Image: ...
@overload
def to_mode(image: Picture, channels: int) -> Picture: ...
def to_mode(image: Picture, channels: int) -> Picture:
    """The image with 8 bits and as many channels: grey (`channels` 1), RGB (3), or as it is where it has just so many.

    Grey becomes RGB and colour becomes grey; no other channels are made up or left out. Transparent pixels are
    composited over white, as a page would show them. 16-bit grey is scaled by 1/257, so that 65535 becomes 255. Colour
    profiles are not applied.

    Errors: ImageError `unsupported` for another number of channels, and for pixels whose range is not known (32-bit
    and float).
    """
    found = (1 if image.mode in _GREY_MODES else 3) if isinstance(image, Image.Image) else len(image)
    if found != channels and not {found, channels} <= {1, 3}:
        raise ImageError(
            "unsupported",
            f"the image has {found} channel{'s' if found > 1 else ''}, expected {channels}; save it as a NumPy file "
            f"(.npy), uint8 or uint16 [{channels}, height, width]",
        )
    if not isinstance(image, Image.Image):
        return image
    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I;16"):
        image = _grey(np.asarray(image))
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


def prepare(image: Picture, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Centre crop and antialiased bicubic resize to uint8 [C, H, W], the aspect kept.

    Crop and resize are one step, so that a very long picture is never blown up as a whole. Where nothing is to be
    cropped and the size already fits, the pixels are those of the file.

    Errors: as `to_mode`.
    """
    image = to_mode(image, preprocessing.channels)
    if not isinstance(image, Image.Image):
        # Channel by channel is what Pillow does with the colours of a picture, too.
        alone = preprocessing.model_copy(update={"channels": 1})
        return np.concatenate([prepare(band, alone) for band in image])
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
    return to_array(image)


def picture_size(image: Picture) -> tuple[int, int]:
    """Width and height."""
    return image.size if isinstance(image, Image.Image) else image[0].size


def to_array(image: Picture) -> NDArray[np.uint8]:
    """The pixels of what `to_mode` gives, uint8 [C, H, W]."""
    if not isinstance(image, Image.Image):
        return np.stack([np.asarray(band) for band in image])
    # A copy: Pillow's own memory is read-only, and PyTorch warns of tensors that share such memory.
    pixels = np.array(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def shown(channels: _Channels) -> _Channels:
    """Of the channels of an image those that a screen shows: the first three as red, green and blue, or one as grey."""
    return channels[:3] if len(channels) >= 3 else channels[:1]
