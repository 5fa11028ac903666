"""How the server ends: told to, or because its batch thread died or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from running_server import ROOT, Server, running
from sizes import FULL
from tiny_bundle import write_tiny_bundle
from traffic import Call, connect, draw_embedding, draw_pixels, encoded, gauges, spoken

# Several times what the queue takes on a quiet machine; the server ends as soon as it is empty.
GRACE_S = 25.0
NUM_CLIENTS = 24
FAULTY = str(Path(__file__).parent / "faulty_server.py")


@pytest.fixture(scope="module")
def slow_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 25 ms for each image."""
    return write_tiny_bundle(tmp_path_factory.mktemp("slow"), num_products=80)


@contextmanager
def ending(
    bundle: Path, folder: Path, program: tuple[str, ...] = ("-m", "serving"), **settings: object
) -> Iterator[Server]:
    """A server that the test ends."""
    environment = {f"CAE_SERVING_{name}": str(value) for name, value in settings.items()}
    with running(bundle, folder / "log", environment | {"CAE_SERVING_NUM_THREADS": "1"}, program) as server:
        yield server


def send(server: Server, call: Call) -> httpx.Response:
    """On a connection of its own."""
    with connect(server.url) as client:
        return client.post(call.path, content=call.body, headers=call.headers)


def ask_live(server: Server) -> httpx.Response:
    with connect(server.url) as client:
        return client.get("/health/live")


def keep_asking(server: Server, seed: int, told: threading.Event) -> list[int]:
    """The statuses of one call after another until the server is gone; what was sent before the signal is answered."""
    rng, statuses = np.random.default_rng(seed), []
    with connect(server.url) as client:
        while True:
            call = draw_embedding(rng)
            late = told.is_set()
            try:
                response = client.post(call.path, content=call.body, headers=call.headers)
            except httpx.TransportError:
                # Only who comes after the signal may find the door closed.
                assert late
                return statuses
            statuses.append(response.status_code)
            if response.status_code == 200:
                call.verify(response)
            else:
                assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
                assert response.headers["retry-after"]
                time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT] if FULL else [signal.SIGTERM])
def test_told_to_end_under_load_it_answers_what_it_admitted(
    slow_bundle: Path, tmp_path: Path, number: signal.Signals
) -> None:
    told = threading.Event()
    with ending(slow_bundle, tmp_path, GRACE_S=GRACE_S) as server, ThreadPoolExecutor(NUM_CLIENTS) as pool:
        askers = [pool.submit(keep_asking, server, seed, told) for seed in range(NUM_CLIENTS)]
        time.sleep(2)
        assert sum(gauges(server.url).values()) > NUM_CLIENTS / 2
        told.set()
        signalled = time.monotonic()
        server.process.send_signal(number)
        assert server.process.wait(GRACE_S) == 0
        assert time.monotonic() - signalled < GRACE_S
        statuses = [asker.result() for asker in askers]
    assert all(200 in one for one in statuses)
    assert "Traceback" not in server.log.read_text()


def test_bodies_that_never_come_do_not_outlast_the_grace(slow_bundle: Path, tmp_path: Path) -> None:
    with ending(slow_bundle, tmp_path, GRACE_S=4) as server, ThreadPoolExecutor(4) as pool:
        head = b"POST /embed HTTP/1.1\r\nHost: t\r\nContent-Length: 5000\r\n\r\n"
        held = [pool.submit(spoken, server.url, head, *[b"x"] * 20, pause_s=0.3) for _ in range(4)]
        time.sleep(0.5)
        server.process.terminate()
        started = time.monotonic()
        assert server.process.wait(10) == 0
        assert time.monotonic() - started < 5
        for one in held:
            one.result()


def test_what_the_grace_does_not_suffice_for_is_told_to_come_again(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle", num_products=600)  # about 0.2 s for an image
    call = draw_embedding(np.random.default_rng(0), num_images=1)
    settings = {"GRACE_S": 4, "MAX_BATCH_SIZE": 1}
    with ending(bundle, tmp_path, **settings) as server, ThreadPoolExecutor(64) as pool:
        asked = [pool.submit(send, server, call) for _ in range(64)]
        while gauges(server.url)['cae_admitted_images{call="embed"}'] < 60:
            time.sleep(0.01)
        server.process.terminate()
        started = time.monotonic()
        answers = [one.result() for one in asked]
        assert server.process.wait(10) == 0
        assert time.monotonic() - started < 5
    assert {answer.status_code for answer in answers} == {200, 503}
    codes = [answer.json()["error"]["code"] for answer in answers if answer.status_code == 503]
    # Draining: the few that had not come in before the signal.
    assert set(codes) <= {"stopped", "draining"}
    assert codes.count("stopped") > 20


def test_a_pause_of_the_whole_process_is_not_taken_for_its_end(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle")
    call = draw_embedding(np.random.default_rng(0))
    with ending(bundle, tmp_path, HEARTBEAT_TIMEOUT_S=2) as server:
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        server.process.send_signal(signal.SIGCONT)
        call.verify(send(server, call))
        time.sleep(1.5)
        assert server.process.poll() is None
        assert ask_live(server).status_code == 200


def test_told_to_end_while_it_warms_up_it_ends(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle", num_products=1500)
    environment = os.environ | {"CAE_SERVING_GRACE_S": "4"}
    command = [sys.executable, "-m", "serving", "--bundle", str(bundle), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # About half a minute of warming up begins.
        assert any("Uvicorn running on" in line for line in process.stderr)
        process.terminate()
        started = time.monotonic()
        assert process.wait(20) == 0
        assert time.monotonic() - started < 4


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_without_its_batch_thread_it_is_not_live_and_ends(tmp_path: Path, how: str) -> None:
    bundle, trigger = write_tiny_bundle(tmp_path / "bundle"), tmp_path / "trigger"
    heartbeat_s = 2.0
    call = Call("/embed", encoded(draw_pixels(np.random.default_rng(0))[0]))
    with (
        ending(bundle, tmp_path, (FAULTY, how, str(trigger)), HEARTBEAT_TIMEOUT_S=heartbeat_s) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        assert send(server, call).status_code == 200
        trigger.touch()
        failed = time.monotonic()
        answers = [pool.submit(send, server, call) for _ in range(8)]
        limit_s = 5.0 + (heartbeat_s if how == "hangs" else 0)
        while (state := ask_live(server)).status_code == 200:
            assert time.monotonic() - failed < limit_s
            time.sleep(0.05)
        assert state.status_code == 503
        assert state.json()["error"]["code"] == "not_live"
        codes = {(answer.result().status_code, answer.result().json()["error"]["code"]) for answer in answers}
        assert codes <= {(503, "stopped"), (503, "draining"), (503, "not_ready")}
        assert (503, "stopped") in codes
        assert server.process.wait(15) == 1
        assert time.monotonic() - failed < limit_s + 10
