"""What was imported walks the same path as what was trained here: measured, trained further, exported."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cae.errors import UserError
from cae.foreign import read_state
from cae.targets.files import save_target
from cae.targets.pixels import PixelArchitecture, PixelTarget
from cae.weights import describe, for_finetuning, load_trained, save_trained
from pipeline import export, export_formats, finetune, imports, pretrain, probe, report
from pipeline.batches import first_images
from pipeline.checkpoints import preprocessing_of
from pipeline.graphs import EncoderGraph
from pipeline.inference import embed
from pipeline.runs import make_stamp
from pipeline.workspace import Workspace
from serving.bundle import Bundle, CapabilityError
from tests.dalle_files import small_target, write_published
from tests.official import GRID, finetuned_state, official_state
from tests.pipeline.command import cae_pipe
from tests.pipeline.conftest import MakeWorkspace
from tests.pipeline.test_parameters import on_finished
from tests.tiny import with_values

# As large as the digits of the tiny workspace: 28 px, one channel, patches of 7.
TIMM = {"img_size": 28, "patch_size": 7, "in_chans": 1, "depth": 2, "embed_dim": 32, "num_heads": 2}
KINDS = {
    "class token": {},
    "registers": {"reg_tokens": 4},
    "average pooling": {"class_token": False, "global_pool": "avg"},
}


@pytest.fixture
def workspace(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> Workspace:
    """Prepared digits, a tokenizer and a pretrained model that this test may change."""
    return on_finished(tmp_path / "workspace", finished, tiny_params, make_workspace)


@pytest.fixture
def bare(tmp_path: Path, tiny_params: dict[str, Any], make_workspace: MakeWorkspace) -> Workspace:
    """Parameters and nothing else."""
    return make_workspace(tmp_path / "bare", tiny_params)


def write_official(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"model": state, "epoch": 1599, "optimizer": {"state": {}}}, path)
    return path


def import_official(folder: Path, state: dict[str, Tensor]) -> Path:
    checkpoint = write_official(folder / "official.pth", state)
    imports.official(checkpoint, folder / "imported", 4, 2, None, None, None)
    return folder / "imported"


def import_timm(folder: Path, **changes: Any) -> Path:
    """A timm model of the digits' size with random weights, through timm's own kind of folder."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **TIMM, **changes).eval()
    timm.models.save_for_hf(
        model, folder / "timm", safe_serialization=True, data_config={"mean": (0.1,), "std": (0.3,)}
    )
    imports.from_timm_model(str(folder / "timm"), folder / "imported", None, None, None, None)
    return folder / "imported"


def largest_difference(bundle: Bundle, weights: Path) -> float:
    trained = load_trained(weights)
    size = (3, trained.architecture.channels, *trained.architecture.size_px)
    images = np.random.default_rng(5).integers(0, 256, size, dtype=np.uint8)
    graph = EncoderGraph(trained.encoder, trained.normalization).eval()
    with torch.inference_mode():
        ours = graph.features(torch.from_numpy(images))
    served = bundle.embed(images)
    assert list(served) == list(ours)
    return max(float(np.abs(served[name] - ours[name].numpy()).max()) for name in bundle.info.outputs)


def test_an_official_checkpoint_is_exported_without_images_or_target(bare: Workspace, tmp_path: Path) -> None:
    weights = import_official(tmp_path, official_state())
    parity = export.export(bare, weights, tmp_path / "bundle", {}, []).parity
    assert parity.max_abs_diff < 1e-4
    bundle = Bundle.open(tmp_path / "bundle", "cpu")
    assert largest_difference(bundle, weights) < 1e-4
    assert bundle.info.model.grid == GRID
    described = json.loads((tmp_path / "bundle/bundle.json").read_text())
    assert described["normalization"]["mean"] == [0.485, 0.456, 0.406]
    assert described["capabilities"] == {"embed": True, "reconstruct": False, "skip_reconstruct": False}
    assert described["origin"]["source"] == "official CAE checkpoint official.pth"
    with pytest.raises(CapabilityError):
        bundle.draw_mask("random", None, 0)


