"""A container engine to test with: the one that is there, or Debian's, unpacked and started for the tests."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SCRIPT = Path(__file__).with_name("engine.sh")
LOCAL_BASE = "cae-test-base:bookworm"
# Building the image of the pipeline takes most of it.
TIMEOUT_S = 1800
START_S = 30

logger = logging.getLogger(__name__)


class NoEngineError(Exception):
    """Why nothing can be built or run here."""


@dataclass(frozen=True)
class Engine:
    """A running engine. Without a bridge network, builds and containers use this machine's own network."""

    has_bridge: bool
    base: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, str]:
        """Of a process that speaks to this engine."""
        return {**os.environ, **self.environment}

    @property
    def network(self) -> tuple[str, ...]:
        return () if self.has_bridge else ("--network", "host")

    @property
    def build_arguments(self) -> tuple[str, ...]:
        """Of `docker build`, on this engine."""
        return (*self.network, *(("--build-arg", f"BASE={self.base}") if self.base else ()))

    def outcome(
        self, *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """Exit code and output of a command that may fail."""
        # Compose would name its project after the folder, and another project may have the same name.
        project = {"COMPOSE_PROJECT_NAME": "cae-pipe-test"}
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**self.variables, **project, **(environment or {})},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
        )
        return done.returncode, done.stdout

    def run(self, *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
        """Output of a command that must succeed."""
        code, output = self.outcome(*command, cwd=cwd, environment=environment)
        assert code == 0, f"{' '.join(command)}: {code}\n{output}"
        return output

    def has_compose(self) -> bool:
        return self.outcome("docker", "compose", "version")[0] == 0


@contextmanager
def any_engine() -> Iterator[Engine]:
    """The engine that answers here; else, as root on Debian, one that lives as long as the context.

    Errors: NoEngineError.
    """
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
        found = Engine(has_bridge=True)
        bridge = found.outcome("docker", "network", "inspect", "bridge")[0] == 0
        yield Engine(bridge, LOCAL_BASE if _has_base(found) else None)
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise NoEngineError(
            "no container engine answers to `docker info`, and starting Debian's own needs root on a Debian"
        )
    # Layers stay from one run to the next.
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cae-pipe-containers"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "unpacked").exists():
        logger.info("unpacking Debian's engine to %s", folder)
        unpacked = subprocess.run([SCRIPT, "unpack", folder], capture_output=True, text=True)
        if unpacked.returncode != 0:
            raise NoEngineError(f"Debian's engine is not to be had: {unpacked.stderr[-500:]}")
    with _daemon(folder) as engine:
        _make_base(engine, folder)
        yield engine


@contextmanager
def _daemon(folder: Path) -> Iterator[Engine]:
    programs = f"{folder}/root/usr/sbin{os.pathsep}{folder}/root/usr/bin"
    socket = f"unix://{folder}/docker.sock"
    environment = {
        "DOCKER_HOST": socket,
        "DOCKER_CONFIG": f"{folder}/config",
        "DOCKER_BUILDKIT": "0",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["dockerd", "--storage-driver", "overlay2", "--iptables=false", "--bridge=none"]
    command += ["--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec", "--pidfile", f"{folder}/docker.pid"]
    with (folder / "dockerd.log").open("w") as log:
        daemon = subprocess.Popen(
            [*command, "--host", socket], env={**os.environ, **environment}, stdout=log, stderr=log
        )
    engine = Engine(has_bridge=False, base=LOCAL_BASE, environment=environment)
    try:
        deadline = time.monotonic() + START_S
        while engine.outcome("docker", "info")[0] != 0:
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise NoEngineError(f"dockerd did not start: {(folder / 'dockerd.log').read_text()[-500:]}")
            time.sleep(0.2)
        yield engine
    finally:
        daemon.terminate()
        daemon.wait(timeout=START_S)
        # dockerd leaves it mounted, and the folder could not be deleted.
        subprocess.run(["umount", f"{folder}/exec/netns/default"], capture_output=True)


def _make_base(engine: Engine, folder: Path) -> None:
    if _has_base(engine):
        return
    logger.info("making a base image, since no registry of images is asked here")
    with subprocess.Popen([SCRIPT, "base", folder], env=engine.variables, stdout=subprocess.PIPE) as made:
        certificates = "ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt"
        imported = subprocess.run(
            ["docker", "import", "--change", certificates, "-", LOCAL_BASE],
            stdin=made.stdout,
            env=engine.variables,
            capture_output=True,
            text=True,
        )
    if made.returncode != 0 or imported.returncode != 0:
        raise NoEngineError(f"no base image: {imported.stderr} (see {folder}/debootstrap.log)")


def _has_base(engine: Engine) -> bool:
    return engine.outcome("docker", "image", "inspect", LOCAL_BASE)[0] == 0
