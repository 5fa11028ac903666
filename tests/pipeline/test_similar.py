"""Neighbours and near-duplicates by the features that `cae-pipe embed` writes."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse.csgraph import connected_components

from cae.errors import NotReady, UserError
from pipeline import similar
from pipeline.contact_sheet import CELL_PX, GAP_PX, Cell, draw_sheet
from pipeline.similar import Features
from tests.pipeline.command import cae_pipe
from tests.serving.tiny_bundle import write_tiny_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of one colour each, two of them also as a copy one grey level off; a bundle; their features.

    The tiny encoder's `pooled` is the mean colour, so what is alike can be said without it.
    """
    root = tmp_path_factory.mktemp("similar")
    (root / "images").mkdir()
    colours = np.random.default_rng(3).integers(40, 216, (24, 3))
    for number, colour in enumerate(colours):
        _save(root / f"images/{number:02d}.png", colour)
    for number in (4, 9):
        _save(root / f"images/{number:02d}_copy.png", colours[number] + [1, 0, 0])
    write_tiny_bundle(root / "bundle")
    for out in ("features.parquet", "features.npz"):
        done = cae_pipe("embed", "images", "--out", out, "--bundle", "bundle", cwd=root)
        assert done.returncode == 0, done.stderr
    return root


def _save(path: Path, colour: NDArray[np.int64]) -> None:
    Image.fromarray(np.full((32, 32, 3), colour, dtype=np.uint8)).save(path)


