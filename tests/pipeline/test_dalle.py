"""The DALL-E tokenizer through the pipeline: its files, its second view, the dtype of its tokens, the bundle."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cae.data.order import WHOLE
from cae.data.shards import ImageShards, file_sha256
from cae.errors import UserError
from cae.storage import read_weights
from cae.targets import take
from cae.targets.dalle import DalleTarget
from cae.targets.dalle_files import ADDRESSES
from cae.targets.files import load_target
from cae.train.device import Hardware
from cae.weights import load_trained
from pipeline import dalle, export, import_dalle, prepare, pretrain, tokenizer
from pipeline.batches import draw_masks, evaluation_batches, first_images, train_batches, unit_range
from pipeline.dalle import Trial
from pipeline.workspace import Workspace
from serving.bundle import Bundle
from serving.masks import random_mask
from serving.preprocess import prepare as preprocess
from tests.dalle_files import small_target, write_published
from tests.pipeline.conftest import MakeWorkspace
from tests.tiny import with_values

# Patches of 16 px in a 4 × 4 grid; the tokenizer sees 32 px.
DALLE = {"tokenizer.kind": "dalle", "model.image_size": 64, "model.patch_size": 16}


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, make_workspace: MakeWorkspace, tiny_params: dict[str, Any]
) -> Workspace:
    """A workspace with prepared digits and the tokenizer's files; tests copy it."""
    workspace = make_workspace(tmp_path_factory.mktemp("prepared"), with_values(tiny_params, DALLE))
    prepare.run(workspace)
    write_published(workspace.root / "data/dalle", small_target())
    return workspace


@pytest.fixture(scope="module")
def trained(prepared: Workspace) -> Workspace:
    """After tokenizer, pretrain and export."""
    for stage in (tokenizer, pretrain, export):
        stage.run(prepared)
    return prepared


@pytest.fixture
def another(
    prepared: Workspace, tmp_path: Path, make_workspace: MakeWorkspace, tiny_params: dict[str, Any]
) -> Callable[..., Workspace]:
    """A copy of the prepared workspace with other parameters, by dotted keys."""

    def make(values: dict[str, Any]) -> Workspace:
        workspace = make_workspace(tmp_path / "another", with_values(tiny_params, {**DALLE, **values}))
        shutil.copytree(prepared.root / "data", workspace.root / "data")
        return workspace

    return make


def test_absent_files_are_named_with_where_to_get_them_and_where_to_put_them(
    another: Callable[..., Workspace],
) -> None:
    workspace = another({"tokenizer.dalle_encoder": "weights/e.pkl", "tokenizer.dalle_decoder": "weights/d.pkl"})
    with pytest.raises(UserError) as caught:
        tokenizer.run(workspace)
    for part, name in (("encoder", "e.pkl"), ("decoder", "d.pkl")):
        said = f"{workspace.root}/weights/{name} (published at {ADDRESSES[part]}; tokenizer.dalle_{part})"
        assert said in str(caught.value)
    assert not workspace.target.exists()


def test_the_stage_stores_the_weights_their_hashes_and_their_figures(trained: Workspace) -> None:
    target = load_target(trained.target)
    assert isinstance(target, DalleTarget)
    assert (target.architecture.grid, target.architecture.channels, target.architecture.patch_size) == ((4, 4), 1, 16)
    for key, tensor in small_target().state_dict().items():
        assert torch.equal(target.state_dict()[key], tensor), key
    _, metadata = read_weights(trained.target, "target")
    files = {part: trained.root / f"data/dalle/{part}.pkl" for part in ("encoder", "decoder")}
    assert metadata["origin"] == {f"{part}_sha256": file_sha256(path) for part, path in files.items()}
    quality = trained.read_metrics("tokenizer") or {}
    assert quality["num_codes"] == 32
    assert 0 < quality["usage"] <= 1
    assert 1 < quality["perplexity"] <= 32
    assert quality["psnr_db"] > 0
    # With runtime.precision fp32 nothing is left to choose.
    assert quality["float32_agreement"] == 1
    assert (target.architecture.dtype, target.architecture.channels_last) == ("float32", False)
    assert (trained.read_metrics("efficiency/tokenizer") or {})["float32_images_per_s"] > 0


