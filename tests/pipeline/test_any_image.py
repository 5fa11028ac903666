"""Images that are not square, of 1, 3 and 13 channels: files, training, export, ONNX Runtime, the server."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from cae.data.shards import ImageShards
from cae.targets.files import load_target
from cae.weights import load_trained
from pipeline import export, inference, similar
from pipeline.batches import first_images
from pipeline.workspace import Workspace
from serving.bundle import Bundle
from serving.bundle_info import OUTPUTS
from serving.masks import random_mask
from tests.pipeline.conftest import STAGES, MakeWorkspace
from tests.serving.running_server import running
from tests.tiny import with_values

CHANNELS = (1, 3, 13)
# The stages with labels and the report run for one of them, for they take the longest.
MANY = 13
UNLABELLED = ("prepare", "tokenizer", "pretrain", "export")
HEIGHT, WIDTH, PATCH = 96, 160, 16
NUM_PATCHES = 60
# Sixteen images to train on, in batches of eight: two steps.
NUM_OF_CLASS, VAL_FRACTION = 12, 1 / 3
VALUES = {
    "prepare.val_fraction": VAL_FRACTION,
    "model.image_size": [HEIGHT, WIDTH],
    "model.patch_size": PATCH,
    "pretrain.mask.kind": "block",
    "export.num_parity_images": 4,
}
BATCHED = ("tokenizer", "pretrain", "finetune", "probe.linear", "probe.attentive")


def pixels_of(number: int, channels: int) -> np.ndarray:
    """Smooth, with another contrast in every channel; uint8 [c, h, w], every third larger than the model's input."""
    scale = 1.25 if number % 3 == 2 else 1
    height, width = int(HEIGHT * scale), int(WIDTH * scale)
    rng = np.random.default_rng([number, channels])
    bands = []
    for channel in range(channels):
        coarse = rng.integers(0, 120 + 10 * channel, (4, 5)).astype(np.uint8) + 2 * channel
        fine = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        bands.append(np.asarray(fine))
    return np.stack(bands)


def write_image(path: Path, pixels: np.ndarray, number: int) -> Path:
    """PNG where it holds the channels, else a NumPy file in one of the layouts and depths that are read."""
    if len(pixels) in (1, 3):
        path = path.with_suffix(".png")
        Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(path)
        return path
    path = path.with_suffix(".npy")
    stored = pixels.transpose(1, 2, 0) if number % 2 else pixels
    np.save(path, stored.astype(np.uint16) * 257 if number % 4 > 1 else stored)
    return path


