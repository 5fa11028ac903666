"""The processes of the benchmark, and the processor time that they and others use."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
START_S, STOP_S = 120, 30


@dataclass
class Server:
    """A server that listens on 127.0.0.1, and the file with the request that it is asked."""

    process: subprocess.Popen[bytes]
    port: int
    request: Path

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the process and all below it for the length of the context, so that it takes nothing from the others."""
        tree = _tree(self.process.pid)
        for process in tree:
            process.suspend()
        try:
            yield
        finally:
            for process in tree:
                process.resume()


@dataclass
class RawSession:
    """benchmarks.raw_session, idle until it is asked."""

    process: subprocess.Popen[str]

    def measure(self, batch_size: int, seconds: float) -> dict[str, float]:
        """Figures of so many seconds."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{batch_size} {seconds}\n")
        self.process.stdin.flush()
        figures: dict[str, float] = json.loads(self.process.stdout.readline())
        return figures


@contextmanager
def server(
    module: str, arguments: list[str], health: str, request: Path, log: Path, environment: dict[str, str]
) -> Iterator[Server]:
    """Run `python -m MODULE ARGUMENTS` until the end of the context; {port} in an argument stands for a free one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", module, *(argument.format(port=port) for argument in arguments)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=output, stderr=output)
    try:
        _wait_for_health(process, port, health, log)
        yield Server(process, port, request)
    finally:
        _stop(process)


@contextmanager
def raw_session(onnx_file: Path, array_file: Path) -> Iterator[RawSession]:
    """ONNX Runtime alone, for the length of the context."""
    command = [sys.executable, "-m", "benchmarks.raw_session", str(onnx_file), str(array_file)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield RawSession(process)
    finally:
        _stop(process)


def load(target: Server, num_clients: int, warm_up_s: float, seconds: float) -> dict[str, float]:
    """Figures of benchmarks.load against one server."""
    numbers = (target.port, target.request, num_clients, warm_up_s, seconds)
    command = [sys.executable, "-m", "benchmarks.load", "127.0.0.1", *map(str, numbers)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


@contextmanager
def others_cpu() -> Iterator[dict[str, float]]:
    """Gets, at the end of the context, how many CPUs all other processes used (time stolen by other machines included).

    A figure taken while others used much of the machine is no figure.
    """
    figures: dict[str, float] = {}
    busy, own, start = _busy_s(), _own_s(), time.perf_counter()
    yield figures
    used = (_busy_s() - busy) - (_own_s() - own)
    figures["others_cpu"] = max(0.0, used / (time.perf_counter() - start))


def idle_cpu(servers: dict[str, Server], seconds: float) -> dict[str, float]:
    """Share of one CPU that each server uses while nobody asks it."""
    before = {name: _tree_s(item.process.pid) for name, item in servers.items()}
    time.sleep(seconds)
    return {name: (_tree_s(item.process.pid) - before[name]) / seconds for name, item in servers.items()}


def _tree(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def _tree_s(pid: int) -> float:
    """CPU seconds of a process and of all below it, those that ended included."""
    total = 0.0
    for process in _tree(pid):
        times = process.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total


def _own_s() -> float:
    return _tree_s(os.getpid())


def _busy_s() -> float:
    times = psutil.cpu_times()
    return sum(
        value for name, value in times._asdict().items() if name not in ("idle", "iowait", "guest", "guest_nice")
    )


def _wait_for_health(process: subprocess.Popen[bytes], port: int, path: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with (
            suppress(OSError, http.client.HTTPException),
            closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection,
        ):
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"{process.args!r} did not become healthy; its log {log}:\n{log.read_text()[-2000:]}")


def _stop(process: subprocess.Popen[Any]) -> None:
    children = _tree(process.pid)[1:] if process.poll() is None else []
    process.terminate()
    try:
        process.wait(timeout=STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
    # LitServe leaves its workers behind.
    _, alive = psutil.wait_procs(children, timeout=1)
    for child in alive:
        child.kill()
