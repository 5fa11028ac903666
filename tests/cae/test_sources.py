"""Sources: which images there are, what they are called, and what is said when there are none."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from cae.data.sources import Cifar10, Folder, Source, SourceItem, Unusable, open_source
from cae.errors import UserError


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def fill(root: Path, *names: str) -> Path:
    """Files below `root`; each holds other bytes."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return root


def items(source: Source) -> list[SourceItem]:
    return [source[i] for i in range(len(source))]


def test_class_folders_give_labels_in_alphabetical_order(tmp_path: Path) -> None:
    source = Folder(fill(tmp_path, "dog/b.png", "cat/a.JPG", "dog/deeper/c.webp"))
    assert source.classes == ["cat", "dog"]
    assert items(source) == [
        SourceItem("cat/a.JPG", 0, None),
        SourceItem("dog/b.png", 1, None),
        SourceItem("dog/deeper/c.webp", 1, None),
    ]
    assert [source.read(i) for i in range(3)] == [png(1), png(0), png(2)]


@pytest.mark.parametrize(
    "names",
    [
        ("b.png", "a.png"),
        ("b.png", "cat/a.png", "dog/c.png"),
        ("all/b.png", "all/a.png"),
    ],
    ids=["flat", "mixed", "one folder"],
)
def test_images_that_folders_do_not_tell_apart_have_no_labels(tmp_path: Path, names: tuple[str, ...]) -> None:
    source = Folder(fill(tmp_path, *names))
    assert source.classes == []
    assert items(source) == [SourceItem(name, None, None) for name in sorted(names)]


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_train_and_val_folders_are_the_split_and_no_classes(tmp_path: Path, held_out: str) -> None:
    source = Folder(fill(tmp_path, "train/cat/a.png", "train/dog/b.png", f"{held_out}/dog/c.png"))
    assert source.classes == ["cat", "dog"]
    by_key = {item.key: (item.label, item.split) for item in items(source)}
    assert by_key == {
        "train/cat/a.png": (0, "train"),
        "train/dog/b.png": (1, "train"),
        f"{held_out}/dog/c.png": (1, "val"),
    }


def test_a_split_without_classes_is_a_split(tmp_path: Path) -> None:
    source = Folder(fill(tmp_path, "train/a.png", "val/b.png"))
    assert source.classes == []
    assert items(source) == [SourceItem("train/a.png", None, "train"), SourceItem("val/b.png", None, "val")]


@pytest.mark.parametrize("names", [("train/a.png", "cat/b.png"), ("train/a.png", "dog/c.png", "val/b.png")])
def test_train_beside_other_folders_is_a_class_like_them(tmp_path: Path, names: tuple[str, ...]) -> None:
    source = Folder(fill(tmp_path, *names))
    assert source.classes == sorted(name.split("/")[0] for name in names)
    assert {item.split for item in items(source)} == {None}


def test_a_train_folder_alone_is_no_split(tmp_path: Path) -> None:
    source = Folder(fill(tmp_path, "train/cat/a.png", "train/dog/b.png"))
    assert {item.split for item in items(source)} == {None}


def test_an_empty_or_missing_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").write_text("nothing here")
    with pytest.raises(UserError, match=r"prepare\.source: .*/empty holds no image files .*\.png"):
        open_source("folder:empty", tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"prepare\.source: .*/missing is not a folder"):
        open_source("folder:missing", tmp_path, tmp_path)


def test_a_relative_path_starts_at_the_root_and_an_absolute_one_does_not(tmp_path: Path) -> None:
    fill(tmp_path / "photos", "a.png")
    for url in ("folder:photos", f"folder:{tmp_path}/photos"):
        source = open_source(url, tmp_path, tmp_path)
        assert [item.key for item in items(source)] == ["a.png"]


@pytest.mark.parametrize("url", ["imagenet", "mnist", "folder", "", "s3:bucket", "mnist5k:here", "folder:"])
def test_an_unknown_source_is_named_with_the_known_ones(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match=rf"prepare\.source: '{url}' is not a known source; expected mnist5k, cifar10"):
        open_source(url, tmp_path, tmp_path)


@pytest.mark.parametrize("as_struct", [True, False], ids=["struct", "bytes"])
def test_cifar10_comes_from_parquet_files_of_either_layout(tmp_path: Path, as_struct: bool) -> None:
    def write(name: str, labels: list[int], first: int) -> None:
        cells = [{"bytes": png(first + i), "path": None} if as_struct else png(first + i) for i in range(len(labels))]
        parquet.write_table(pa.table({"label": labels, "image": cells}), tmp_path / name, row_group_size=1)

    write("test.parquet", [9], 40)
    write("train-1.parquet", [5], 20)
    write("train-0.parquet", [3, 1], 10)
    source = open_source(f"cifar10:{tmp_path}", tmp_path, tmp_path)
    assert len(source.classes) == 10
    assert [(item.label, item.split) for item in items(source)] == [
        (3, "train"),
        (1, "train"),
        (5, "train"),
        (9, "val"),
    ]
    assert len({item.key for item in items(source)}) == 4
    assert [source.read(i) for i in range(4)] == [png(10), png(11), png(20), png(40)]


