"""Callers of every kind at once: impatient ones, ones that send rubbish, bursts. In the end all is as it was."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import numpy as np
import pytest
from running_server import Server, running
from sizes import SIZES
from tiny_bundle import write_tiny_bundle
from traffic import Call, Generator, bad_call, connect, draw_embedding, gauges, good_call, rss_mib

NUM_CLIENTS = 24
PER_TURN = 25
_log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One whose room is small enough for bursts to fill, and slow enough for a queue."""
    folder = tmp_path_factory.mktemp("server")
    bundle = write_tiny_bundle(folder / "bundle", num_products=4)
    settings = {"CAE_SERVING_MAX_QUEUED_IMAGES": "24", "CAE_SERVING_BODY_TIMEOUT_S": "5"}
    with running(bundle, folder / "log", settings) as running_server:
        yield running_server
        assert [line for line in running_server.log.read_text().splitlines() if "Traceback" in line] == []


def raw(call: Call) -> bytes:
    headers = "".join(f"{name}: {value}\r\n" for name, value in call.headers.items())
    head = f"POST {call.path} HTTP/1.1\r\nHost: t\r\nContent-Length: {len(call.body)}\r\n{headers}\r\n"
    return head.encode() + call.body


def hang_up(server: Server, rng: Generator) -> str:
    """Leave while sending, while queued, or while the answer is read; politely, or with a reset."""
    host, port = server.url.removeprefix("http://").split(":")
    request = raw(good_call(rng))
    when = str(rng.choice(["sending", "queued", "reading"]))
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=30) as connection:
        if rng.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sendall(request[: rng.integers(1, len(request))] if when == "sending" else request)
        if when == "queued":
            time.sleep(0.01 * rng.random())
        elif when == "reading":
            connection.recv(20)
    return when


def answered(http: httpx.Client, call: Call) -> str:
    """The status of a call that is verified, unless there was no room for it."""
    response = http.post(call.path, content=call.body, headers=call.headers)
    if response.status_code == 429:
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "queue_full"
    else:
        call.verify(response)
    return str(response.status_code)


def burst(server: Server, rng: Generator) -> list[str]:
    """Eight calls at the same moment, each on a connection of its own."""
    calls = [draw_embedding(rng) for _ in range(8)]

    def alone(call: Call) -> str:
        with connect(server.url) as http:
            return answered(http, call)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(alone, calls))


def client(server: Server, seed: int) -> Counter[str]:
    """About PER_TURN requests of one caller."""
    rng, outcomes = np.random.default_rng(seed), Counter[str]()
    with connect(server.url) as http:
        while outcomes.total() < PER_TURN:
            dice = rng.random()
            if dice < 0.25:
                outcomes[hang_up(server, rng)] += 1
            elif dice < 0.45:
                outcomes[answered(http, bad_call(rng))] += 1
            elif dice < 0.48:
                outcomes.update(burst(server, rng))
            else:
                outcomes[answered(http, good_call(rng))] += 1
    return outcomes


def test_after_chaos_it_is_still_live_and_right(server: Server) -> None:
    before = 0.0
    outcomes: Counter[str] = Counter()
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        turns = pool.map(lambda seed: client(server, seed), range(SIZES.chaos_requests // PER_TURN))
        for number, turn in enumerate(turns):
            outcomes.update(turn)
            if number == SIZES.chaos_requests // PER_TURN // 5:
                before = rss_mib(server.process.pid)
    deadline = time.monotonic() + 10
    while set(gauges(server.url).values()) != {0.0} and time.monotonic() < deadline:
        time.sleep(0.1)
    assert set(gauges(server.url).values()) == {0.0}
    after = rss_mib(server.process.pid)
    _log.info("%d requests: %s; memory %.0f to %.0f MiB", outcomes.total(), dict(outcomes), before, after)
    assert after - before < 40
    assert set(outcomes) <= {"sending", "queued", "reading", "200", "429", "400", "406", "413", "415", "422"}
    assert {"sending", "queued", "reading", "200", "415", "422"} <= set(outcomes)
    rng = np.random.default_rng(0)
    with connect(server.url) as http:
        for path in ("/health/live", "/health/ready"):
            assert http.get(path).status_code == 200
        for _ in range(50):
            assert answered(http, good_call(rng)) == "200"
