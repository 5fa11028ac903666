"""Images of any number of channels, as NumPy files: what is read, and that hostile ones end at the header."""

from __future__ import annotations

import io
import pickle
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from serving.masks import draw, picture
from serving.preprocess import (
    MAX_CHANNELS,
    ImageError,
    Preprocessing,
    Reason,
    decode,
    header_channels,
    prepare,
    shown,
    to_array,
    to_mode,
)

MAX_PIXELS = 1_000_000
Pixels = Callable[..., NDArray[np.uint8]]


def npy(array: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def with_header(text: str, rest: bytes = b"", version: bytes = b"\1\0") -> bytes:
    """A NumPy file that says `text` of itself."""
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text.encode() + rest


def claiming(shape: str, descr: str = "|u1", rest: bytes = b"") -> bytes:
    return with_header(f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}\n", rest)


def target(channels: int, height: int = 16, width: int = 24, crop_fraction: float = 1.0) -> Preprocessing:
    return Preprocessing(channels=channels, height=height, width=width, crop_fraction=crop_fraction, resample="bicubic")


def refusal(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Reason, str]:
    with pytest.raises(ImageError) as caught:
        decode(data, max_pixels=max_pixels)
    return caught.value.reason, str(caught.value)


# Pixels


@pytest.mark.parametrize("channels", range(1, MAX_CHANNELS + 1))
def test_every_channel_comes_back_as_it_was_stored(channels: int, random_pixels: Pixels) -> None:
    pixels = random_pixels(channels, 16, 24)
    data = npy(pixels)
    np.testing.assert_array_equal(prepare(decode(data, max_pixels=MAX_PIXELS), target(channels)), pixels)
    assert header_channels(data) == channels


@pytest.mark.parametrize("channels", [1, 2, 3, 13])
def test_channels_may_stand_last_and_memory_may_be_in_fortran_order(channels: int, random_pixels: Pixels) -> None:
    pixels = random_pixels(channels, 20, 24)
    for stored in (pixels.transpose(1, 2, 0), np.asfortranarray(pixels)):
        data = npy(stored)
        assert header_channels(data) == channels
        np.testing.assert_array_equal(to_array(decode(data, max_pixels=MAX_PIXELS)), pixels)


def test_where_both_ends_could_be_channels_the_first_is_taken(random_pixels: Pixels) -> None:
    pixels = random_pixels(12, 40, 13)
    np.testing.assert_array_equal(to_array(decode(npy(pixels), max_pixels=MAX_PIXELS)), pixels)


def test_two_axes_are_a_grey_image_and_three_channels_a_colour_one(random_pixels: Pixels) -> None:
    grey = decode(npy(random_pixels(16, 24)), max_pixels=MAX_PIXELS)
    colour = decode(npy(random_pixels(3, 16, 24)), max_pixels=MAX_PIXELS)
    assert isinstance(grey, Image.Image)
    assert isinstance(colour, Image.Image)
    assert (grey.mode, colour.mode) == ("L", "RGB")
    assert prepare(grey, target(3)).shape == (3, 16, 24)
    assert prepare(colour, target(1)).shape == (1, 16, 24)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 4])
def test_16_bits_are_scaled_and_not_cut(channels: int, order: str) -> None:
    values = np.array([0, 128, 129, 257, 32896, 65406, 65407, 65535], dtype=f"{order}u2")
    image = decode(npy(np.tile(values, (channels, 8, 1))), max_pixels=MAX_PIXELS)
    got = to_array(to_mode(image, channels))
    assert got.dtype == np.uint8
    assert (got == np.array([0, 0, 1, 1, 128, 254, 255, 255])).all()


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(8, 90), st.integers(8, 90)),
    side=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    crop_fraction=st.floats(0.05, 1),
)
def test_channels_are_cropped_and_resized_as_those_of_a_colour_picture(
    size: tuple[int, int], side: tuple[int, int], crop_fraction: float
) -> None:
    pixels = np.random.default_rng(size).integers(0, 256, (5, *size), dtype=np.uint8)
    five = prepare(decode(npy(pixels), max_pixels=MAX_PIXELS), target(5, *side, crop_fraction))
    assert five.flags.c_contiguous
    for first in range(3):
        colour = Image.fromarray(np.ascontiguousarray(pixels[first : first + 3].transpose(1, 2, 0)))
        np.testing.assert_array_equal(prepare(colour, target(3, *side, crop_fraction)), five[first : first + 3])


@pytest.mark.parametrize("wanted", [1, 3, 2, 14])
def test_channels_are_never_made_up_or_left_out(wanted: int, random_pixels: Pixels) -> None:
    image = decode(npy(random_pixels(13, 16, 24)), max_pixels=MAX_PIXELS)
    with pytest.raises(
        ImageError, match=rf"the image has 13 channels, expected {wanted}; .* \[{wanted}, height"
    ) as caught:
        prepare(image, target(wanted))
    assert caught.value.reason == "unsupported"


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("I;16", 1), ("RGB", 3), ("RGBA", 3), ("P", 3)])
def test_a_picture_does_not_fit_a_model_of_more_channels(mode: str, channels: int) -> None:
    with pytest.raises(ImageError, match=f"the image has {channels} channels?, expected 4"):
        to_mode(Image.new(mode, (16, 16)), 4)


