"""The folder of tests/mixed_images.py: every good image is used with the right pixels, every other file is named."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cae.data.shards import ImageShards
from cae.data.sources import Reason
from pipeline import prepare
from pipeline.inference import find_images
from pipeline.workspace import Workspace
from tests.mixed_images import Mixed, write_mixed_folder
from tests.pipeline.conftest import MakeWorkspace
from tests.tiny import with_values


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mixed]:
    folder = tmp_path_factory.mktemp("mixed")
    return folder, write_mixed_folder(folder)


@pytest.fixture(scope="module")
def prepared(
    mixed_folder: tuple[Path, Mixed],
    tmp_path_factory: pytest.TempPathFactory,
    tiny_params: dict[str, Any],
    make_workspace: MakeWorkspace,
) -> Workspace:
    # 20 of 300 are more than the 5 % that are no error.
    values = {"prepare.source": f"folder:{mixed_folder[0]}", "prepare.max_reject_fraction": 0.07}
    workspace = make_workspace(tmp_path_factory.mktemp("root"), with_values(tiny_params, values))
    prepare.run(workspace)
    return workspace


def test_the_folder_has_three_hundred_files_of_many_kinds(mixed_folder: tuple[Path, Mixed]) -> None:
    _, mixed = mixed_folder
    assert (len(mixed.good), len(mixed.broken)) == (280, 20)
    assert len(set(mixed.broken.values())) == 7
    assert set(mixed.broken.values()) == set(Reason.__args__) - {"duplicate"}


def test_every_good_image_is_used_with_the_pixels_that_a_viewer_shows(
    mixed_folder: tuple[Path, Mixed], prepared: Workspace
) -> None:
    _, mixed = mixed_folder
    seen = {}
    for split in prepare.SPLITS:
        shards = ImageShards(prepared.prepared, split)
        for position in range(len(shards)):
            key, label = shards.key(position), shards.label(position)
            seen[key] = np.asarray(shards.image(position)).astype(int)
            assert prepared.index.classes[label] == key.split("/")[0]
    assert set(seen) == set(mixed.good)
    assert prepared.index.classes == [str(digit) for digit in range(10)]
    for key, pixels in seen.items():
        expected = mixed.good[key]
        assert pixels.shape == expected.shape, key
        difference = np.abs(pixels - expected)
        if key in mixed.lossy:
            assert difference.mean() < 4, key
        else:
            assert difference.max() <= 1, key


def test_every_file_that_is_not_used_is_named_with_its_reason(
    mixed_folder: tuple[Path, Mixed], prepared: Workspace
) -> None:
    _, mixed = mixed_folder
    with (prepared.prepared / "rejects.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["key", "reason", "detail"]
    named = {row["key"]: row["reason"] for row in rows}
    assert len(named) == len(rows)
    assert named == {**mixed.broken, **dict.fromkeys(mixed.strays, "not an image")}
    assert all(row["detail"] for row in rows)
    metrics = prepared.read_metrics("prepare")
    assert metrics is not None
    assert (metrics["num_rejected"], metrics["num_other_files"], metrics["num_duplicates"]) == (
        20,
        len(mixed.strays),
        0,
    )


def test_embed_finds_the_images_that_prepare_uses(mixed_folder: tuple[Path, Mixed]) -> None:
    folder, mixed = mixed_folder
    found = {path.relative_to(folder).as_posix() for path in find_images([folder])}
    assert set(mixed.good) <= found
    assert found <= set(mixed.good) | set(mixed.broken)
