"""Real loader processes that are killed, and images that break a library: the image is named."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from cae.data.loader import EvalDataset, TrainDataset, eval_loader, train_loader
from cae.data.order import EpochBatches, SampleOrder
from cae.data.shards import UNLABELLED, ImageShards, Index, Picture, Row, ShardWriter
from cae.errors import UserError, WorkerDied
from tests.tiny import ROOT

CPU = torch.device("cpu")
FATAL = 5
NUM_IMAGES = 16


class Fatal:
    """A transform that ends its process, or fails, on one image: the one whose pixels are FATAL."""

    def __init__(self, number: int | None) -> None:
        self.number = number

    def __call__(self, image: Picture, _rng: Any = None) -> dict[str, Any]:
        pixels = np.asarray(image)[None].copy()
        if pixels[0, 0, 0] == FATAL:
            if self.number is None:
                raise ZeroDivisionError("a fault of the library")
            os.kill(os.getpid(), self.number)
        return {"images": pixels}


class FatalEvaluation(Fatal):
    def __call__(self, image: Picture, _rng: Any = None) -> Any:
        return super().__call__(image)["images"]


@pytest.fixture
def shards(tmp_path: Path) -> ImageShards:
    """16 images, each of one value, with the keys `image-0` to `image-15`."""
    writer = ShardWriter(tmp_path, "train", 1)
    for number in range(NUM_IMAGES):
        encoded = io.BytesIO()
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(encoded, "png")
        writer.add(Row(f"image-{number}", UNLABELLED, encoded.getvalue()))
    Index(
        source="test",
        count={"train": NUM_IMAGES, "val": 0},
        classes=[],
        channels=1,
        mean=[0.5],
        std=[0.25],
        shards=writer.close(),
        hash="0",
    ).write(tmp_path)
    return ImageShards(tmp_path, "train")


def read(shards: ImageShards, transform: Fatal, num_workers: int) -> None:
    dataset = TrainDataset(shards, transform, seed=0)
    for _ in train_loader(dataset, EpochBatches(SampleOrder(shards.counts, 0), 4, 0, 8), num_workers, CPU):
        pass


@pytest.mark.parametrize(("number", "advice"), [(signal.SIGKILL, "memory runs out"), (signal.SIGSEGV, "take it out")])
def test_a_loader_process_that_dies_is_reported_with_the_image_it_was_reading(
    shards: ImageShards, number: int, advice: str
) -> None:
    name = signal.Signals(number).name
    with pytest.raises(WorkerDied, match=rf"loader process \d+ .*died \({name}\) while it read") as caught:
        read(shards, Fatal(number), num_workers=2)
    assert f"image image-{FATAL} in {shards.folder / shards.infos[0].file}; " in str(caught.value)
    assert advice in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_that_breaks_a_library_is_named(shards: ImageShards, num_workers: int) -> None:
    with pytest.raises(UserError) as caught:
        read(shards, Fatal(None), num_workers)
    expected = f"image image-{FATAL} in {shards.folder / shards.infos[0].file}: cannot be read "
    assert str(caught.value).startswith(expected + "(ZeroDivisionError: a fault of the library); run `dvc repro")
    assert "Traceback" not in str(caught.value)


def test_so_are_images_of_an_evaluation(shards: ImageShards) -> None:
    loader = eval_loader(EvalDataset(shards, FatalEvaluation(signal.SIGKILL)), 4, 1, CPU)
    with pytest.raises(WorkerDied, match=f"while it read image image-{FATAL} in"):
        list(loader)


def test_the_other_loader_processes_end_with_it(shards: ImageShards) -> None:
    before = set(psutil.Process().children())
    with pytest.raises(WorkerDied):
        read(shards, Fatal(signal.SIGKILL), num_workers=2)
    assert set(psutil.Process().children()) <= before


ABANDONED = """
import sys
from pathlib import Path
from cae.data.loader import TrainDataset, train_loader
from cae.data.order import EpochBatches, SampleOrder
from cae.data.shards import ImageShards
from tests.cae.test_watch import CPU, Fatal

shards = ImageShards(Path(sys.argv[1]), "train")
order = EpochBatches(SampleOrder(shards.counts, 0), 4, 0, 100)
batches = iter(train_loader(TrainDataset(shards, Fatal(0), 0), order, 2, CPU))
next(batches)
raise RuntimeError("the training failed while its loader was at work")
"""


def test_a_program_that_fails_in_the_middle_of_its_batches_ends(shards: ImageShards) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ABANDONED, shards.folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "the training failed" in ended.stderr
