"""Images that are really built and containers that really run, on request: `make test-containers`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clones import clone_repository
from tests.containers.container import Image
from tests.containers.engine import Engine, NoEngineError, any_engine
from tests.serving.tiny_bundle import write_tiny_bundle
from tests.tiny import ROOT


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """Skips where it was not asked for or cannot be; `CAE_CONTAINERS=strict` makes the latter a failure."""
    wanted = os.environ.get("CAE_CONTAINERS")
    if not wanted:
        pytest.skip("builds images of several GB; `make test-containers` asks for it")
    try:
        with any_engine() as found:
            yield found
    except NoEngineError as error:
        if wanted == "strict":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Clones the repository, with its uncommitted changes, to folders that other users may enter."""

    def make(name: str) -> Path:
        return clone_repository(readable(tmp_path_factory.mktemp(name)) / "clone")

    return make


@pytest.fixture(scope="session")
def images(engine: Engine) -> str:
    """`make images`, as a user calls it; the revision that they were built from."""
    head = engine.run("git", "rev-parse", "HEAD", cwd=ROOT).strip()
    engine.run("make", "images", f"ARGS={' '.join(engine.build_arguments)}", cwd=ROOT)
    return head


@pytest.fixture(scope="session")
def serving(engine: Engine, images: str) -> Image:
    return Image(engine, "cae-serving")


@pytest.fixture(scope="session")
def serving_cuda(engine: Engine, images: str) -> Image:
    return Image(engine, "cae-serving:cuda")


@pytest.fixture(scope="session")
def pipeline(engine: Engine, images: str) -> Image:
    return Image(engine, "cae-pipeline")


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(readable(tmp_path_factory.mktemp("bundle")))


def readable(folder: Path) -> Path:
    """pytest's folders are for their owner alone, and containers run as somebody else."""
    folder.chmod(0o755)
    return folder
