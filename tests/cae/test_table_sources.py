"""Sources that are tables, hub data sets and tar shards: real files, small, read without a network."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import webdataset
from PIL import Image

from cae.data.sources import Source, SourceItem, Unusable, open_source
from cae.errors import UserError


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def items(source: Source) -> list[SourceItem]:
    return [source[i] for i in range(len(source))]


def opened(url: str, root: Path) -> Source:
    """The source as a worker of a DataLoader gets it."""
    return pickle.loads(pickle.dumps(open_source(url, root, root)))


# csv


def manifest(root: Path, text: str) -> Path:
    (root / "list.csv").write_text(text)
    for number in range(3):
        (root / f"{number}.png").write_bytes(png(number))
    return root


def test_a_csv_table_gives_paths_labels_and_splits(tmp_path: Path) -> None:
    away = tmp_path / "away.png"
    away.write_bytes(png(9))
    root = manifest(tmp_path, f"label,path,split\n10,0.png,train\n9,1.png,valid\n10,{away},TRAIN\n")
    source = opened("csv:list.csv", root)
    assert source.classes == ["9", "10"]
    assert items(source) == [
        SourceItem("0.png", 1, "train"),
        SourceItem("1.png", 0, "val"),
        SourceItem(str(away), 1, "train"),
    ]
    assert [source.read(i) for i in range(3)] == [png(0), png(1), png(9)]


@pytest.mark.parametrize("column", ["path", "image", "file"])
def test_a_csv_table_needs_paths_alone(tmp_path: Path, column: str) -> None:
    source = opened("csv:list.csv", manifest(tmp_path, f"{column}\n2.png\n0.png\n"))
    assert items(source) == [SourceItem("2.png", None, None), SourceItem("0.png", None, None)]
    assert source.classes == []


def test_a_file_that_a_csv_table_names_and_is_not_there_fails_alone(tmp_path: Path) -> None:
    source = opened("csv:list.csv", manifest(tmp_path, "path,label\n0.png,a\nmissing.png,b\n"))
    assert source.read(0) == png(0)
    with pytest.raises(FileNotFoundError):
        source.read(1)


def test_test_rows_are_left_out_where_there_are_validation_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "path,split\n0.png,test\n1.png,val\n2.png,train\n"
    assert [item.key for item in items(opened("csv:list.csv", manifest(tmp_path, text)))] == ["1.png", "2.png"]
    assert "test left out" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"list\.csv, line 1: no column `path`"),
        ("name,label\nx,y\n", r"list\.csv, line 1: no column `path` .* among name, label"),
        ("path\n", r"list\.csv names no image"),
        ("path,split\n0.png,train\n1.png,dev\n", r"list\.csv, line 3, column split: 'dev' is unknown; .*train, val"),
        ("path,label\n0.png,a\n,b\n", r"list\.csv, line 3, column path: empty"),
    ],
    ids=["empty", "no path column", "no rows", "split", "no path"],
)
def test_a_wrong_csv_table_is_answered_with_file_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened("csv:list.csv", manifest(tmp_path, text))


def test_a_missing_csv_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv: cannot be read as CSV \(No such file"):
        opened("csv:nowhere.csv", tmp_path)


# parquet


def write_table(path: Path, shades: list[int], column: str = "image", **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({column: [png(shade) for shade in shades], **columns}), path, row_group_size=2)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 0, 3, 3, 1]], ids=["forwards", "in any order"])
def test_parquet_rows_are_read_wherever_they_lie(tmp_path: Path, order: list[int]) -> None:
    write_table(tmp_path / "data/b.parquet", [3, 4], label=["y", "x"])
    write_table(tmp_path / "data/a.parquet", [0, 1, 2], label=["x", "y", "x"])
    for url in ("parquet:data", "parquet:data/*.parquet"):
        source = opened(url, tmp_path)
        assert [source.read(i) for i in order] == [png(i) for i in order]
        assert source.classes == ["x", "y"]
        assert [item.label for item in items(source)] == [0, 1, 0, 1, 0]
        assert [item.key for item in items(source)] == ["a/000000", "a/000001", "a/000002", "b/000000", "b/000001"]


def test_parquet_goes_back_inside_a_row_group(tmp_path: Path) -> None:
    rows = [bytes([n]) for n in range(250)]
    parquet.write_table(pa.table({"img": rows}), tmp_path / "a.parquet", row_group_size=200)
    source = opened("parquet:a.parquet", tmp_path)
    order = [199, 5, 70, 249, 64, 63, 200]
    assert [source.read(n) for n in order] == [rows[n] for n in order]


def test_parquet_memory_holds_a_batch_and_no_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [np.random.default_rng(n).bytes(10_000) for n in range(5000)]
    parquet.write_table(pa.table({"img": rows}), path, row_group_size=5000, use_dictionary=False)
    source = opened("parquet:a.parquet", tmp_path)
    before = pa.total_allocated_bytes()
    for position in range(0, 5000, 3):
        assert source.read(position) == rows[position]
        # The whole group is 50 MB.
        assert pa.total_allocated_bytes() - before < 20_000_000


@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "test"])
def test_parquet_splits_come_from_file_names(tmp_path: Path, held_out: str) -> None:
    write_table(tmp_path / f"{held_out}-00000-of-00001.parquet", [2])
    write_table(tmp_path / "train-00000-of-00001.parquet", [0, 1])
    splits = {item.key.split("-")[0]: item.split for item in items(opened("parquet:.", tmp_path))}
    assert splits == {"train": "train", held_out: "val"}


def test_a_parquet_split_column_goes_before_file_names(tmp_path: Path) -> None:
    write_table(tmp_path / "train.parquet", [0, 1, 2], split=["train", "test", "train"])
    assert [item.split for item in items(opened("parquet:train.parquet", tmp_path))] == ["train", "val", "train"]
    write_table(tmp_path / "train.parquet", [0], split=["dev"])
    with pytest.raises(UserError, match="column split: 'dev' is unknown"):
        opened("parquet:train.parquet", tmp_path)


def test_parquet_that_datasets_wrote_keeps_its_class_names(tmp_path: Path) -> None:
    hub_like().to_parquet(tmp_path / "a.parquet")
    source = opened("parquet:a.parquet", tmp_path)
    assert source.classes == ["cat", "dog", "owl"]
    assert [item.label for item in items(source)] == [2, 0, 2]
    assert source.read(1) == png(1)


def test_a_row_without_an_image_is_unusable_and_the_next_is_read(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"image": pa.array([None, png(1)], pa.binary())}), tmp_path / "a.parquet")
    source = opened("parquet:a.parquet", tmp_path)
    with pytest.raises(Unusable, match="holds no image"):
        source.read(0)
    assert source.read(1) == png(1)


def test_wrong_parquet_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no parquet file at .*/nowhere"):
        opened("parquet:nowhere", tmp_path)
    write_table(tmp_path / "a.parquet", [0], column="photo")
    with pytest.raises(UserError, match=r"a\.parquet has the columns photo; expected one of image, img"):
        opened("parquet:a.parquet", tmp_path)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"b\.parquet cannot be read as parquet"):
        opened("parquet:b.parquet", tmp_path)


# hf


def hub_like(shades: tuple[int, ...] = (0, 1, 2)) -> datasets.Dataset:
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog", "owl"])})
    features = datasets.Features({"image": features["photo"], "label": features["kind"]})
    rows = {"image": [{"bytes": png(s), "path": None} for s in shades], "label": [2, 0, 2][: len(shades)]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_saved_data_set_has_labels_splits_and_the_files_own_bytes(tmp_path: Path) -> None:
    splits = {"test": hub_like((7,)), "train": hub_like(), "validation": hub_like((8, 9))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    source = opened("hf:saved", tmp_path)
    assert source.classes == ["cat", "dog", "owl"]
    assert [item.split for item in items(source)] == ["train"] * 3 + ["val"] * 2
    assert [item.label for item in items(source)] == [2, 0, 2, 2, 0]
    assert [source.read(i) for i in (4, 0, 3)] == [png(9), png(0), png(8)]
    assert len({item.key for item in items(source)}) == 5


def test_a_saved_data_set_without_splits_is_drawn_from(tmp_path: Path) -> None:
    hub_like().save_to_disk(tmp_path / "saved")
    source = opened("hf:saved", tmp_path)
    assert {item.split for item in items(source)} == {None}
    assert source.read(2) == png(2)


def test_a_folder_that_the_library_can_load_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, name, shade in (("train", "cat", 1), ("train", "dog", 2), ("test", "dog", 3)):
        (tmp_path / "pets" / split / name).mkdir(parents=True)
        (tmp_path / "pets" / split / name / f"{shade}.png").write_bytes(png(shade))
    source = opened("hf:pets", tmp_path)
    assert source.classes == ["cat", "dog"]
    assert [(item.label, item.split) for item in items(source)] == [(0, "train"), (1, "train"), (1, "val")]
    assert [source.read(i) for i in range(3)] == [png(1), png(2), png(3)]


def test_an_unknown_hub_name_without_a_network_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hf:nobody/nothing cannot be loaded .*network.*copy the folder"):
        opened("hf:nobody/nothing", tmp_path)


# wds


def write_shard(path: Path, samples: dict[str, dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for key, parts in samples.items():
            writer.write({"__key__": key, **parts})


def three_shards(root: Path) -> None:
    write_shard(root / "s/train-0.tar", {"a": {"png": png(0), "cls": 7}, "b/c": {"PNG": png(1), "cls": 10}})
    write_shard(root / "s/train-1.tar", {"a": {"jpg": png(2), "json": {"label": 7}, "seg.png": png(99)}})
    write_shard(root / "s/val-0.tar", {"a": {"json": {"label": "10"}, "webp": png(3)}})


@pytest.mark.parametrize("url", ["wds:s/{train-0,train-1,val-0}.tar", "wds:s/*.tar", "wds:s"])
def test_tar_shards_give_images_labels_and_splits(tmp_path: Path, url: str) -> None:
    three_shards(tmp_path)
    source = opened(url, tmp_path)
    assert source.classes == ["7", "10"]
    assert items(source) == [
        SourceItem("train-0.tar/a.png", 0, "train"),
        SourceItem("train-0.tar/b/c.png", 1, "train"),
        SourceItem("train-1.tar/a.jpg", 0, "train"),
        SourceItem("val-0.tar/a.webp", 1, "val"),
    ]
    assert [source.read(i) for i in (3, 0, 2, 1)] == [png(3), png(0), png(2), png(1)]


def test_the_library_reads_the_same_images_from_the_same_shards(tmp_path: Path) -> None:
    three_shards(tmp_path)
    source = opened("wds:s/train-{0..1}.tar", tmp_path)
    pattern = str(tmp_path / "s/train-{0..1}.tar")
    samples = webdataset.WebDataset(pattern, shardshuffle=False)
    theirs = [sample[next(k for k in ("png", "jpg") if k in sample)] for sample in samples]
    assert [source.read(i) for i in range(len(source))] == theirs


def test_samples_without_an_image_are_named_and_no_fault(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", {"0": {"png": png(0)}, "readme": {"txt": "hello"}})
    source = opened("wds:a.tar", tmp_path)
    assert [item.key for item in items(source)] == ["a.tar/0.png"]
    assert [(stray.key, stray.reason) for stray in source.strays] == [("a.tar/readme", "not an image")]


@pytest.mark.parametrize("cut", ["in a member", "in a header", "between members"])
def test_what_comes_before_the_cut_of_a_shard_is_used(tmp_path: Path, cut: str) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, {str(n): {"cls": n % 2, "png": png(n)} for n in range(4)})
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    image = next(member for member in members if member.name == "2.png")
    end = {
        "in a member": image.offset_data + 40,
        "in a header": image.offset + 100,
        "between members": image.offset,
    }[cut]
    path.write_bytes(path.read_bytes()[:end])
    source = opened("wds:a.tar", tmp_path)
    assert source.classes == ["0", "1"]
    assert [source.read(i) for i in range(2)] == [png(0), png(1)]
    broken = {}
    for position in range(2, len(source)):
        with pytest.raises(Unusable) as caught:
            source.read(position)
        broken[source[position].key] = caught.value.reason
    member = {"a.tar/2.png": "truncated"} if cut == "in a member" else {}
    assert broken == {**member, "a.tar": "truncated"}


def test_wrong_shards_are_named(tmp_path: Path) -> None:
    three_shards(tmp_path)
    with pytest.raises(UserError, match=r"there is no .*/train-1\.tar"):
        opened("wds:train-{1..2}.tar", tmp_path)
    write_shard(tmp_path / "packed.tar.gz", {"0": {"png": png(0)}})
    with pytest.raises(UserError, match=r"hold no image; expected .* not compressed"):
        opened("wds:packed.tar.gz", tmp_path)
    (tmp_path / "bad.tar").write_bytes(b"")
    write_shard(tmp_path / "text.tar", {"0": {"json": json.loads("{}")}})
    with pytest.raises(UserError, match=r"the 2 shards .* hold no image"):
        opened("wds:{bad,text}.tar", tmp_path)