def test_with_its_target_beside_it_an_official_checkpoint_reconstructs(bare: Workspace, tmp_path: Path) -> None:
    weights = import_official(tmp_path, official_state(vocab_size=48))
    target = PixelTarget(PixelArchitecture(channels=3, patch_size=4, grid=GRID, per_patch=False), [0.5] * 3, [0.2] * 3)
    save_target(weights / "target.safetensors", target, {})
    export.export(bare, weights, tmp_path / "bundle", {}, [])
    bundle = Bundle.open(tmp_path / "bundle", "cpu")
    assert bundle.info.capabilities.reconstruct
    assert bundle.info.default_mask_ratio == 0.5


def test_with_the_dalle_tokenizer_an_official_checkpoint_reconstructs(bare: Workspace, tmp_path: Path) -> None:
    tokenizer = small_target()
    encoder, decoder = write_published(tmp_path, tokenizer)
    done = cae_pipe("import", "dalle", str(encoder), str(decoder), "--out", "dalle", cwd=bare.root)
    assert done.returncode == 0, done.stderr
    state = official_state(patch_size=16, vocab_size=tokenizer.num_outputs)
    checkpoint, dalle = write_official(tmp_path / "official.pth", state), bare.root / "dalle"
    imports.official(checkpoint, tmp_path / "imported", 4, 2, None, None, dalle)
    assert export.export(bare, tmp_path / "imported", tmp_path / "bundle", {}, []).parity.token_agreement >= 0.999
    bundle = Bundle.open(tmp_path / "bundle", "cpu")
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 16 * GRID[0], 16 * GRID[1]), dtype=np.uint8)
    _, (visible, masked) = bundle.draw_mask("random", None, seed=0)
    completed = bundle.reconstruct(images, visible[None].repeat(2, 0), masked[None].repeat(2, 0))
    assert completed.shape == images.shape
    wrong = write_official(tmp_path / "wrong.pth", official_state(patch_size=16, vocab_size=5))
    with pytest.raises(UserError, match=rf"--dalle: .*dalle has {tokenizer.num_outputs} codes, the decoder predicts 5"):
        imports.official(wrong, tmp_path / "other", 4, 2, None, None, dalle)
    small = write_official(tmp_path / "small.pth", official_state(patch_size=4))
    with pytest.raises(UserError, match="--dalle: patches of 4 px and 3 channels; expected a multiple of 8 px"):
        imports.official(small, tmp_path / "other", 4, 2, None, None, dalle)


def test_a_finetuned_official_encoder_is_exported(bare: Workspace, tmp_path: Path) -> None:
    weights = import_official(tmp_path, finetuned_state())
    export.export(bare, weights, tmp_path / "bundle", {}, [])
    assert largest_difference(Bundle.open(tmp_path / "bundle", "cpu"), weights) < 1e-4


def test_mean_and_std_may_be_told_and_must_fit(tmp_path: Path) -> None:
    checkpoint = write_official(tmp_path / "official.pth", official_state())
    imports.official(checkpoint, tmp_path / "imported", 4, 2, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], None)
    assert load_trained(tmp_path / "imported").normalization == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    with pytest.raises(UserError, match=r"--mean: 1 values for 3 channels"):
        imports.official(checkpoint, tmp_path / "other", 4, 2, [0.1], None, None)
    with pytest.raises(UserError, match=r"--std: \[0\.1, 0\.0, 0\.1\] must be above 0"):
        imports.official(checkpoint, tmp_path / "other", 4, 2, None, [0.1, 0.0, 0.1], None)


class Planted:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("command", [["official"], ["timm", "--architecture", "vit_tiny_patch16_224"]])
def test_a_checkpoint_that_carries_code_is_refused_by_the_command(command: list[str], tmp_path: Path) -> None:
    torch.save({"model": official_state(), "hook": Planted(tmp_path / "proof")}, tmp_path / "planted.pth")
    done = cae_pipe("import", command[0], "planted.pth", *command[1:], "--out", "imported", cwd=tmp_path)
    assert done.returncode == 2
    assert "planted.pth: carries code or objects beside tensors" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["planted.pth"]


