"""Decoding and evaluation preprocessing."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from serving.preprocess import FORMATS, ImageError, Preprocessing, Reason, decode, prepare, to_mode

MAX_PIXELS = 1_000_000

# Pillow warns of the hostile files below before it refuses them.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
Pixels = Callable[..., NDArray[np.uint8]]


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(format: str) -> bytes:
    """A smooth 48 x 40 picture, so that JPEG stays close to it."""
    rows, columns = np.mgrid[:40, :48]
    return encoded(Image.fromarray(np.stack([rows * 6, columns * 5, rows + columns], 2).astype(np.uint8)), format)


def target(height: int, width: int, channels: int = 3, crop_fraction: float = 1.0) -> Preprocessing:
    return Preprocessing(channels=channels, height=height, width=width, crop_fraction=crop_fraction, resample="bicubic")


def grey_of(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """ITU-R 601 luma."""
    grey: NDArray[np.float64] = rgb @ np.array([0.299, 0.587, 0.114])
    return grey


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


# Pixels


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_pixels_of_the_file(format: str) -> None:
    rows, columns = np.mgrid[:40, :48]
    expected = np.stack([rows * 6, columns * 5, rows + columns]).astype(np.uint8)
    image = decode(photo(format), max_pixels=MAX_PIXELS)
    got = prepare(image, target(40, 48))
    tolerance = 12 if format in ("JPEG", "WEBP") else 0
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    np.testing.assert_allclose(got.astype(int), expected.astype(int), atol=tolerance)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("I;16", "PNG"),
        ("I;16", "TIFF"),
        ("I;16B", "TIFF"),
        ("CMYK", "TIFF"),
        ("1", "BMP"),
        ("P", "BMP"),
    ],
)
def test_every_mode_becomes_8_bit_grey_or_rgb(mode: str, format: str, channels: int, random_pixels: Pixels) -> None:
    rgb = random_pixels(16, 16, 3)
    alpha = random_pixels(16, 16)
    grey = rgb[..., 0]
    options: dict[str, Any] = {"lossless": True, "exact": True} if format == "WEBP" else {}
    if mode == "1":
        image = Image.fromarray(grey > 127)
        seen = np.repeat((grey > 127)[..., None] * 255.0, 3, axis=2)
    elif mode in ("L", "LA"):
        image = Image.fromarray(grey)
        seen = np.repeat(grey[..., None].astype(float), 3, axis=2)
    elif mode.startswith("I;16"):
        deep = grey.astype(np.uint16) * 257
        image = Image.frombytes(mode, (16, 16), deep.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
        seen = np.repeat(grey[..., None].astype(float), 3, axis=2)
    elif mode == "P":
        palette = random_pixels(256, 3)
        image = Image.frombytes("P", (16, 16), grey.tobytes())
        image.putpalette(palette.tobytes())
        seen = palette[grey].astype(float)
    elif mode == "CMYK":
        ink = random_pixels(16, 16, 4)
        image = Image.frombytes("CMYK", (16, 16), ink.tobytes())
        seen = (255.0 - ink[..., :3]) * (255.0 - ink[..., 3:]) / 255
    else:
        image = Image.fromarray(rgb)
        seen = rgb.astype(float)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(alpha))
        opacity = alpha[..., None] / 255
        seen = seen * opacity + 255 * (1 - opacity)
    got = prepare(decode(encoded(image, format, **options), max_pixels=MAX_PIXELS), target(16, 16, channels))
    expected = grey_of(seen)[None] if channels == 1 else seen.transpose(2, 0, 1)
    assert got.shape == (channels, 16, 16)
    np.testing.assert_allclose(got, expected, atol=1.5)


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_colour_that_a_png_declares_transparent_is_white(mode: str) -> None:
    image = Image.new(mode, (16, 16), 0 if mode != "RGB" else (0, 0, 0))
    if mode == "P":
        image.putpalette([0, 0, 0] * 256)
    data = encoded(image, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert prepare(decode(data, max_pixels=MAX_PIXELS), target(16, 16)).min() == 255


def test_16_bit_grey_is_scaled_not_cut() -> None:
    deep = np.array([0, 128, 129, 257, 32896, 65406, 65407, 65535], dtype=np.uint16)
    image = to_mode(Image.fromarray(np.tile(deep, (8, 1))), 1)
    assert np.asarray(image)[0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]


@pytest.mark.parametrize(("dtype", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_pixels_of_unknown_range_are_refused(dtype: type, mode: str) -> None:
    image = decode(encoded(Image.fromarray(np.ones((16, 16), dtype)), "TIFF"), max_pixels=MAX_PIXELS)
    with pytest.raises(ImageError, match=f"mode {mode} .*8 or 16 bits") as caught:
        to_mode(image, 3)
    assert caught.value.reason == "unsupported"


def test_lab_pixels_become_rgb() -> None:
    image = decode(encoded(Image.new("LAB", (16, 16), (255, 128, 128)), "TIFF"), max_pixels=MAX_PIXELS)
    # White, to within the rounding of the conversion.
    assert np.asarray(to_mode(image, 3)).min() >= 254


def test_an_unknown_preprocessing_key_is_refused() -> None:
    with pytest.raises(ValueError, match="gamma"):
        Preprocessing.model_validate(target(8, 8).model_dump() | {"gamma": 2.2})


# Orientation

UPRIGHT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_once(format: str, orientation: int, random_pixels: Pixels) -> None:
    stored = random_pixels(16, 24, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    image = decode(encoded(Image.fromarray(stored), format, exif=exif, **options), max_pixels=MAX_PIXELS)
    np.testing.assert_array_equal(np.asarray(image), UPRIGHT[orientation](stored))


def test_exif_orientation_of_a_jpeg_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = decode(encoded(Image.open(io.BytesIO(photo("JPEG"))), "JPEG", exif=exif), max_pixels=MAX_PIXELS)
    assert upright.size == (40, 48)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"", b"XX\0*\0\0\0\x08", b"MM\0*\0\0", b"II*\0\x08\0\0\0" + b"\xff" * 40])
def test_damaged_exif_does_not_cost_the_picture(exif: bytes, format: str) -> None:
    source = Image.open(io.BytesIO(photo("PNG")))
    assert decode(encoded(source, format, exif=b"Exif\0\0" + exif), max_pixels=MAX_PIXELS).size == (48, 40)


# Crop and resize


def test_a_fitting_image_is_returned_untouched(random_pixels: Pixels) -> None:
    pixels = random_pixels(28, 20, 3)
    np.testing.assert_array_equal(prepare(Image.fromarray(pixels), target(28, 20)), pixels.transpose(2, 0, 1))


def test_the_centre_is_cropped(random_pixels: Pixels) -> None:
    pixels = random_pixels(64, 96, 3)
    got = prepare(Image.fromarray(pixels), target(56, 56, crop_fraction=0.875))
    np.testing.assert_array_equal(got, pixels[4:60, 20:76].transpose(2, 0, 1))


def test_crop_and_resize_in_one_equal_resize_then_crop(random_pixels: Pixels) -> None:
    image = Image.fromarray(random_pixels(128, 128, 3))
    whole = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))[4:60, 4:60]
    got = prepare(image, target(56, 56, crop_fraction=0.875))
    np.testing.assert_allclose(got.transpose(1, 2, 0).astype(int), whole.astype(int), atol=1)


def test_shrinking_is_antialiased() -> None:
    checks = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    got = prepare(Image.fromarray(checks), target(32, 32, channels=1))
    assert np.abs(got[0, 2:-2, 2:-2].astype(int) - 128).max() <= 2


@pytest.mark.parametrize(("size", "box"), [((64, 64), (16, 0, 48, 64)), ((128, 32), (56, 0, 72, 32))])
def test_a_target_that_is_not_square_is_covered(
    size: tuple[int, int], box: tuple[int, int, int, int], random_pixels: Pixels
) -> None:
    image = Image.fromarray(random_pixels(size[1], size[0], 3))
    expected = np.asarray(image.resize((16, 32), Image.Resampling.BICUBIC, box=box))
    np.testing.assert_array_equal(prepare(image, target(32, 16)), expected.transpose(2, 0, 1))


def test_a_very_long_picture_is_not_blown_up(random_pixels: Pixels) -> None:
    image = Image.fromarray(random_pixels(8, 100_000))
    centre = image.crop((100_000 // 2 - 4, 0, 100_000 // 2 + 4, 8))
    got = prepare(image, target(224, 224, channels=1))
    # The interior does not depend on what lies beside the crop.
    expected = np.asarray(centre.resize((224, 224), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(got[0, :, 60:164], expected[:, 60:164])


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(8, 90),
    height=st.integers(8, 90),
    side=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    crop_fraction=st.floats(0.05, 1),
)
def test_any_size_fits_any_target(width: int, height: int, side: tuple[int, int], crop_fraction: float) -> None:
    got = prepare(Image.new("L", (width, height), 77), target(*side, channels=3, crop_fraction=crop_fraction))
    assert got.shape == (3, *side)
    assert (got == 77).all()


# Refusals


def reason(data: bytes, max_pixels: int = MAX_PIXELS) -> Reason:
    try:
        decode(data, max_pixels=max_pixels)
    except ImageError as error:
        return error.reason
    pytest.fail("the image was accepted")


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"not an image", b"<svg/>", b"%PDF-1.7", b"\xff\xd8", b"RIFF\0\0\0\0WEBP"]
)
def test_other_bytes_are_unsupported(data: bytes) -> None:
    assert reason(data) == "unsupported"


@pytest.mark.parametrize("format", ["GIF", "PPM", "ICO", "TGA"])
def test_formats_outside_the_list_are_unsupported(format: str) -> None:
    assert reason(encoded(Image.new("RGB", (16, 16)), format)) == "unsupported"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("format", FORMATS)
def test_a_cut_off_file_is_refused(format: str, share: float, random_pixels: Pixels) -> None:
    data = encoded(Image.fromarray(random_pixels(64, 64, 3)), format)
    # WebP and TIFF keep what says that they are images at the end or check their length first.
    assert reason(data[: int(len(data) * share)]) in ("truncated", "unsupported")


def test_a_cut_off_jpeg_is_named_as_cut_off(random_pixels: Pixels) -> None:
    data = encoded(Image.fromarray(random_pixels(64, 64, 3)), "JPEG")
    assert reason(data[: len(data) // 2]) == "truncated"


@pytest.mark.parametrize("side", [1001, 10_000, 60_000])
def test_the_pixel_cap_holds_before_anything_is_decoded(side: int) -> None:
    # These files have no pixels at all: whoever tried to decode would call them damaged.
    assert reason(png_header(side, side)) == "too_large"
    assert reason(png_header(900, 900)) == "truncated"


def test_the_pixel_cap_is_inclusive() -> None:
    data = encoded(Image.new("L", (20, 10)), "PNG")
    assert decode(data, max_pixels=200).size == (20, 10)
    assert reason(data, max_pixels=199) == "too_large"


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7)])
def test_a_side_below_the_minimum_is_too_small(size: tuple[int, int]) -> None:
    assert reason(encoded(Image.new("L", size), "PNG")) == "too_small"


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode(data, max_pixels=MAX_PIXELS).convert("RGB").getpixel((8, 8)) == (255, 0, 0)


def survives(data: bytes) -> None:
    """Decoding ends in pixels of the right shape or in an ImageError, never in anything else."""
    try:
        got = prepare(decode(data, max_pixels=MAX_PIXELS), target(16, 16))
    except ImageError:
        return
    assert got.shape == (3, 16, 16)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"\x93NUMPY\1\0"]),
    st.binary(max_size=400),
)
def test_random_bytes_only_ever_raise_image_error(start: bytes, rest: bytes) -> None:
    survives(start + rest)


PHOTOS = {format: photo(format) for format in FORMATS}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(FORMATS), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 7)), min_size=1, max_size=8))
def test_flipped_bits_only_ever_raise_image_error(format: str, flips: list[tuple[float, int]]) -> None:
    data = bytearray(PHOTOS[format])
    for place, bit in flips:
        # Squared, so that most flips hit the header.
        data[int(place * place * len(data))] ^= 1 << bit
    survives(bytes(data))
