"""Folders of NumPy files: which are images, of how many channels, and what is said of the others."""

import csv
import io
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from cae.config import load_params
from cae.data.formats import HEAD_BYTES, image_kind
from cae.data.shards import ImageShards
from cae.data.sources import Folder, open_source
from cae.errors import UserError
from pipeline import init, prepare
from pipeline.choice import choose
from pipeline.duplicates import pixel_hash
from pipeline.inspection import inspect
from pipeline.workspace import Workspace
from serving.preprocess import decode, to_array
from tests.pipeline.conftest import MakeWorkspace
from tests.tiny import ROOT, with_values

SMALL = {"pretrain.batch_size": 2, "tokenizer.batch_size": 2}


def noise(seed: int, *shape: int, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def save(folder: Path, files: dict[str, np.ndarray]) -> Path:
    for name, array in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            np.save(path, array)
        else:
            Image.fromarray(array).save(path)
    return folder


def prepared(root: Path, raw: dict[str, Any], make: MakeWorkspace, **values: Any) -> Workspace:
    changed = {key.replace("__", "."): value for key, value in values.items()}
    source = {"prepare.source": f"folder:{root / 'images'}", **SMALL}
    workspace = make(root / "root", with_values(raw, {**source, **changed}))
    prepare.run(workspace)
    return workspace


def stored(workspace: Workspace) -> dict[str, np.ndarray]:
    shards = [ImageShards(workspace.prepared, split) for split in prepare.SPLITS]
    return {part.key(i): to_array(part.image(i)) for part in shards for i in range(len(part))}


def rejects(workspace: Workspace) -> dict[str, tuple[str, str]]:
    with (workspace.prepared / "rejects.csv").open() as file:
        return {row["key"]: (row["reason"], row["detail"]) for row in csv.DictReader(file)}


# Which files are images


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (np.zeros((13, 96, 160), np.uint8), "NPY"),
        (np.zeros((1000, 1000, 13), np.uint16), "NPY"),
        (np.zeros((96, 160), ">u2"), "NPY"),
        (np.asfortranarray(np.zeros((4, 9, 9), np.uint8)), "NPY"),
        # Saved in a way that is not read, and worth a word.
        (np.zeros((13, 96, 160), np.float32), "NPY"),
        # Labels, features, a whole data set, any object.
        (np.zeros(500, np.uint8), None),
        (np.zeros((500, 768), np.float32), None),
        (np.zeros((50, 28, 28, 3), np.uint8), None),
        (np.array({"a": 1}, dtype=object), None),
    ],
)
def test_the_header_of_a_numpy_file_tells_whether_it_is_an_image(array: np.ndarray, kind: str | None) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    assert image_kind(buffer.getvalue()[:HEAD_BYTES]) == kind


def test_labels_and_features_beside_images_are_strays_and_take_no_class_away(tmp_path: Path) -> None:
    files = {f"{name}/{n}.png": noise(n, 16, 16) for name in "ab" for n in range(2)}
    source = Folder(
        save(tmp_path, files | {"labels.npy": np.arange(4), "features.npy": noise(0, 4, 32, dtype="float32")})
    )
    assert source.classes == ["a", "b"]
    assert {stray.key for stray in source.strays} == {"labels.npy", "features.npy"}


def test_a_folder_of_other_arrays_alone_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no image files .*\.npy with uint8 or uint16 \[C, H, W\]"):
        Folder(save(tmp_path, {"a.npy": noise(0, 4, 32, dtype="float32")}))


def test_tables_and_tar_files_may_hold_numpy_files(tmp_path: Path) -> None:
    array = noise(0, 5, 16, 24)
    save(tmp_path, {"a.npy": array})
    (tmp_path / "list.csv").write_text("path\na.npy\n")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        members = {"0.npy": npy(array), "1.npy": npy(array[0]), "1.jpg": b"the picture that belongs to the features"}
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    parquet.write_table(pa.table({"image": [npy(array)]}), tmp_path / "rows.parquet")
    samples = open_source("wds:s.tar", tmp_path, tmp_path)
    tables = [open_source(url, tmp_path, tmp_path) for url in ("csv:list.csv", "parquet:rows.parquet")]
    for source in (*tables, samples):
        assert np.array_equal(to_array(decode(source.read(0), max_pixels=1000)), array)
    assert samples.read(1) == members["1.jpg"]


# Channels


@pytest.mark.parametrize(
    ("found", "channels"),
    [
        ([], 1),
        ([0, 0], 1),
        ([1, 1, 0], 1),
        ([1, 1, 3], 3),
        ([13, 13, 3, 1], 3),
        ([13, 13, 13, 3, 1], 13),
        ([4, 4, 13, 13], 4),
        ([2, 0, 0, 0], 2),
    ],
)
def test_the_number_of_channels_is_that_of_most_images(found: list[int], channels: int) -> None:
    assert prepare.common_channels(iter(found)) == channels