@pytest.mark.parametrize("present", ["train", "test", None])
def test_missing_parquet_files_are_named(tmp_path: Path, present: str | None) -> None:
    if present:
        parquet.write_table(pa.table({"label": [0], "image": [png(0)]}), tmp_path / f"{present}.parquet")
    missing = "test" if present == "train" else "train"
    with pytest.raises(UserError, match=rf"prepare\.source: .* holds no {missing}\*\.parquet"):
        Cifar10(tmp_path)


def test_mnist5k_has_five_hundred_grey_digits_of_each_class(tmp_path: Path) -> None:
    source = open_source("mnist5k", tmp_path, tmp_path)
    assert len(source) == 5000
    assert source.classes == [str(digit) for digit in range(10)]
    everything = items(source)
    assert np.bincount([item.label for item in everything if item.label is not None]).tolist() == [500] * 10
    assert len({item.key for item in everything}) == 5000
    assert {item.split for item in everything} == {None}
    with Image.open(io.BytesIO(source.read(0))) as image:
        assert (image.mode, image.size) == ("L", (28, 28))
        assert np.asarray(image).max() > 200


@pytest.mark.parametrize(
    ("folders", "classes", "splits"),
    [
        (("train", "val", "test"), ["cat", "dog"], {"train", "val"}),
        (("train", "valid"), ["cat", "dog"], {"train", "val"}),
        (("train",), ["cat", "dog"], {None}),
        (("train", "car", "bus"), ["bus", "car", "train"], {None}),
    ],
)
def test_split_folders_are_told_from_classes(
    tmp_path: Path, folders: tuple[str, ...], classes: list[str], splits: set[str | None]
) -> None:
    for folder in folders:
        for name in ("cat", "dog"):
            (tmp_path / folder / name).mkdir(parents=True)
            (tmp_path / folder / name / "1.png").write_bytes(png(0))
    source = open_source(f"folder:{tmp_path}", tmp_path, tmp_path)
    assert source.classes == classes
    items = [source[position] for position in range(len(source))]
    assert {item.split for item in items} == splits
    assert not any(item.key.startswith("test/") for item in items)


def strays(source: Source) -> dict[str, str]:
    return {stray.key: stray.reason for stray in source.strays}


def test_files_are_told_by_their_first_bytes_and_those_that_are_no_images_make_no_class(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.png", "dog/without suffix", "dog/b.txt")
    for name in ("notes.txt", ".DS_Store", "papers/BMW.txt", "cat/._a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"BMW and other words")
    (tmp_path / "cat/folder.jpg").mkdir()
    source = Folder(tmp_path)
    assert source.classes == ["cat", "dog"]
    assert [item.key for item in items(source)] == ["cat/a.png", "dog/b.txt", "dog/without suffix"]
    assert strays(source) == dict.fromkeys(["notes.txt", ".DS_Store", "papers/BMW.txt", "cat/._a.png"], "not an image")


def test_a_folder_with_broken_images_alone_is_no_class_and_its_files_are_items(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/c.jpg").write_bytes(b"")
    (tmp_path / "d.jpg").write_bytes(b"an error page")
    source = Folder(tmp_path)
    assert source.classes == ["cat", "dog"]
    assert {item.key: item.label for item in items(source)} == {
        "cat/a.png": 0,
        "d.jpg": None,
        "dog/b.png": 1,
        "empty/c.jpg": None,
    }


def test_a_stray_is_not_read_whole(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    with (tmp_path / "backup.zip").open("wb") as file:
        file.truncate(1 << 40)  # a hole of a terabyte
    assert strays(Folder(tmp_path)) == {"backup.zip": "not an image"}


def test_links_are_followed_and_those_that_lead_nowhere_are_unreadable(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "b.png")
    fill(tmp_path / "images", "cat/a.png")
    (tmp_path / "images/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/cat/round").symlink_to(tmp_path / "images")
    (tmp_path / "images/cat/gone.png").symlink_to("nothing.png")
    os.mkfifo(tmp_path / "images/cat/pipe.jpg")
    source = Folder(tmp_path / "images")
    assert source.classes == ["cat", "dog"]
    keys = [item.key for item in items(source)]
    assert keys == ["cat/a.png", "cat/gone.png", "cat/pipe.jpg", "dog/b.png"]
    for position, message in ((1, "a link to nothing.png, which is not there"), (2, "not a regular file")):
        with pytest.raises(Unusable, match=message) as caught:
            source.read(position)
        assert caught.value.reason == "unreadable"
    assert source.read(3) == png(0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_unreadable(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / "b.png").chmod(0)
    with pytest.raises(Unusable, match="Permission denied"):
        Folder(tmp_path).read(1)
