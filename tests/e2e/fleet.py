"""Real replicas of the server behind the real nginx, with the example that docs/operations.md tells to start from."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.running_server import free_port, wait_until_ready
from tests.tiny import ROOT

EXAMPLE = ROOT / "docker/examples/nginx.conf"
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
START_S = 60


class Replica:
    """One `python -m serving` that can be stopped, killed and started again on its port."""

    def __init__(self, bundle: Path, log: Path, environment: Mapping[str, str]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._bundle, self._log, self._environment = bundle, log, environment
        self.process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "serving", "--bundle", str(self._bundle), "--port", str(self.port)]
        with self._log.open("ab") as output:
            return subprocess.Popen(
                [*command, "--device", "cpu"],
                cwd=ROOT,
                env={**os.environ, "CAE_SERVING_NUM_THREADS": "1", **self._environment},
                stdout=output,
                stderr=output,
            )

    def wait_until_ready(self) -> None:
        wait_until_ready(self.url, START_S, lambda: self.process.poll() is None, self._log.read_text)

    def restart(self) -> None:
        """As an orchestrator does: SIGTERM, wait for the end, start again, wait until it is ready."""
        self.process.terminate()
        assert self.process.wait(START_S) == 0
        self.start_again()

    def start_again(self) -> None:
        self.process = self._started()
        self.wait_until_ready()

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(START_S)

    def sample(self, series: str) -> float:
        """A value of /metrics; 0 where there is no such series yet."""
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(f"{series} "):
                return float(line.split()[-1])
        return 0.0


@dataclass
class Fleet:
    """Replicas, and the address of the proxy before them."""

    url: str
    trust: ssl.SSLContext
    replicas: list[Replica]
    log: Path

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.trust, timeout=60)

    def entries(self) -> list[dict[str, Any]]:
        """nginx's log of requests."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


@contextmanager
def fleet(
    bundle: Path, folder: Path, environments: Sequence[Mapping[str, str]], location: str = "location / {"
) -> Iterator[Fleet]:
    """A replica for each environment, all ready, behind nginx with the example and `location` in it."""
    if NGINX is None:
        pytest.skip("there is no nginx (apt-get install nginx-light)")
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    with ExitStack() as stack:
        replicas = []
        for index, environment in enumerate(environments):
            replicas.append(Replica(bundle, folder / f"replica_{index}.log", environment))
            stack.callback(replicas[-1].end)
        for replica in replicas:
            replica.wait_until_ready()
        certificate, key = folder / "tls.crt", folder / "tls.key"
        command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
        names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
        subprocess.run([*command, *names], check=True, capture_output=True)
        port = free_port()
        config = folder / "nginx.conf"
        config.write_text(_example_for([replica.port for replica in replicas], port, folder, location))
        log = folder / "nginx.log"
        stack.enter_context(_nginx(config, log, port))
        yield Fleet(f"https://127.0.0.1:{port}", ssl.create_default_context(cafile=str(certificate)), replicas, log)


def _example_for(replica_ports: Sequence[int], port: int, folder: Path, location: str) -> str:
    """The example with addresses, folders and certificate of this test, and otherwise as it is."""
    lines = []
    for line in EXAMPLE.read_text().splitlines():
        if "server serving:8000 " in line:
            lines += [line.replace("serving:8000", f"127.0.0.1:{replica}") for replica in replica_ports]
        else:
            lines.append(line)
    text = "\n".join(lines) + "\n"
    changes = {
        "listen 8443 ": f"listen 127.0.0.1:{port} ",
        " /tmp/": f" {folder}/",
        "/etc/nginx/tls/": f"{folder}/",
        "location / {": location,
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


@contextmanager
def _nginx(config: Path, log: Path, port: int) -> Iterator[None]:
    assert NGINX is not None
    # Workers of root become another user, who may not enter the folders of a test.
    globals_ = "daemon off;" + (" user root;" if os.geteuid() == 0 else "")
    with log.open("ab") as output:
        process = subprocess.Popen([NGINX, "-c", str(config), "-g", globals_], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        else:
            pytest.fail(f"nginx did not start:\n{log.read_text()}")
        yield
    finally:
        process.terminate()
        process.wait(START_S)