def test_pretraining_and_its_evaluation_read_the_second_view(trained: Workspace) -> None:
    params, index = trained.params, trained.index
    hardware = Hardware.choose(params.runtime)
    target = load_target(trained.target)
    loaded = load_trained(trained.pretrained)
    assert loaded.cae is not None
    objective = pretrain.Objective(loaded.cae, target, loaded.normalization, 1.0, 1)
    batch = next(iter(evaluation_batches(trained, "val", trained.preprocessing(), 8, hardware, (32, 32))))
    shards = ImageShards(trained.prepared, "val")
    small = trained.preprocessing().model_copy(update={"height": 32, "width": 32})
    for position in range(8):
        expected = preprocess(shards.image(position), small)
        assert np.array_equal(batch["target_images"][position].numpy(), expected)
    batch["visible"], batch["masked"] = draw_masks(pretrain.mask_sampler(params), 0, range(8))
    codes = objective.codes(batch)
    own = target.encode(unit_range(batch["target_images"]))
    assert torch.equal(codes, take(own, batch["masked"]))
    shrunk = target.encode(target.view(unit_range(batch["images"])))
    assert not torch.equal(own, shrunk), "the two views must differ, or this test says nothing"
    # Tokens are made in inference mode, and yet the loss goes backward.
    loss, _ = objective(batch, 0)
    loss.backward()
    assert "token_accuracy" in (trained.read_metrics("pretrain") or {})
    assert index.channels == 1