def test_the_commands_import_and_export(tmp_path: Path, bare: Workspace) -> None:
    write_official(bare.root / "official.pth", official_state())
    heads = ("--num-heads", "4", "--predictor-heads", "2")
    done = cae_pipe("import", "official", "official.pth", "--out", "imported", *heads, cwd=bare.root)
    assert done.returncode == 0, done.stderr
    assert "keys used; dropped: " in done.stderr
    done = cae_pipe("export", "--checkpoint", "imported", "--out", "timm", "--format", "timm", cwd=bare.root)
    assert done.returncode == 0, done.stderr
    model = timm.create_model(f"local-dir:{bare.root / 'timm'}", pretrained=True)
    assert model.pretrained_cfg["mean"] == [0.485, 0.456, 0.406]
    for options in (("--format", "timm"), ("--checkpoint", "imported")):
        done = cae_pipe("export", *options, cwd=bare.root)
        assert (done.returncode, "--out: give the folder" in done.stderr) == (2, True)
    assert not bare.bundle.exists()


@pytest.mark.parametrize("state", [official_state, finetuned_state])
def test_the_way_through_timm_loses_nothing(state: Callable[[], dict[str, Tensor]], tmp_path: Path) -> None:
    weights = import_official(tmp_path, state())
    export_formats.to_timm_folder(weights, tmp_path / "exported")
    assert (tmp_path / "exported/model.safetensors").stat().st_mode & 0o044
    imports.from_timm_model(str(tmp_path / "exported"), tmp_path / "back", None, None, None, None)
    first, back = load_trained(weights), load_trained(tmp_path / "back")
    assert back.architecture == first.architecture or back.cae is None
    assert (back.normalization, back.eval_crop) == (first.normalization, first.eval_crop)
    ours, theirs = first.encoder.state_dict(), back.encoder.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    images = torch.randn(2, 3, 12, 20)
    model = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True).eval()
    with torch.no_grad():
        assert (model.forward_features(images) - first.encoder(images)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_timm_model_is_probed_exported_and_embeds(kind: str, workspace: Workspace, tmp_path: Path) -> None:
    weights = import_timm(tmp_path, **KINDS[kind])
    measuring = workspace.measuring(weights, tmp_path / "measured")
    for name in ("linear", "attentive", "knn"):
        probe.run(measuring, name)
        figures = json.loads((tmp_path / f"measured/metrics/probe_{name}.json").read_text())
        assert 0 <= figures["top1"] <= 1
    trained = load_trained(weights)
    (cached,) = (tmp_path / "measured/scratch").glob("probe-*/pretrained-val.safetensors")
    images = first_images(workspace, "val", preprocessing_of(trained), 4)
    with torch.inference_mode():
        own = EncoderGraph(trained.encoder, trained.normalization).eval().features(images)
    assert torch.allclose(load_file(cached)["pooled"][:4], own["pooled"], atol=1e-5), "the weights that were given"
    assert export.export(workspace, weights, tmp_path / "bundle", {}, []).parity.max_abs_diff < 1e-4
    bundle = Bundle.open(tmp_path / "bundle", "cpu")
    assert largest_difference(bundle, weights) < 1e-4
    assert ("class_token" in bundle.info.outputs) == (kind != "average pooling")
    digits = Path(workspace.params.prepare.source.removeprefix("folder:")) / "1"
    assert embed(bundle, [digits], tmp_path / "features.npz", ["pooled"], 8) == []
    assert np.load(tmp_path / "features.npz")["pooled"].shape == (40, 32)
    if kind == "average pooling":
        with pytest.raises(CapabilityError, match="has no class_token; it gives patches, pooled"):
            bundle.embed(np.zeros((1, 1, 28, 28), np.uint8), ["class_token"])


def test_a_probe_of_a_class_token_that_is_not_there_is_refused(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    raw = with_values(tiny_params, {"probe.knn.feature": "class_token", "probe.attentive.use_class_token": True})
    workspace = on_finished(tmp_path / "workspace", finished, raw, make_workspace)
    weights = import_timm(tmp_path, **KINDS["average pooling"])
    measuring = workspace.measuring(weights, tmp_path / "measured")
    with pytest.raises(UserError, match=r"no class token; set probe\.knn\.feature: pooled"):
        probe.run(measuring, "knn")
    with pytest.raises(UserError, match=r"no class token; set probe\.attentive\.use_class_token: false"):
        probe.run(measuring, "attentive")
    probe.run(measuring, "linear")


@pytest.mark.parametrize("kind", ["registers", "average pooling"])
def test_a_timm_model_is_finetuned_and_what_came_of_it_exported(
    kind: str, workspace: Workspace, tmp_path: Path
) -> None:
    measuring = workspace.measuring(import_timm(tmp_path, **KINDS[kind]), tmp_path / "measured")
    finetune.run(measuring)
    export.export(workspace, measuring.finetuned, tmp_path / "bundle", {}, [])
    assert largest_difference(Bundle.open(tmp_path / "bundle", "cpu"), measuring.finetuned) < 1e-4


def test_our_own_finetuned_encoder_is_exported_and_pooled_as_its_head_reads_it(
    finished: Workspace, tmp_path: Path
) -> None:
    export.export(finished, finished.finetuned, tmp_path / "bundle", {}, [])
    bundle = Bundle.open(tmp_path / "bundle", "cpu")
    assert largest_difference(bundle, finished.finetuned) < 1e-4
    images = np.random.default_rng(0).integers(0, 256, (4, 1, 28, 28), dtype=np.uint8)
    features = bundle.embed(images)
    assert np.abs(features["pooled"] - features["patches"].mean(axis=1)).max() > 1e-3


def pretrained_from(
    start: Path, folder: Path, finished: Workspace, raw: dict[str, Any], make: MakeWorkspace, **changes: Any
) -> Workspace:
    values = {"pretrain.start_from": str(start), **{key.replace("__", "."): value for key, value in changes.items()}}
    workspace = on_finished(folder, finished, with_values(raw, values), make)
    pretrain.run(workspace)
    return workspace


def test_pretraining_goes_on_from_an_earlier_run(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    workspace = pretrained_from(finished.pretrained, tmp_path, finished, tiny_params, make_workspace)
    before, after = (w.read_metrics("pretrain") or {} for w in (finished, workspace))
    assert after["decoding_loss"] < before["decoding_loss"]
    assert load_trained(workspace.pretrained).origin["started_from"] == load_trained(finished.pretrained).origin


@pytest.mark.parametrize("kind", KINDS)
def test_pretraining_starts_from_a_timm_encoder_and_is_exported(
    kind: str, tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    weights = import_timm(tmp_path, **KINDS[kind])
    workspace = pretrained_from(weights, tmp_path / "workspace", finished, tiny_params, make_workspace)
    trained = load_trained(workspace.pretrained)
    assert trained.cae is not None
    assert trained.normalization == load_trained(weights).normalization == ([0.1], [0.3])
    first, last = load_trained(weights).encoder.state_dict(), trained.encoder.state_dict()
    if kind == "average pooling":
        # Its norm was on the mean of the patches; CAE needs one on each.
        assert {key.split(".")[1] for key in first.keys() ^ last.keys()} == {"norm", "fc_norm"}
    else:
        assert first.keys() == last.keys()
    moved = max(float((first[key] - last[key]).abs().max()) for key in first.keys() & last.keys())
    assert 0 < moved < 0.1, "a few steps from the given weights, not from random ones"
    export.run(workspace)
    assert Bundle.open(workspace.bundle, "cpu").info.capabilities.reconstruct
    if kind == "average pooling":
        report.run(workspace)
        page = (workspace.report / "index.html").read_text()
        assert 'id="completions"' in page
        assert 'id="class-attention"' not in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.depth": 3}, r"set model\.depth: 2$"),
        ({"model.width": 64, "model.num_heads": 4}, r"set model\.width: 32, model\.num_heads: 2$"),
    ],
)
def test_a_start_of_other_sizes_names_the_parameters(
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    finished: Workspace,
    tiny_params: dict[str, Any],
    make_workspace: MakeWorkspace,
) -> None:
    raw = with_values(tiny_params, {"pretrain.start_from": str(finished.pretrained), **changes})
    with pytest.raises(UserError, match=said):
        pretrain.run(on_finished(tmp_path, finished, raw, make_workspace))


def test_channels_that_do_not_fit_the_prepared_images_are_named(workspace: Workspace, tmp_path: Path) -> None:
    weights = import_official(tmp_path, official_state())
    with pytest.raises(UserError, match=r"takes images of 3 channels, the prepared ones have 1; set prepare\.channels"):
        probe.run(workspace.measuring(weights, tmp_path / "measured"), "knn")


def test_the_target_belongs_to_the_weights(workspace: Workspace, tmp_path: Path) -> None:
    export_formats.to_safetensors(workspace, workspace.pretrained, tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["cae.safetensors", "target.safetensors"]
    other = PixelTarget(PixelArchitecture(channels=1, patch_size=7, grid=(4, 4), per_patch=False), [0.5], [0.2])
    save_target(workspace.target, other, {})
    export.export(workspace, workspace.pretrained, tmp_path / "alone", {}, [])
    assert not Bundle.open(tmp_path / "alone", "cpu").info.capabilities.reconstruct
    export.export(workspace, tmp_path / "whole", tmp_path / "together", {}, [])
    assert Bundle.open(tmp_path / "together", "cpu").info.capabilities.reconstruct


def test_a_file_of_timm_weights_needs_its_name_and_must_fit(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, in_chans=2)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    file, out = str(tmp_path / "vit.safetensors"), tmp_path / "imported"
    stats = [0.5, 0.5], [0.2, 0.2]
    with pytest.raises(UserError, match=r"vit\.safetensors: give timm's name of the model with --architecture"):
        imports.from_timm_model(file, out, None, None, *stats)
    with pytest.raises(UserError, match=r"do not fit the architecture: keys of another shape \(1\): pos_embed"):
        imports.from_timm_model(file, out, "vit_tiny_patch16_224", None, *stats)
    imports.from_timm_model(file, out, "vit_tiny_patch16_224", (32, 32), *stats)
    trained = load_trained(out)
    assert (trained.architecture.channels, trained.architecture.grid) == (2, (2, 2))
    state = read_state(tmp_path / "vit.safetensors")
    assert torch.equal(trained.encoder.state_dict()["model.pos_embed"], state["pos_embed"])


def test_a_size_that_cannot_be_is_refused(tmp_path: Path) -> None:
    import_timm(tmp_path)
    with pytest.raises(UserError, match=r"--image-size: .*config\.json says the size already"):
        imports.from_timm_model(str(tmp_path / "timm"), tmp_path / "x", None, (96, 160), None, None)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match="patches of 16 px do not cover 97 x 97 px"):
        imports.from_timm_model(
            str(tmp_path / "vit.safetensors"), tmp_path / "x", "vit_tiny_patch16_224", (97, 97), None, None
        )


def test_names_that_cannot_be_had_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"vit_tiny_patch16: neither a file, a folder nor a model of timm.*nearest: vit_tiny_patch16_"
    ):
        imports.from_timm_model("vit_tiny_patch16", tmp_path / "x", None, None, None, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected config\.json and model\.safetensors"):
        imports.from_timm_model(str(tmp_path / "empty"), tmp_path / "x", None, None, None, None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"could not be fetched.*import timm FILE --architecture vit_tiny_patch16_224"):
        imports.from_timm_model("vit_tiny_patch16_224", tmp_path / "x", None, None, None, None)
    assert not (tmp_path / "x").exists()


def test_an_import_or_export_never_replaces_anything(workspace: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    checkpoint = write_official(tmp_path / "official.pth", official_state())
    for name in ("precious.txt", "config.json", "cae.safetensors"):
        (out / name).write_text("keep me")
        for write in (
            lambda: export_formats.to_timm_folder(workspace.pretrained, out),
            lambda: export_formats.to_safetensors(workspace, workspace.pretrained, out),
            lambda: imports.from_timm_model("vit_tiny_patch16_224", out, None, None, None, None),
            lambda: imports.official(checkpoint, out, 4, 2, None, None, None),
            lambda: export.export(workspace, workspace.pretrained, out, {}, []),
        ):
            with pytest.raises(UserError, match=r"mine: (exists and is not empty|holds .* would be replaced)"):
                write()
        assert (out / name).read_text() == "keep me"
        (out / name).unlink()


def test_a_bundle_is_replaced_unless_something_else_lies_in_it(workspace: Workspace) -> None:
    before = (workspace.bundle / "bundle.json").read_text()
    export.export(workspace, workspace.finetuned, workspace.bundle, {}, [])
    after = (workspace.bundle / "bundle.json").read_text()
    assert before != after
    (workspace.bundle / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"holds notes\.txt and would be replaced"):
        export.export(workspace, workspace.pretrained, workspace.bundle, {}, [])
    assert (workspace.bundle / "bundle.json").read_text() == after


def test_weights_that_are_not_numbers_are_neither_imported_nor_exported(workspace: Workspace, tmp_path: Path) -> None:
    state = official_state()
    for name in ("encoder", "alignment_encoder"):
        state[f"{name}.norm.bias"] = torch.full((24,), float("nan"))
    checkpoint = write_official(tmp_path / "official.pth", state)
    with pytest.raises(UserError, match=r"encoder\.norm\.bias holds values that are not finite"):
        imports.official(checkpoint, tmp_path / "imported", 4, 2, None, None, None)
    trained = load_trained(workspace.pretrained)
    assert trained.cae is not None
    trained.cae.encoder.norm.bias.data[0] = float("nan")
    description = {key: value for key, value in trained.metadata.items() if key != "kind"}
    save_trained(workspace.pretrained, trained.cae, description)
    with pytest.raises(UserError, match=r"differ by nan"):
        export.export(workspace, workspace.pretrained, tmp_path / "bundle", {}, [])
    assert not (tmp_path / "bundle").exists()


def test_a_start_with_other_heads_of_regressor_and_decoder_is_refused(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    changes = {"pretrain.start_from": str(finished.pretrained), "pretrain.predictor_num_heads": 4}
    with pytest.raises(UserError, match=r"set pretrain\.predictor_num_heads: 2$"):
        pretrain.run(on_finished(tmp_path, finished, with_values(tiny_params, changes), make_workspace))


def test_only_plain_vision_transformers_start_a_pretraining(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    model = timm.create_model("eva02_tiny_patch14_224", num_classes=0, **TIMM)
    timm.models.save_for_hf(model, tmp_path / "timm", safe_serialization=True)
    imports.from_timm_model(str(tmp_path / "timm"), tmp_path / "eva", None, None, [0.1], [0.3])
    with pytest.raises(UserError, match=r"Eva: only timm's plain VisionTransformer of a fixed size can be pretrained"):
        pretrained_from(tmp_path / "eva", tmp_path / "workspace", finished, tiny_params, make_workspace)


def test_another_start_is_another_run(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    start = tmp_path / "start"
    export_formats.to_safetensors(finished, finished.pretrained, start)
    raw = with_values(tiny_params, {"pretrain.start_from": str(start)})
    workspace = on_finished(tmp_path / "workspace", finished, raw, make_workspace)
    before = make_stamp(workspace, "pretrain")["fingerprint"]
    assert make_stamp(workspace, "pretrain")["fingerprint"] == before
    trained = load_trained(start)
    assert trained.cae is not None
    trained.cae.encoder.cls_token.data += 1
    save_trained(start, trained.cae, {key: value for key, value in trained.metadata.items() if key != "kind"})
    assert make_stamp(workspace, "pretrain")["fingerprint"] != before


@pytest.mark.parametrize("kind", KINDS)
def test_a_finetuned_timm_model_goes_back_to_timm(kind: str, workspace: Workspace, tmp_path: Path) -> None:
    trained = load_trained(import_timm(tmp_path, **KINDS[kind]))
    encoder, architecture = for_finetuning(trained, 0.0, relative_position_bias=False, seed=None)
    description = describe(architecture, trained.normalization, 1.0, trained.origin)
    (tmp_path / "finetuned").mkdir()
    save_trained(tmp_path / "finetuned", encoder.eval(), description)
    export_formats.to_timm_folder(tmp_path / "finetuned", tmp_path / "exported")
    model = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True).eval()
    images = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        pooled = encoder.pool(encoder(images)[:, encoder.num_prefix :])
        assert (model(images) - pooled).abs().max() < 1e-5


def test_a_target_that_is_not_the_decoders_is_refused(bare: Workspace, tmp_path: Path) -> None:
    weights = import_official(tmp_path, official_state())
    other = PixelTarget(PixelArchitecture(channels=3, patch_size=4, grid=GRID, per_patch=False), [0.5] * 3, [0.2] * 3)
    save_target(weights / "target.safetensors", other, {})
    with pytest.raises(
        UserError, match=r"in patches of 4, 48 codes or values each; .* in patches of 4, 11 codes or values each"
    ):
        export.export(bare, weights, tmp_path / "bundle", {}, [])
