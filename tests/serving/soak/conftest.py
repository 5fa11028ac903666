"""The server that the hostile requests are sent to."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from running_server import Server, running
from traffic import draw_embedding, draw_pixels, encoded, gauges

# A line for each of thousands of requests would bury the figures.
logging.getLogger("httpx").setLevel(logging.WARNING)

BODY_TIMEOUT_S = 1.5


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"CAE_SERVING_BODY_TIMEOUT_S": str(BODY_TIMEOUT_S)}
    with running(tiny_bundle, tmp_path_factory.mktemp("server") / "log", settings) as running_server:
        yield running_server
        assert [line for line in running_server.log.read_text().splitlines() if "Traceback" in line] == []
        assert set(gauges(running_server.url).values()) == {0.0}


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def the_next_caller_notices_nothing(http: httpx.Client, server: Server) -> Iterator[None]:
    yield
    call = draw_embedding(np.random.default_rng(0))
    started = time.monotonic()
    call.verify(http.post(call.path, content=call.body, headers=call.headers))
    assert time.monotonic() - started < 5


@pytest.fixture(scope="module")
def png() -> bytes:
    return encoded(draw_pixels(np.random.default_rng(1))[0])
