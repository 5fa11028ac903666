"""Fixtures: a tiny real bundle, and random pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_bundle import write_tiny_bundle


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def random_pixels() -> Callable[..., NDArray[np.uint8]]:
    """Random uint8 pixels of any shape, the same for the same shape."""
    return lambda *shape: np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)