def write_folder(folder: Path, channels: int) -> dict[str, np.ndarray]:
    """Two classes of images; the pixels of each by its key."""
    made = {}
    for number in range(2 * NUM_OF_CLASS):
        name = "ab"[number % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = pixels_of(number, channels)
        path = write_image(folder / name / f"{number:02d}", pixels, number)
        made[path.relative_to(folder).as_posix()] = pixels
    return made


def run_stages(root: Path, stages: Iterable[str], raw: dict[str, Any], make: MakeWorkspace) -> Workspace:
    values = VALUES | {f"{section}.batch_size": 8 for section in BATCHED} | {f"{s}.epochs": 1 for s in BATCHED}
    values |= {f"{section}.warmup_epochs": 0.5 for section in BATCHED}
    workspace = make(root / "root", with_values(raw, {**values, "prepare.source": f"folder:{root / 'images'}"}))
    for stage in stages:
        STAGES[stage](workspace)
    return workspace


@pytest.fixture(scope="module", params=CHANNELS, ids=lambda channels: f"{channels} channels")
def made(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_params: dict[str, Any],
    make_workspace: MakeWorkspace,
) -> tuple[Workspace, dict[str, np.ndarray]]:
    """A workspace after its stages, and the images of its folder."""
    root = tmp_path_factory.mktemp("any")
    images = write_folder(root / "images", request.param)
    stages = STAGES if request.param == MANY else UNLABELLED
    return run_stages(root, stages, tiny_params, make_workspace), images


Made = tuple[Workspace, dict[str, np.ndarray]]


def test_mean_and_deviation_of_every_channel_are_those_of_the_files(made: Made) -> None:
    workspace, images = made
    index = workspace.index
    shards = ImageShards(workspace.prepared, "train")
    channels = len(next(iter(images.values())))
    pixels = [images[shards.key(position)].reshape(channels, -1) / 255 for position in range(len(shards))]
    assert len(pixels) == 16
    assert (index.channels, len(index.classes)) == (channels, 2)
    np.testing.assert_allclose(index.mean, np.concatenate(pixels, axis=1).mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(index.std, np.concatenate(pixels, axis=1).std(axis=1), atol=1e-6)
    assert len(set(index.mean)) == len(set(index.std)) == channels


def test_two_steps_were_trained_on_a_grid_that_is_not_square(made: Made) -> None:
    workspace, _ = made
    loaded = load_trained(workspace.pretrained)
    assert loaded.architecture.grid == (6, 10)
    assert loaded.architecture.channels == workspace.index.channels
    (log,) = (workspace.scratch).glob("pretrain-*/log.jsonl")
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 2


def test_onnx_runtime_gives_the_outputs_of_torch(made: Made) -> None:
    workspace, _ = made
    loaded, target = load_trained(workspace.pretrained), load_target(workspace.target)
    assert loaded.cae is not None
    images = first_images(workspace, "val", workspace.preprocessing(), 5)
    assert images.shape[1:] == (workspace.index.channels, HEIGHT, WIDTH)
    bundle = Bundle.open(workspace.bundle, "cpu")
    visible, masked = (part[None].repeat(5, axis=0) for part in random_mask(NUM_PATCHES, 0.5, seed=1))
    with torch.inference_mode():
        ours = export.EncoderGraph(loaded.encoder, loaded.normalization).eval()(images)
        completed, _ = export.ReconstructorGraph(loaded.cae, loaded.normalization, target).eval()(
            images, torch.from_numpy(visible), torch.from_numpy(masked)
        )
        skipped, _ = export.SkipReconstructorGraph(loaded.cae, loaded.normalization, target).eval()(images)
    theirs = bundle.embed(images.numpy())
    for name, expected in zip(OUTPUTS, ours, strict=True):
        assert np.abs(theirs[name] - expected.numpy()).max() < 1e-4, name
    assert theirs["patches"].shape == (5, NUM_PATCHES, 32)
    assert np.abs(bundle.reconstruct(images.numpy(), visible, masked) - completed.numpy()).max() < 1e-4
    assert np.abs(bundle.skip_reconstruct(images.numpy()) - skipped.numpy()).max() < 1e-4


def test_embed_reads_the_folder_and_agrees_with_torch(made: Made, tmp_path: Path) -> None:
    workspace, images = made
    folder = workspace.root.parent / "images"
    bundle = inference.open_bundle(workspace.bundle, "cpu")
    left_out = inference.embed(bundle, [folder], tmp_path / "out.parquet", ["patches", "pooled"], batch_size=3)
    assert left_out == []
    table = parquet.read_table(tmp_path / "out.parquet")
    keys = [Path(path).relative_to(folder).as_posix() for path in table["path"].to_pylist()]
    assert sorted(keys) == sorted(images)
    loaded = load_trained(workspace.pretrained)
    graph = export.EncoderGraph(loaded.encoder, loaded.normalization).eval()
    for key, patches, pooled in zip(keys, table["patches"].to_pylist(), table["pooled"].to_pylist(), strict=True):
        fitting = resized(images[key])
        with torch.inference_mode():
            expected, _, expected_pooled, _ = graph(torch.from_numpy(fitting)[None])
        assert np.abs(np.reshape(patches, (NUM_PATCHES, -1)) - expected[0].numpy()).max() < 1e-4
        assert np.abs(np.array(pooled) - expected_pooled[0].numpy()).max() < 1e-4


def resized(pixels: np.ndarray) -> np.ndarray:
    """Every channel alone made as large as the model's input; both have the same aspect."""
    pictures = [Image.fromarray(band).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for band in pixels]
    return np.stack([np.asarray(picture) for picture in pictures])


def test_reconstruct_and_similar_draw_a_picture(made: Made, tmp_path: Path) -> None:
    workspace, images = made
    folder = workspace.root.parent / "images"
    bundle = inference.open_bundle(workspace.bundle, "cpu")
    image = folder / next(iter(images))
    inference.reconstruct(
        bundle,
        image,
        tmp_path / "row.png",
        mask_kind="block",
        mask_ratio=0.5,
        seed=0,
        view="side_by_side",
        skip_regressor=False,
    )
    with Image.open(tmp_path / "row.png") as row:
        assert (row.mode, row.size) == ("L" if workspace.index.channels == 1 else "RGB", (3 * WIDTH, HEIGHT))
        seen = np.asarray(row.crop((0, 0, WIDTH, HEIGHT))).reshape(HEIGHT, WIDTH, -1).transpose(2, 0, 1)
    np.testing.assert_array_equal(seen, images[next(iter(images))][:3])
    inference.embed(bundle, [folder], tmp_path / "out.npz", ["pooled"], batch_size=1)
    features = similar.Features.read(tmp_path / "out.npz", None)
    found = similar.neighbors(features, image, workspace.bundle, "cpu", 3, center=True)
    assert found.rows[0][0].is_query
    similar.show(found, as_json=True, contact_sheet=tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        # "Cannot be read" would stand on plain grey.
        cell = np.asarray(sheet.convert("RGB"))[8 + 40 : 8 + 70, 8 : 8 + 112]
    assert len(np.unique(cell.reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize("made", [MANY], indirect=True, ids=["13 channels"])
def test_every_stage_has_its_figures_and_the_report_its_pictures(made: Made) -> None:
    workspace, _ = made
    for stage in ("finetune", "probe_linear", "probe_attentive", "probe_knn"):
        assert "top1" in (workspace.read_metrics(stage) or {}), stage
    for name in ("completions", "tokenizer", "without_regressor"):
        with Image.open(workspace.report / f"figures/{name}.png") as picture:
            # Grey pictures on white have none of it.
            assert np.ptp(np.asarray(picture.convert("RGB")).astype(int), axis=2).max() > 40, name
    assert (
        "13 channels; the pictures on this page show the first three" in (workspace.report / "index.html").read_text()
    )


def test_the_server_answers_as_embed_does(made: Made, tmp_path: Path) -> None:
    workspace, images = made
    folder = workspace.root.parent / "images"
    bundle = inference.open_bundle(workspace.bundle, "cpu")
    key = list(images)[2]
    expected = bundle.embed(inference.read_image(folder / key, bundle.info.preprocessing)[None], ["patches"])["patches"]
    with running(workspace.bundle, tmp_path / "log", {}) as server:
        url = f"{server.url}/embed?outputs=patches"
        response = httpx.post(url, content=(folder / key).read_bytes(), timeout=30)
    assert response.headers["x-patch-grid"] == "6x10"
    np.testing.assert_allclose(response.json()["patches"], expected, atol=1e-5)
