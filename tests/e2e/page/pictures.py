"""Pictures for the page, and what the tiny bundle makes of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serving.masks import paste
from tests.serving.tiny_bundle import expected_reconstruction

PATCH = 8
Pixels = NDArray[np.uint8]


def pixels_of(seed: int, channels: int = 3, size: tuple[int, int] = (32, 32)) -> Pixels:
    """Random patches with some noise, uint8 [C, H, W]: of the bundle's size, so that nothing is resized."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(30, 226, (channels, size[0] // PATCH, size[1] // PATCH))
    grown = patches.repeat(PATCH, axis=1).repeat(PATCH, axis=2)
    noisy: Pixels = (grown + rng.integers(-20, 21, grown.shape)).astype(np.uint8)
    return noisy


def encoded(pixels: Pixels, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format)
    return buffer.getvalue()


def saved(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def expected_pasted(image: Pixels, masked: Sequence[int]) -> Pixels:
    hidden = np.array(masked)
    visible = np.setdiff1d(np.arange(image.shape[1] * image.shape[2] // PATCH**2), hidden)
    completed = expected_reconstruction(image[None], visible[None], hidden[None])[0]
    return paste(image, completed.astype(np.float32), hidden, PATCH)


def assert_same(shown: Pixels, expected: Pixels) -> None:
    assert shown.shape == expected.shape
    # The twin in NumPy rounds in double precision.
    assert np.abs(shown.astype(int) - expected).max() <= 1