@pytest.mark.parametrize("file", ["features.parquet", "features.npz"])
def test_the_copy_comes_first_and_the_image_itself_is_marked(folder: Path, file: str) -> None:
    done = cae_pipe(
        "similar", "images/04.png", "--features", file, "--bundle", "bundle", "--top", "3", "--json", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    itself, *others = answer["neighbors"]
    assert (itself["path"], itself["is_query"]) == ("images/04.png", True)
    assert len(others) == 3
    assert others[0]["path"] == "images/04_copy.png"
    assert not any(other["is_query"] for other in others)
    assert answer["centered"]


def test_similarity_is_the_cosine_of_centred_features(folder: Path) -> None:
    table = parquet.read_table(folder / "features.parquet").to_pydict()
    values = np.array(table["pooled"])
    centred = values - values.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    query = table["path"].index("images/09.png")
    expected = dict(zip(table["path"], unit @ unit[query], strict=True))
    features = Features.read(folder / "features.parquet", None)
    found = similar.neighbors(features, folder / "images/09.png", folder / "bundle", "cpu", 25, center=True)
    assert len(found.rows[0]) == 26 - (not any(match.is_query for match in found.rows[0]))
    for match in found.rows[0]:
        assert match.similarity == pytest.approx(expected[match.path], abs=1e-5)
    similarities = [match.similarity for match in found.rows[0]]
    assert similarities == sorted(similarities, reverse=True)


def test_near_duplicates_are_found_and_others_are_not(folder: Path) -> None:
    done = cae_pipe("similar", "--features", "features.parquet", "--threshold", "0.9995", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    groups = [{member["path"] for member in group} for group in json.loads(done.stdout)["groups"]]
    assert {"images/04.png", "images/04_copy.png"} in groups
    assert {"images/09.png", "images/09_copy.png"} in groups
    assert len(groups) == 2


def test_without_the_mean_everything_looks_alike(folder: Path) -> None:
    features = Features.read(folder / "features.parquet", None)
    raw = similar.near_duplicates(features, 0.9, center=False)
    centred = similar.near_duplicates(features, 0.9, center=True)
    assert max(map(len, raw.rows)) > 2 * max(map(len, centred.rows))


def test_blocks_find_what_all_pairs_at_once_find(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(300, 6)).astype(np.float32)
    values[200:] = values[:100] + rng.normal(scale=0.2, size=(100, 6))
    features = Features(Path("x"), "pooled", [f"{i:03d}" for i in range(300)], values, None)
    unit = values - values.mean(axis=0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    _, labels = connected_components(unit @ unit.T >= 0.95, directed=False)
    expected = {frozenset(f"{i:03d}" for i in np.flatnonzero(labels == label)) for label in np.unique(labels)}
    monkeypatch.setattr(similar, "BLOCK_BYTES", 7 * 300 * 4)
    monkeypatch.setattr(similar, "MAX_JOINING", 5)
    found = similar.near_duplicates(features, 0.95, center=True)
    assert {frozenset(match.path for match in row) for row in found.rows} == {row for row in expected if len(row) > 1}
    assert any(len(row) > 2 for row in found.rows)
    assert all(match.similarity >= 0.95 - 1e-4 for row in found.rows for match in row)


def test_equal_images_are_alike_even_where_they_are_the_mean() -> None:
    values = np.ones((12, 4), np.float32)
    features = Features(Path("x"), "pooled", [str(i) for i in range(12)], values, None)
    found = similar.near_duplicates(features, 0.98, center=True)
    assert [len(row) for row in found.rows] == [12]
    assert found.rows[0][0].similarity == pytest.approx(1)


def test_few_images_are_not_centred(caplog: pytest.LogCaptureFixture) -> None:
    values = np.array([[1, 0.01], [1, 0], [0, 1]], np.float32)
    found = similar.near_duplicates(Features(Path("x"), "pooled", ["a", "b", "c"], values, None), 0.98, center=True)
    assert not found.centered
    assert [[match.path for match in row] for row in found.rows] == [["a", "b"]]
    assert "too few" in caplog.text


@pytest.mark.parametrize("command", [["images/04.png", "--bundle", "bundle", "--top", "12"], ["--threshold", "0.9995"]])
def test_the_contact_sheet_shows_the_images(folder: Path, tmp_path: Path, command: list[str]) -> None:
    sheet = tmp_path / "sheet.png"
    done = cae_pipe("similar", *command, "--features", "features.parquet", "--contact-sheet", str(sheet), cwd=folder)
    assert done.returncode == 0, done.stderr
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    with Image.open(folder / "images/04.png") as image:
        colour = np.asarray(image)[0, 0]
    # One whole cell in the colour of the query, or of the member of a group.
    assert (pixels == colour).all(axis=1).sum() >= 112 * 112


def test_a_sheet_is_drawn_of_images_that_are_gone(tmp_path: Path) -> None:
    match = similar.Match(str(tmp_path / "gone.png"), 0.99)
    found = similar.Found("pooled", True, 2, [[match, match]], threshold=0.9)
    similar.show(found, as_json=True, contact_sheet=tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").exists()


def test_features_of_another_bundle_are_refused(folder: Path, tmp_path: Path) -> None:
    other = write_tiny_bundle(tmp_path / "other", crop_fraction=0.9)
    for file in ("features.parquet", "features.npz"):
        done = cae_pipe("similar", "images/04.png", "--features", file, "--bundle", str(other), cwd=folder)
        assert done.returncode == 2, done.stderr
        assert "two models cannot be compared" in done.stderr
        assert "Traceback" not in done.stderr


def test_wrong_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotReady, match="cae-pipe embed"):
        Features.read(tmp_path / "none.parquet", None)
    for name in ("text.parquet", "text.npz"):
        (tmp_path / name).write_text("no features")
        with pytest.raises(UserError, match=rf"{name}: not a"):
            Features.read(tmp_path / name, None)
    with pytest.raises(UserError, match=r"no class_token; write it again with .*--outputs class_token"):
        Features.read(folder / "features.parquet", "class_token")
    parquet.write_table(pa.table({"path": ["a"], "pooled": ["text"]}), tmp_path / "strings.parquet")
    with pytest.raises(UserError, match="pooled is string"):
        Features.read(tmp_path / "strings.parquet", None)
    np.savez(tmp_path / "nan.npz", path=np.array(["a"]), pooled=np.array([[np.nan]], np.float32))
    with pytest.raises(UserError, match="finite"):
        Features.read(tmp_path / "nan.npz", None)


def test_the_contact_sheet_shows_deep_and_transparent_images_as_the_model_sees_them(tmp_path: Path) -> None:
    deep = np.full((16, 16), 257 * 100, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.new("LA", (16, 16), (0, 0)).save(tmp_path / "clear.png")
    sheet = draw_sheet([[Cell(str(tmp_path / name), "") for name in ("deep.png", "clear.png")]])
    middles = [sheet.getpixel((GAP_PX + column * (CELL_PX + GAP_PX) + CELL_PX // 2, CELL_PX // 2)) for column in (0, 1)]
    assert middles == [(100, 100, 100), (255, 255, 255)]