# Refusals


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "uint32", "int64", "float16", "float32", "float64", "bool", "c8", "U3"]
)
def test_other_types_than_8_and_16_bits_are_named(dtype: str) -> None:
    array = np.zeros((4, 16, 16), dtype)
    reason, message = refusal(npy(array))
    assert reason == "unsupported"
    assert f"holds {array.dtype.name} [4, 16, 16]; expected one image, uint8 or uint16" in message


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was opened",)


def test_an_array_of_objects_is_refused_and_its_pickle_never_opened() -> None:
    objects = np.full((4, 16, 16), None, dtype=object)
    objects[0, 0, 0] = Harmful()
    data = npy(objects, allow_pickle=True)
    with pytest.raises(pytest.fail.Exception):
        np.load(io.BytesIO(data), allow_pickle=True)
    assert refusal(data)[0] == "unsupported"
    assert refusal(pickle.dumps(Harmful()))[0] == "unsupported"
    structured = np.zeros((16, 16), dtype=[("a", "u1"), ("b", "O")])
    assert refusal(npy(structured, allow_pickle=True))[0] == "unsupported"


@pytest.mark.parametrize("shape", [(), (256,), (2, 3, 16, 16), (17, 20, 17), (0, 16, 16), (20, 20, 0)])
def test_what_is_not_one_image_is_unsupported(shape: tuple[int, ...]) -> None:
    reason, message = refusal(npy(np.zeros(shape, np.uint8)))
    assert reason == "unsupported"
    assert str(list(shape)) in message


@pytest.mark.parametrize("shape", [(3, 7, 100), (13, 100, 7), (7, 7), (100, 0), (13, 0, 16), (8, 9, 3)])
def test_a_side_below_the_minimum_is_too_small(shape: tuple[int, ...]) -> None:
    assert refusal(npy(np.zeros(shape, np.uint8)))[0] == "too_small"


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.99])
def test_a_cut_off_file_is_truncated(share: float, random_pixels: Pixels) -> None:
    data = npy(random_pixels(13, 16, 16))
    assert refusal(data[: int(share * len(data))])[0] == "truncated"
    assert "bytes are there" in refusal(data[:-1])[1]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (claiming("(16, 60000, 60000)"), "too_large"),
        (claiming("(16, 1000, 1000)", "<u2"), "truncated"),
        (claiming("(10**9, 10**9)"), "truncated"),
        (claiming(f"({'9' * 40}, {'9' * 40})"), "too_large"),
        (claiming("(4, -16, -16)"), "too_small"),
        (claiming("(-1, 16, 16)"), "unsupported"),
        (claiming("(16, 16)", "|O", b"x" * 256), "unsupported"),
        (claiming("(16, 16)", "no type"), "truncated"),
        (with_header("{'descr': '|u1'}"), "truncated"),
        (with_header("__import__('os').abort()"), "truncated"),
        (with_header("(" * 5000), "truncated"),
        (with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (16, 16)}", version=b"\3\0"), "truncated"),
        (with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (16, 16)}", version=b"\7\7"), "truncated"),
        (with_header(" " * 60_000), "truncated"),
        (b"\x93NUMPY", "truncated"),
    ],
)
def test_a_header_is_believed_in_nothing(data: bytes, reason: Reason) -> None:
    tracemalloc.start()
    assert refusal(data)[0] == reason
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2_000_000


def test_the_pixel_cap_counts_pixels_and_not_channels() -> None:
    data = npy(np.zeros((13, 10, 20), np.uint8))
    decode(data, max_pixels=200)
    assert refusal(data, max_pixels=199)[0] == "too_large"


WHOLE = npy(np.random.default_rng(0).integers(0, 256, (5, 16, 16), dtype=np.uint8))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(6, 140), st.integers(0, 7)), min_size=1, max_size=8))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flipped_bits_of_the_header_only_ever_raise_image_error(flips: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for place, bit in flips:
        data[place] ^= 1 << bit
    try:
        got = prepare(decode(bytes(data), max_pixels=MAX_PIXELS), target(5))
    except ImageError:
        return
    assert got.shape == (5, 16, 24)


# What is drawn of them


@pytest.mark.parametrize(("channels", "seen"), [(1, 1), (2, 1), (3, 3), (4, 3), (13, 3)])
def test_three_channels_are_drawn_as_colours_and_of_fewer_one_as_grey(
    channels: int, seen: int, random_pixels: Pixels
) -> None:
    pixels = random_pixels(channels, 16, 24)
    np.testing.assert_array_equal(shown(pixels), pixels[:seen])
    drawn = to_array(picture(pixels))
    np.testing.assert_array_equal(drawn, pixels[:seen])
    reconstruction = (pixels / np.float32(255)).astype(np.float32)
    side_by_side = to_array(draw("side_by_side", pixels, reconstruction, np.array([1]), 8))
    assert side_by_side.shape == (seen, 16, 72)
    np.testing.assert_array_equal(side_by_side[..., :24], pixels[:seen])
    np.testing.assert_array_equal(side_by_side[..., 48:], pixels[:seen])
    assert (side_by_side[:, :8, 24 + 8 : 24 + 16] == 128).all()
