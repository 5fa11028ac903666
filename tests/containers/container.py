"""Images and running containers, spoken to through the engine's own command line."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.containers.engine import Engine
from tests.serving.running_server import free_port, wait_until_ready

START_S = 60
# As in compose.yaml, with room for fewer threads.
HARDENED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
HARDENED += ("--memory", "4g", "--pids-limit", "512")


@dataclass(frozen=True)
class Image:
    """An image of this engine, by name."""

    engine: Engine
    name: str

    def inspect(self) -> dict[str, Any]:
        return json.loads(self.engine.run("docker", "image", "inspect", self.name))[0]

    @property
    def size_mb(self) -> float:
        return self.inspect()["Size"] / 1e6

    def outcome(self, *command: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
        """Exit code and output of a container that ends by itself."""
        return self.engine.outcome("docker", "run", "--rm", *self.engine.network, *options, self.name, *command)

    def shell(self, script: str) -> str:
        """Output of a script that must succeed, in place of what the image runs."""
        code, output = self.outcome("-c", script, options=("--entrypoint", "sh"))
        assert code == 0, output
        return output


@dataclass(frozen=True)
class Container:
    """A container that runs in the background."""

    engine: Engine
    identity: str

    def inspect(self) -> dict[str, Any]:
        return json.loads(self.engine.run("docker", "inspect", self.identity))[0]

    def is_running(self) -> bool:
        return bool(self.inspect()["State"]["Running"])

    def execute(self, *command: str) -> tuple[int, str]:
        return self.engine.outcome("docker", "exec", self.identity, *command)

    def logs(self) -> str:
        return self.engine.run("docker", "logs", self.identity)

    def exit_code(self) -> int:
        """Of a container that ends by itself or was told to."""
        return int(self.engine.run("docker", "wait", self.identity))


@dataclass(frozen=True)
class Server:
    """A container that serves."""

    container: Container
    client: httpx.Client
    ready_s: float


@contextmanager
def running(image: Image, *command: str, options: tuple[str, ...] = ()) -> Iterator[Container]:
    """A container, removed in the end whatever it does."""
    engine = image.engine
    identity = engine.run("docker", "run", "--detach", *engine.network, *options, image.name, *command).strip()
    try:
        yield Container(engine, identity)
    finally:
        engine.run("docker", "rm", "--force", "--volumes", identity)


@contextmanager
def serving(image: Image, bundle: Path | None, settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """The image's server, ready; `bundle` None for an image with a bundle in it."""
    port = free_port()
    options = [*HARDENED, *(("--volume", f"{bundle}:/bundle:ro") if bundle else ())]
    if image.engine.has_bridge:
        options += ["--publish", f"127.0.0.1:{port}:8000"]
    else:
        options += ["--env", "CAE_SERVING_HOST=127.0.0.1", "--env", f"CAE_SERVING_PORT={port}"]
    for name, value in (settings or {}).items():
        options += ["--env", f"{name}={value}"]
    url, started = f"http://127.0.0.1:{port}", time.monotonic()
    with running(image, options=tuple(options)) as container, httpx.Client(base_url=url, timeout=60) as client:
        wait_until_ready(url, START_S, container.is_running, container.logs)
        yield Server(container, client, time.monotonic() - started)
