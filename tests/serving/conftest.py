"""Fixtures: a tiny real bundle, and random pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from http_answers import MAX_BODY_BYTES, MAX_PIXELS, encoded
from numpy.typing import NDArray
from running_server import Server, running
from tiny_bundle import write_tiny_bundle


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def random_pixels() -> Callable[..., NDArray[np.uint8]]:
    """Random uint8 pixels of any shape, the same for the same shape."""
    return lambda *shape: np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = {
        "CAE_SERVING_MAX_BODY_BYTES": str(MAX_BODY_BYTES),
        "CAE_SERVING_MAX_PIXELS": str(MAX_PIXELS),
        "CAE_SERVING_MAX_IMAGES": "8",
    }
    with running(tiny_bundle, tmp_path_factory.mktemp("server") / "log", limits) as running_server:
        yield running_server
        assert "Traceback" not in running_server.log.read_text()


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def image(random_pixels: Callable[..., NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """[3, 32, 32]: the bundle's own size, so that nothing is resized."""
    return random_pixels(3, 32, 32)


@pytest.fixture(scope="module")
def png(image: NDArray[np.uint8]) -> bytes:
    return encoded(image)
