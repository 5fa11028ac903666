"""The bundle: what torch computes, sealed, and the same bytes wherever it is made."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from cae.errors import UserError
from cae.targets.files import load_target
from cae.weights import load_trained
from pipeline import export
from pipeline.batches import first_images, unit_range
from pipeline.workspace import Workspace
from serving.bundle import Bundle
from serving.bundle_info import BundleError
from serving.masks import random_mask
from tests.pipeline.conftest import STAGES, MakeWorkspace
from tests.pipeline.test_parameters import on_finished
from tests.tiny import with_values


@pytest.fixture(scope="module")
def bundle(finished: Workspace) -> Bundle:
    return Bundle.open(finished.bundle, "cpu")


@pytest.fixture(scope="module")
def images(finished: Workspace) -> np.ndarray:
    return first_images(finished, "val", finished.preprocessing(), 6).numpy()


def test_features_are_those_of_torch(finished: Workspace, bundle: Bundle, images: np.ndarray) -> None:
    loaded = load_trained(finished.pretrained)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in loaded.normalization)
    with torch.inference_mode():
        tokens = loaded.encoder((unit_range(torch.from_numpy(images)) - mean) / std).numpy()
    features = bundle.embed(images)
    assert np.abs(features["patches"] - tokens[:, 1:]).max() < 1e-4
    assert np.abs(features["class_token"] - tokens[:, 0]).max() < 1e-4
    assert np.abs(features["pooled"] - tokens[:, 1:].mean(axis=1)).max() < 1e-4
    assert features["class_attention"].shape == (6, 2, 16)
    assert (features["class_attention"].sum(axis=-1) < 1).all()


def test_reconstruction_is_that_of_torch(finished: Workspace, bundle: Bundle, images: np.ndarray) -> None:
    visible, masked = (part[None].repeat(6, axis=0) for part in random_mask(16, 0.5, seed=3))
    trained = load_trained(finished.pretrained)
    assert trained.cae is not None
    module = export.ReconstructorGraph(trained.cae, trained.normalization, load_target(finished.target)).eval()
    with torch.inference_mode():
        expected, _ = module(*(torch.from_numpy(array) for array in (images, visible, masked)))
    assert np.abs(bundle.reconstruct(images, visible, masked) - expected.numpy()).max() < 1e-4


def test_hidden_pixels_change_nothing_in_the_reconstruction(bundle: Bundle, images: np.ndarray) -> None:
    visible, masked = (part[None] for part in random_mask(16, 0.5, seed=0))
    other = images[:1].copy()
    row, column = divmod(int(masked[0, 0]), 4)
    other[:, :, row * 7 : (row + 1) * 7, column * 7 : (column + 1) * 7] ^= 255
    before = bundle.reconstruct(images[:1], visible, masked)
    assert np.array_equal(before, bundle.reconstruct(other, visible, masked))
    row, column = divmod(int(visible[0, 0]), 4)
    other[:, :, row * 7 : (row + 1) * 7, column * 7 : (column + 1) * 7] ^= 255
    assert not np.array_equal(before, bundle.reconstruct(other, visible, masked))


@pytest.mark.parametrize("num_masked", [1, 4, 15])
@pytest.mark.parametrize("batch", [1, 5])
def test_batch_and_mask_sizes_are_free(bundle: Bundle, images: np.ndarray, num_masked: int, batch: int) -> None:
    visible, masked = random_mask(16, num_masked / 16, seed=1)
    assert len(masked) == num_masked
    result = bundle.reconstruct(images[:batch], np.tile(visible, (batch, 1)), np.tile(masked, (batch, 1)))
    assert result.shape == (batch, 1, 28, 28)
    assert result.min() >= 0
    assert result.max() <= 1
    assert bundle.skip_reconstruct(images[:batch]).shape == (batch, 1, 28, 28)


def test_the_published_files_have_the_contract_s_inputs_and_outputs(finished: Workspace) -> None:
    contract = {
        "encoder.onnx": (["images"], ["patches", "class_token", "pooled", "class_attention"]),
        "reconstructor.onnx": (["images", "visible", "masked"], ["reconstruction"]),
        "skip_reconstructor.onnx": (["images"], ["reconstruction"]),
    }
    for file, (inputs, outputs) in contract.items():
        graph = onnx.load(finished.bundle / file).graph
        assert [value.name for value in graph.input] == inputs
        assert [value.name for value in graph.output] == outputs


def test_files_tell_nothing_of_the_machine(finished: Workspace) -> None:
    for path in finished.bundle.glob("*.onnx"):
        data = path.read_bytes()
        assert str(Path.home()).encode() not in data
        assert b".py" not in data


def test_bundle_json_names_where_the_model_comes_from(finished: Workspace) -> None:
    described = json.loads((finished.bundle / "bundle.json").read_text())
    assert described["origin"]["source"] == f"folder:{Path(finished.params.prepare.source).name}"
    assert described["metrics"]["probe_linear"] == finished.read_metrics("probe_linear")
    assert described["preprocessing"] == finished.preprocessing().model_dump()
    card = (finished.bundle / "MODEL_CARD.md").read_text()
    assert f"| probe_linear | top1 | {described['metrics']['probe_linear']['top1']:.6g} |" in card


def test_a_changed_file_is_refused(finished: Workspace, tmp_path: Path) -> None:
    for path in finished.bundle.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "encoder.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=r"encoder\.onnx"):
        Bundle.open(tmp_path, "cpu")


def test_where_parity_is_missed_nothing_is_published(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    raw = with_values(tiny_params, {"export.max_abs_diff": 1e-12})
    workspace = on_finished(tmp_path, finished, raw, make_workspace)
    before = (workspace.bundle / "bundle.json").read_bytes()
    with pytest.raises(UserError, match=r"export\.max_abs_diff"):
        export.run(workspace)
    assert (workspace.bundle / "bundle.json").read_bytes() == before


def test_a_single_parity_image_leaves_the_batch_free(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace, images: np.ndarray
) -> None:
    raw = with_values(tiny_params, {"export.num_parity_images": 1})
    workspace = on_finished(tmp_path, finished, raw, make_workspace)
    counts = [len(export.parity_images(root, load_trained(root.pretrained))) for root in (finished, workspace)]
    assert counts == [finished.params.export.num_parity_images, 1]
    export.run(workspace)
    assert Bundle.open(workspace.bundle, "cpu").embed(images[:3])["pooled"].shape == (3, 32)


def test_a_folder_that_is_no_bundle_is_never_replaced(finished: Workspace, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"holds precious\.txt and would be replaced"):
        export.export(finished, finished.pretrained, tmp_path, {}, [])
    assert (tmp_path / "precious.txt").read_text() == "keep me"


def test_pixel_targets_are_exported_too(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    workspace = on_finished(tmp_path, finished, with_values(tiny_params, {"tokenizer.kind": "pixels"}), make_workspace)
    for stage in ("tokenizer", "pretrain", "export"):
        STAGES[stage](workspace)
    assert "masked_psnr_db" in (workspace.read_metrics("pretrain") or {})
    bundle = Bundle.open(workspace.bundle, "cpu")
    images = first_images(workspace, "val", workspace.preprocessing(), 2).numpy()
    visible, masked = (part[None].repeat(2, axis=0) for part in random_mask(16, 0.5, seed=0))
    result = bundle.reconstruct(images, visible, masked)
    row, column = divmod(int(visible[0, 0]), 4)
    patch = np.s_[:, :, row * 7 : (row + 1) * 7, column * 7 : (column + 1) * 7]
    assert np.abs(result[patch] - images[patch] / 255).max() < 1e-5