def test_pretraining_gives_the_target_views_of_its_own(
    trained: Workspace, another: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = another({})
    shutil.copytree(trained.root / "models", workspace.root / "models")
    seen: list[tuple[int, ...]] = []
    encode = DalleTarget.encode
    monkeypatch.setattr(DalleTarget, "encode", lambda self, view: seen.append(tuple(view.shape)) or encode(self, view))
    monkeypatch.setattr(DalleTarget, "view", None)
    pretrain.run(workspace)
    assert {shape[1:] for shape in seen} == {(1, 32, 32)}
    assert (workspace.read_metrics("pretrain") or {}) == trained.read_metrics("pretrain")


def test_the_bundle_draws_what_torch_draws_and_shows_nothing_hidden(trained: Workspace) -> None:
    bundle = Bundle.open(trained.bundle, "cpu")
    images = first_images(trained, "val", trained.preprocessing(), 5).numpy()
    visible, masked = (part[None].repeat(5, axis=0) for part in random_mask(16, 0.5, seed=3))
    loaded = load_trained(trained.pretrained)
    assert loaded.cae is not None
    module = export.ReconstructorGraph(loaded.cae, loaded.normalization, load_target(trained.target)).eval()
    with torch.inference_mode():
        expected, _ = module(*(torch.from_numpy(array) for array in (images, visible, masked)))
    drawn = bundle.reconstruct(images, visible, masked)
    assert drawn.shape == images.shape
    assert np.abs(drawn - expected.numpy()).max() < 1e-4
    assert bundle.skip_reconstruct(images).shape == images.shape
    row, column = divmod(int(masked[0, 0]), 4)
    images[:, :, row * 16 : (row + 1) * 16, column * 16 : (column + 1) * 16] ^= 255
    assert np.array_equal(bundle.reconstruct(images, visible, masked), drawn)
    parity = trained.read_metrics("export") or {}
    assert parity["max_abs_diff"] < 1e-4
    assert parity["token_agreement"] >= 0.999


def test_the_whole_report_is_drawn(trained: Workspace) -> None:
    from pipeline import report

    report.run(trained)
    page = (trained.report / "index.html").read_text()
    assert "of 32 tokenizer codes in use" in page
    assert "of 32 codes are in use" in page


def test_imported_files_are_read_by_the_stage_too(
    prepared: Workspace, another: Callable[..., Workspace], caplog: pytest.LogCaptureFixture
) -> None:
    places = {f"tokenizer.dalle_{part}": f"imported/{part}.safetensors" for part in ("encoder", "decoder")}
    workspace = another(places)
    files = [prepared.root / f"data/dalle/{part}.pkl" for part in ("encoder", "decoder")]
    with caplog.at_level(logging.INFO):
        import_dalle.run(files[0], files[1], workspace.root / "imported")
    assert "DALL-E tokenizer of 32 codes" in caplog.text
    tokenizer.run(workspace)
    target = load_target(workspace.target)
    assert all(torch.equal(target.state_dict()[key], value) for key, value in small_target().state_dict().items())


def test_nothing_is_written_where_the_import_is_refused(prepared: Workspace, tmp_path: Path) -> None:
    encoder = prepared.root / "data/dalle/encoder.pkl"
    with pytest.raises(UserError, match="not the decoder"):
        import_dalle.run(encoder, encoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_dtype_is_measured_and_the_choice_is_stored(
    another: Callable[..., Workspace], caplog: pytest.LogCaptureFixture
) -> None:
    workspace = another({"runtime.precision": "bf16", "runtime.device": "cpu"})
    with caplog.at_level(logging.INFO):
        tokenizer.run(workspace)
    quality, efficiency = (workspace.read_metrics(name) or {} for name in ("tokenizer", "efficiency/tokenizer"))
    for dtype in ("float32", "bfloat16"):
        assert 0.9 < quality[f"{dtype}_agreement"] <= 1
        assert efficiency[f"{dtype}_images_per_s"] > 0
        assert f"{dtype:<9} channels last" in caplog.text
    target = load_target(workspace.target)
    assert isinstance(target, DalleTarget)
    (chosen,) = [line for line in caplog.text.splitlines() if "(chosen)" in line]
    assert chosen.split()[0] == target.architecture.dtype
    assert ("channels last" in chosen) == target.architecture.channels_last


def test_the_fastest_that_agrees_is_chosen() -> None:
    slow, fast = Trial("float32", False, 10.0, 1.0), Trial("bfloat16", True, 30.0, 0.9991)
    wrong = Trial("float16", True, 40.0, 0.9989)
    assert dalle.choose([slow, fast, wrong]) == fast
    assert dalle.choose([slow, wrong]) == slow
    assert dalle.images_per_s([slow, slow._replace(images_per_s=12.0), fast]) == {
        "float32_images_per_s": 12.0,
        "bfloat16_images_per_s": 30.0,
    }
    assert dalle.agreements([fast, fast._replace(agreement=0.5)]) == {"bfloat16_agreement": 0.5}


def test_colour_images_and_patches_of_the_tokenizer_s_own_size(another: Callable[..., Workspace]) -> None:
    workspace = another({"prepare.channels": 3, "model.image_size": (32, 40), "model.patch_size": 8})
    for stage in (prepare, tokenizer, pretrain):
        stage.run(workspace)
    hardware = Hardware.choose(workspace.params.runtime)
    target = load_target(workspace.target)
    transform = pretrain.training_transform(workspace.params, target)
    source = train_batches(workspace, transform, batch_size=4, total_steps=1, share=WHOLE, hardware=hardware)
    batches = source(0)
    assert "target_images" not in next(iter(batches))
    images = unit_range(first_images(workspace, "val", workspace.preprocessing(), 3))
    assert target.decode(target.encode(target.view(images))).shape == (3, 3, 32, 40)


def test_images_of_many_channels_are_refused(another: Callable[..., Workspace]) -> None:
    workspace = another({})
    path = workspace.prepared / "index.json"
    path.write_text(path.read_text().replace('"channels": 1', '"channels": 4'))
    with pytest.raises(UserError, match=r"tokenizer\.kind: dalle reads images of 1 or 3 channels, and .* has 4"):
        tokenizer.run(workspace)
