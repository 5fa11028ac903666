"""Any folder of images becomes shards: the same bytes every time, and a reason for every file that is left out."""

import csv
import hashlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cae.data.shards import ImageShards, Index
from cae.errors import UserError
from pipeline import prepare
from pipeline.workspace import Workspace
from tests.pipeline.conftest import STAGES, MakeWorkspace
from tests.tiny import with_values


def prepared(folder: Path, raw: dict[str, Any], make: MakeWorkspace) -> Workspace:
    workspace = make(folder, raw)
    prepare.run(workspace)
    return workspace


def picture(size: tuple[int, int] = (40, 30), mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth picture, so that JPEG keeps it nearly as it is."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


def folder_of(path: Path, images: dict[str, Image.Image | bytes]) -> Path:
    for name, image in images.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(image, bytes):
            file.write_bytes(image)
        else:
            image.save(file)
    return path


def of_folder(raw: dict[str, Any], folder: Path, **values: Any) -> dict[str, Any]:
    changed = {key.replace("__", "."): value for key, value in values.items()}
    small = {"pretrain.batch_size": 2, "tokenizer.batch_size": 2}
    return with_values(raw, {"prepare.source": f"folder:{folder}", **small, **changed})


def test_digits_are_split_by_class_and_described(finished: Workspace) -> None:
    index = finished.index
    assert index.classes == ["0", "1", "2", "3"]
    assert index.count == {"train": 120, "val": 40}
    assert index.channels == 1
    labels = np.concatenate(list(ImageShards(finished.prepared, "val").labels()))
    assert Counter(labels.tolist()) == {0: 10, 1: 10, 2: 10, 3: 10}
    shards = ImageShards(finished.prepared, "train")
    pixels = np.stack([np.asarray(shards.image(i)) for i in range(len(shards))]) / 255
    assert index.mean[0] == pytest.approx(pixels.mean(), abs=1e-6)
    assert index.std[0] == pytest.approx(pixels.std(), abs=1e-6)


def test_no_image_is_in_both_splits(finished: Workspace) -> None:
    keys = [
        {shards.key(i) for i in range(len(shards))}
        for shards in (ImageShards(finished.prepared, "train"), ImageShards(finished.prepared, "val"))
    ]
    assert len(keys[0]) + len(keys[1]) == 160
    assert not keys[0] & keys[1]


def test_the_file_that_cannot_be_read_is_named_with_its_reason(finished: Workspace) -> None:
    with (finished.prepared / "rejects.csv").open() as file:
        rejects = list(csv.DictReader(file))
    assert [reject["key"] for reject in rejects] == ["0/broken.png"]
    assert rejects[0]["reason"] == "truncated"
    assert "cut off" in rejects[0]["detail"]


def test_the_number_of_workers_changes_no_byte(
    tmp_path: Path, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    contents = []
    for num_workers in (0, 3):
        raw = with_values(tiny_params, {"runtime.num_workers": num_workers})
        workspace = prepared(tmp_path / str(num_workers), raw, make_workspace)
        files = sorted(path for path in workspace.prepared.iterdir())
        contents.append([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])
    assert contents[0] == contents[1]


def test_every_pixel_format_is_read_upright_and_in_colour(
    tmp_path: Path, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    source = picture()
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    source.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    images: dict[str, Image.Image | bytes] = {
        "plain.png": source,
        "photo.jpg": source,
        "palette.png": source.quantize(64),
        "alpha.png": source.convert("RGBA"),
        "cmyk.tif": source.convert("CMYK"),
        "web.webp": source,
        "bitmap.bmp": source,
        "turned.png": turned.getvalue(),
        "grey.png": source.convert("L"),
    }
    raw = of_folder(tiny_params, folder_of(tmp_path / "images", images), prepare__val_fraction=0.12)
    workspace = prepared(tmp_path / "root", raw, make_workspace)
    assert workspace.index.channels == 3
    seen = {}
    for split in prepare.SPLITS:
        shards = ImageShards(workspace.prepared, split)
        seen |= {shards.key(i): np.asarray(shards.image(i)) for i in range(len(shards))}
    assert set(seen) == set(images)
    for name, pixels in seen.items():
        assert pixels.shape == (30, 40, 3), name
        expected = np.asarray(source.convert("L").convert("RGB") if name == "grey.png" else source).astype(int)
        assert np.abs(pixels.astype(int) - expected).mean() < 20, name
    assert np.array_equal(seen["turned.png"], np.asarray(source))


def test_a_file_that_decodes_to_just_what_is_needed_is_kept_byte_for_byte(
    tmp_path: Path, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    images: dict[str, Image.Image | bytes] = {f"{i}.jpg": picture(seed=i) for i in range(4)}
    source = folder_of(tmp_path / "images", images)
    workspace = prepared(tmp_path / "root", of_folder(tiny_params, source), make_workspace)
    shards = ImageShards(workspace.prepared, "train")
    batch, row = shards._locate(0)
    assert batch.column("image")[row].as_py() == (source / shards.key(0)).read_bytes()


def test_large_images_are_stored_with_the_stated_short_side(
    tmp_path: Path, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    images: dict[str, Image.Image | bytes] = {f"{i}.png": picture((400, 200), seed=i) for i in range(4)}
    raw = of_folder(tiny_params, folder_of(tmp_path / "images", images), prepare__short_side_px=50)
    shards = ImageShards(prepared(tmp_path / "root", raw, make_workspace).prepared, "train")
    assert shards.image(0).size == (100, 50)


@pytest.mark.parametrize("good", [0, 3])
def test_too_many_broken_files_are_an_error_that_says_where_they_are_named(
    good: int, tmp_path: Path, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    images: dict[str, Image.Image | bytes] = {f"bad{i}.png": b"no image" for i in range(3)}
    images |= {f"good{i}.png": picture(seed=i) for i in range(good)}
    raw = of_folder(tiny_params, folder_of(tmp_path / "images", images))
    with pytest.raises(UserError, match=r"3 of .*max_reject_fraction") as caught:
        prepared(tmp_path / "root", raw, make_workspace)
    assert "rejects.csv" in str(caught.value)
    assert "bad0.png" in (tmp_path / "root/scratch/rejects.csv").read_text()
    assert not (tmp_path / "root/data/prepared").exists()


def test_without_labels_pretraining_and_export_work_and_the_labelled_stages_are_skipped(
    tmp_path: Path, tiny_params: dict[str, Any], make_workspace: MakeWorkspace, caplog: pytest.LogCaptureFixture
) -> None:
    images: dict[str, Image.Image | bytes] = {f"{i}.png": picture(seed=i) for i in range(60)}
    raw = of_folder(tiny_params, folder_of(tmp_path / "images", images))
    workspace = make_workspace(tmp_path / "root", raw)
    for stage, run in STAGES.items():
        run(workspace)
        metrics = workspace.read_metrics(stage)
        if stage == "report":  # test_report.py looks at it
            continue
        assert metrics is not None
        labelled = stage == "finetune" or stage.startswith("probe")
        assert ("no labels" in str(metrics.get("skipped"))) == labelled, stage
    assert "no labels" in caplog.text
    assert Index.read(workspace.prepared).channels == 3
    assert (workspace.bundle / "encoder.onnx").exists()


def test_batches_that_no_later_stage_could_fill_are_refused_at_once(
    tmp_path: Path, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    raw = with_values(tiny_params, {"probe.linear.batch_size": 512, "pretrain.batch_size": 256})
    with pytest.raises(UserError, match=r"pretrain\.batch_size: 256, probe\.linear\.batch_size: 512.* 120 "):
        prepared(tmp_path, raw, make_workspace)


def test_no_path_of_the_machine_is_published(finished: Workspace) -> None:
    folder = str(Path(finished.params.prepare.source.removeprefix("folder:")).parent)
    for path in (finished.prepared / "index.json", finished.pretrained / "cae.safetensors", *finished.bundle.iterdir()):
        assert folder.encode() not in path.read_bytes(), path
