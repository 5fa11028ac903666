"""A validation image that is also in training is taken out, and nothing else is."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cae.data.shards import ImageShards
from cae.errors import UserError
from pipeline import prepare
from pipeline.workspace import Workspace
from tests.pipeline.conftest import MakeWorkspace
from tests.tiny import with_values

SMALL = {"pretrain.batch_size": 2, "tokenizer.batch_size": 2, "prepare.max_reject_fraction": 0.0}


def noise(seed: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def run(
    root: Path, images: dict[str, Image.Image], raw: dict[str, Any], make: MakeWorkspace, **values: Any
) -> Workspace:
    for name, image in images.items():
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Other bytes for the same pixels, in a file that is stored as it is.
        image.save(path, compress_level=1 if name.startswith("train") else 9)
    changed = {key.replace("__", "."): value for key, value in values.items()}
    source = {"prepare.source": f"folder:{root / 'images'}"}
    workspace = make(root / "root", with_values(raw, {**SMALL, **source, **changed}))
    prepare.run(workspace)
    return workspace


def keys(workspace: Workspace, split: Any) -> list[str]:
    shards = ImageShards(workspace.prepared, split)
    return [shards.key(position) for position in range(len(shards))]


@pytest.mark.parametrize("short_side_px", [512, 12], ids=["as they are", "made smaller"])
def test_the_same_pixels_in_both_splits_leave_validation_whatever_the_format(
    short_side_px: int, tmp_path: Path, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    images = {f"train/{n}.png": noise(n) for n in range(4)}
    images |= {
        "val/a.png": noise(2),
        "val/b.tif": noise(3),
        "val/c.png": noise(9),
        "val/d.png": noise(9),
        "val/e.png": noise(0, (16, 20)),
    }
    images["train/twin.png"] = noise(2)
    workspace = run(
        tmp_path,
        images,
        tiny_params,
        make_workspace,
        prepare__short_side_px=short_side_px,
        prepare__shard_mb=0.002,
        runtime__num_workers=2,
    )
    # Two equal images inside a split are left alone.
    assert keys(workspace, "val") == ["val/c.png", "val/d.png", "val/e.png"]
    assert len(keys(workspace, "train")) == 5
    with (workspace.prepared / "rejects.csv").open() as file:
        rows = [(row["key"], row["reason"], row["detail"].split()[4]) for row in csv.DictReader(file)]
    assert rows == [("val/a.png", "duplicate", "train/2.png"), ("val/b.tif", "duplicate", "train/3.png")]
    metrics = workspace.read_metrics("prepare")
    assert metrics is not None
    assert (metrics["num_duplicates"], metrics["num_rejected"], metrics["num_val"]) == (2, 0, 3)
    assert sorted(path.name for path in workspace.prepared.iterdir()) == sorted(
        ["index.json", "rejects.csv", *(shard.file for shard in workspace.index.shards)]
    )


def test_validation_of_duplicates_alone_is_an_error(
    tmp_path: Path, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    images = {"train/a.png": noise(0), "train/b.png": noise(1), "val/a.png": noise(0)}
    with pytest.raises(UserError, match="leaves no val images; expected at least 2 different usable images"):
        run(tmp_path, images, tiny_params, make_workspace)
