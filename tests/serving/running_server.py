"""A real server in a process of its own, for tests that speak HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
START_S = 30


@dataclass
class Server:
    """A running `python -m serving`."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def running(
    bundle: Path, log: Path, environment: dict[str, str], program: Sequence[str] = ("-m", "serving")
) -> Iterator[Server]:
    """Start the server on a free port, wait until it is ready, and stop it in the end."""
    port = free_port()
    command = [sys.executable, *program, "--bundle", str(bundle), "--port", str(port), "--device", "cpu"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=output, stderr=output)
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_until_ready(server.url, START_S, lambda: process.poll() is None, log.read_text)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=START_S)


def free_port() -> int:
    """A port of this machine's own address that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_until_ready(url: str, timeout_s: float, is_alive: Callable[[], bool], log: Callable[[], str]) -> None:
    """Until the server at `url` takes calls; the test fails with its `log` where that takes longer or it has ended."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and is_alive():
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        # On two cores a caller that asks all the time would delay what it waits for.
        time.sleep(0.05)
    pytest.fail(f"the server did not become ready:\n{log()}")
