"""Small real data and a small configuration, shared by the tests of the pipeline and of the whole."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Tensors of this size only lose by threads. Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.tiny import ROOT, TINY, shipped_params, with_values, write_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 real MNIST digits of four classes, and one broken file."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_params(digits: Path) -> dict[str, Any]:
    """The shipped parameters, made tiny, on the digits."""
    return with_values(shipped_params(), {**TINY, "prepare.source": f"folder:{digits}"})


@pytest.fixture(scope="session")
def new_root() -> Callable[[Path], Path]:
    """Makes a folder into a root of the project: dvc.yaml and the code, without data."""

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "dvc.yaml", folder)
        for package in ("cae", "pipeline", "serving"):
            (folder / package).symlink_to(ROOT / package)
        return folder

    return make