def test_images_of_other_numbers_of_channels_are_named_and_left_out(
    tmp_path: Path, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    good = {f"{n}.npy": noise(n, 4, 16, 24) for n in range(8)}
    bad = {
        "five.npy": noise(0, 5, 16, 24),
        "photo.png": noise(0, 16, 24, 3),
        "floats.npy": noise(0, 4, 16, 24, dtype="float32"),
        "many.npy": noise(0, 17, 20, 24),
    }
    save(tmp_path / "images", good | bad)
    workspace = prepared(tmp_path, tiny_params, make_workspace, prepare__max_reject_fraction=0.5)
    assert workspace.index.channels == 4
    seen = stored(workspace)
    assert set(seen) == set(good)
    assert all(np.array_equal(seen[key], good[key]) for key in good)
    named = rejects(workspace)
    assert set(named) == set(bad)
    assert {reason for reason, _ in named.values()} == {"unsupported"}
    assert "5 channels, expected 4" in named["five.npy"][1]
    assert "3 channels, expected 4" in named["photo.png"][1]
    assert "float32" in named["floats.npy"][1]
    assert "17 channels" in named["many.npy"][1]


def test_a_damaged_numpy_file_is_truncated(
    tmp_path: Path, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    save(tmp_path / "images", {f"{n}.npy": noise(n, 4, 16, 24) for n in range(4)})
    path = tmp_path / "images/3.npy"
    path.write_bytes(path.read_bytes()[:-10])
    workspace = prepared(tmp_path, tiny_params, make_workspace, prepare__max_reject_fraction=0.5)
    assert [(key, reason) for key, (reason, _) in rejects(workspace).items()] == [("3.npy", "truncated")]


@pytest.mark.parametrize(("channels", "kept"), [("auto", {"a", "b", "c", "d"}), (2, {"e", "f", "g"})])
def test_the_parameter_decides_against_the_majority(
    tmp_path: Path, channels: Any, kept: set[str], tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    files = {f"{name}.npy": noise(n, 5, 16, 16) for n, name in enumerate("abcd")}
    files |= {f"{name}.npy": noise(n, 2, 16, 16) for n, name in enumerate("efg")}
    save(tmp_path / "images", files)
    values = {"prepare__channels": channels, "prepare__max_reject_fraction": 0.9}
    workspace = prepared(tmp_path, tiny_params, make_workspace, **values)
    assert {key.removesuffix(".npy") for key in stored(workspace)} == kept


def test_grey_and_colour_numpy_files_mix_with_pictures(
    tmp_path: Path, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    files = {
        "a.npy": noise(0, 3, 16, 24),
        "b.png": noise(1, 16, 24, 3),
        "c.npy": noise(2, 16, 24),
        "d.png": noise(3, 16, 24),
    }
    save(tmp_path / "images", files)
    workspace = prepared(tmp_path, tiny_params, make_workspace)
    assert workspace.index.channels == 3
    seen = stored(workspace)
    assert np.array_equal(seen["a.npy"], files["a.npy"])
    assert np.array_equal(seen["c.npy"], np.stack([files["c.npy"]] * 3))


def test_large_arrays_are_stored_with_the_stated_short_side(
    tmp_path: Path, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    files = {f"{n}.npy": noise(n, 5, 40, 80) for n in range(4)}
    save(tmp_path / "images", files)
    seen = stored(prepared(tmp_path, tiny_params, make_workspace, prepare__short_side_px=20))
    for key, pixels in files.items():
        picture = Image.fromarray(np.ascontiguousarray(pixels[1:4].transpose(1, 2, 0)))
        expected = picture.resize((40, 20), Image.Resampling.BICUBIC, reducing_gap=3.0)
        assert np.array_equal(seen[key][1:4], np.asarray(expected).transpose(2, 0, 1))
        assert seen[key].shape == (5, 20, 40)


def test_the_same_pixels_in_both_splits_leave_validation_whatever_the_layout(
    tmp_path: Path, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    twin = noise(0, 5, 24, 32)
    files = {"train/a.npy": twin, "train/b.npy": noise(1, 5, 24, 32)}
    # Same pixels, and a picture that differs in its last channel alone.
    files["val/twin.npy"] = twin.transpose(1, 2, 0).astype(np.uint16) * 257
    files["val/other.npy"] = np.concatenate([twin[:4], 255 - twin[4:]])
    save(tmp_path / "images", files)
    workspace = prepared(tmp_path, tiny_params, make_workspace)
    assert {key: reason for key, (reason, _) in rejects(workspace).items()} == {"val/twin.npy": "duplicate"}
    assert workspace.index.count == {"train": 2, "val": 1}


def test_the_order_of_channels_is_part_of_the_pixels() -> None:
    one, other = (Image.fromarray(noise(n, 16, 16)) for n in range(2))
    assert len({pixel_hash((one, other)), pixel_hash((other, one)), pixel_hash(one)}) == 3


# init


def test_init_fits_parameters_to_a_folder_of_numpy_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    subprocess.run(["git", "init", "-q"], check=True)
    save(tmp_path / "bands", {f"{n}.npy": noise(n, 5, 16, 24) for n in range(12)})
    init.run("bands", Path("mine.yaml"), force=False)
    shown = capsys.readouterr().out
    for word in ("5 channels", "NPY 12", "prepare.channels"):
        assert word in shown, word
    assert load_params(Path("mine.yaml")).prepare.channels == 5


def test_channels_are_chosen_only_where_pictures_could_not_have_them(tmp_path: Path) -> None:
    findings = inspect(Folder(save(tmp_path, {f"{n}.npy": noise(n, 5, 16, 24) for n in range(12)})), 0.2)
    assert (findings.channels, findings.broken) == (5, [])
    for channels, chosen in ((5, [5]), (1, []), (3, [])):
        choices = choose(replace(findings, channels=channels), "folder:x", gpu=False, num_cores=2)
        assert [choice.value for choice in choices if choice.key == "prepare.channels"] == chosen
