"""Every parameter changes something: an option that is read and then lost would show here."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.modules.module import register_module_forward_hook

from cae.config import parse_params
from cae.data.order import WHOLE
from cae.data.transforms import CropFlip, CropTransform
from cae.errors import UserError
from cae.storage import read_weights
from cae.train.device import Hardware
from pipeline import export
from pipeline.batches import train_batches
from pipeline.workspace import Workspace
from tests.pipeline.conftest import STAGES, MakeWorkspace
from tests.tiny import shipped_params, with_values


@dataclass(frozen=True)
class Change:
    """Another value, the stage on which it must show, and what has to be set for it to matter at all."""

    value: Any
    stage: str
    given: dict[str, Any] = field(default_factory=dict)


PIXELS = {"tokenizer.kind": "pixels"}
AUGMENTED = {"probe.cache_features": False}
INT8 = {"export.int8": True}
CHANGES: dict[str, Change] = {
    "seed": Change(1, "prepare"),
    "runtime.precision": Change("bf16", "pretrain"),
    "runtime.accumulate_steps": Change(2, "pretrain"),
    "runtime.keep_checkpoints": Change(1, "pretrain"),
    "runtime.keep_every_steps": Change(1, "pretrain"),
    "prepare.channels": Change(3, "prepare"),
    "prepare.val_fraction": Change(0.5, "prepare"),
    "prepare.short_side_px": Change(14, "prepare"),
    "prepare.max_reject_fraction": Change(0.0, "prepare"),
    "prepare.shard_mb": Change(0.01, "prepare"),
    "model.depth": Change(1, "pretrain"),
    "model.width": Change(16, "pretrain"),
    "model.num_heads": Change(4, "pretrain"),
    "model.image_size": Change((14, 28), "tokenizer"),
    "model.patch_size": Change(4, "tokenizer"),
    "model.eval_crop": Change(0.5, "tokenizer"),
    "model.layer_scale": Change(0.5, "pretrain"),
    "tokenizer.kind": Change("pixels", "tokenizer"),
    "tokenizer.normalize_pixels": Change(True, "tokenizer", PIXELS),
    "tokenizer.vocab_size": Change(8, "tokenizer"),
    "tokenizer.code_width": Change(4, "tokenizer"),
    "tokenizer.hidden_width": Change(4, "tokenizer"),
    "tokenizer.num_res_blocks": Change(0, "tokenizer"),
    "tokenizer.epochs": Change(3, "tokenizer"),
    "tokenizer.batch_size": Change(16, "tokenizer"),
    "tokenizer.lr": Change(0.02, "tokenizer"),
    "tokenizer.min_lr": Change(0.001, "tokenizer"),
    "tokenizer.warmup_epochs": Change(0.0, "tokenizer"),
    "tokenizer.weight_decay": Change(0.5, "tokenizer"),
    "tokenizer.crop_scale": Change((0.1, 0.3), "tokenizer"),
    "tokenizer.flip": Change(1.0, "tokenizer"),
    "tokenizer.temperature_start": Change(2.0, "tokenizer"),
    "tokenizer.temperature_end": Change(0.5, "tokenizer"),
    "tokenizer.usage_weight": Change(10.0, "tokenizer"),
    "tokenizer.min_perplexity": Change(16.0, "tokenizer"),
    "pretrain.epochs": Change(3, "pretrain"),
    "pretrain.batch_size": Change(16, "pretrain"),
    "pretrain.lr": Change(0.01, "pretrain"),
    "pretrain.min_lr": Change(0.0005, "pretrain"),
    "pretrain.warmup_epochs": Change(0.0, "pretrain"),
    "pretrain.weight_decay": Change(0.5, "pretrain"),
    "pretrain.clip_grad": Change(0.01, "pretrain"),
    "pretrain.drop_path": Change(0.5, "pretrain"),
    "pretrain.crop_scale": Change((0.1, 0.3), "pretrain"),
    "pretrain.flip": Change(1.0, "pretrain"),
    "pretrain.mask.kind": Change("block", "pretrain"),
    "pretrain.mask.ratio": Change(0.5, "pretrain"),
    "pretrain.mask.min_block": Change(0.4, "pretrain", {"pretrain.mask.kind": "block"}),
    "pretrain.alignment_weight": Change(2.0, "pretrain"),
    "pretrain.alignment_warmup_epochs": Change(2.0, "pretrain"),
    "pretrain.alignment_drop_path": Change(True, "pretrain"),
    "pretrain.predictor_width": Change(16, "pretrain"),
    "pretrain.predictor_num_heads": Change(4, "pretrain"),
    "pretrain.predictor_layer_scale": Change(0.5, "pretrain"),
    "pretrain.regressor_depth": Change(2, "pretrain"),
    "pretrain.decoder_depth": Change(2, "pretrain"),
    "pretrain.checkpoint_every_steps": Change(1, "pretrain"),
    "pretrain.log_every_steps": Change(1, "pretrain"),
    "finetune.epochs": Change(3, "finetune"),
    "finetune.batch_size": Change(16, "finetune"),
    "finetune.lr": Change(0.02, "finetune"),
    "finetune.min_lr": Change(0.001, "finetune"),
    "finetune.warmup_epochs": Change(0.0, "finetune"),
    "finetune.weight_decay": Change(0.5, "finetune"),
    "finetune.layer_decay": Change(0.3, "finetune"),
    "finetune.relative_position_bias": Change(True, "finetune"),
    "finetune.drop_path": Change(0.5, "finetune"),
    "finetune.crop_scale": Change((0.1, 0.3), "finetune"),
    "finetune.flip": Change(1.0, "finetune"),
    "finetune.rand_augment": Change("rand-m9-mstd0.5-inc1", "finetune"),
    "finetune.mixup": Change(0.8, "finetune"),
    "finetune.cutmix": Change(1.0, "finetune"),
    "finetune.label_smoothing": Change(0.3, "finetune"),
    "finetune.random_erase": Change(1.0, "finetune"),
    "finetune.checkpoint_every_steps": Change(1, "finetune"),
    "probe.cache_features": Change(False, "probe_linear"),
    "probe.linear.epochs": Change(3, "probe_linear"),
    "probe.linear.batch_size": Change(16, "probe_linear"),
    "probe.linear.lr": Change(1.0, "probe_linear"),
    "probe.linear.min_lr": Change(0.1, "probe_linear"),
    "probe.linear.warmup_epochs": Change(0.0, "probe_linear"),
    "probe.linear.weight_decay": Change(0.5, "probe_linear"),
    "probe.linear.crop_scale": Change((0.1, 0.3), "probe_linear", AUGMENTED),
    "probe.linear.flip": Change(1.0, "probe_linear", AUGMENTED),
    "probe.attentive.epochs": Change(3, "probe_attentive"),
    "probe.attentive.batch_size": Change(16, "probe_attentive"),
    "probe.attentive.lr": Change(1.0, "probe_attentive"),
    "probe.attentive.min_lr": Change(0.05, "probe_attentive"),
    "probe.attentive.warmup_epochs": Change(0.0, "probe_attentive"),
    "probe.attentive.weight_decay": Change(0.5, "probe_attentive"),
    "probe.attentive.crop_scale": Change((0.1, 0.3), "probe_attentive", AUGMENTED),
    "probe.attentive.flip": Change(1.0, "probe_attentive", AUGMENTED),
    "probe.attentive.use_class_token": Change(True, "probe_attentive"),
    "probe.knn.k": Change(80, "probe_knn"),
    "probe.knn.temperature": Change(0.001, "probe_knn", {"probe.knn.k": 120}),
    "probe.knn.feature": Change("class_token", "probe_knn"),
    "export.opset": Change(19, "export"),
    "export.max_abs_diff": Change(1e-12, "export"),
    "export.num_examples": Change(1, "export"),
    "export.int8": Change(True, "export"),
    "export.fp16": Change(True, "export"),
    "export.gate.num_train_images": Change(8, "export", INT8),
    "export.gate.num_val_images": Change(8, "export", INT8),
    "export.gate.min_mean_cosine": Change(1.0, "export", INT8),
    "export.gate.min_worst_cosine": Change(1.0, "export", INT8),
}
# Shown by tests of their own below, for no artefact of a stage tells.
ELSEWHERE = {
    "runtime.device",
    "runtime.num_workers",
    "runtime.activation_checkpointing",
    "runtime.max_skipped_steps",
    "runtime.tensorboard",
    # tests/cae/test_compile.py
    "runtime.compile",
    # tests/e2e/test_processes.py, tests/cae/test_parallel.py
    "runtime.num_processes",
    "runtime.parallel",
    # tests/cae/test_remote_shards.py
    "prepare.shards_at",
    "prepare.source",
    "pretrain.start_from",
    "model.name",
    # tests/pipeline/test_dalle.py
    "tokenizer.dalle_encoder",
    "tokenizer.dalle_decoder",
    "export.min_token_agreement",
    # tests/pipeline/test_export.py
    "export.num_parity_images",
    # tests/pipeline/test_variants.py
    "export.gate.max_top1_drop",
}


def keys_of(raw: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys of all values of nested parameters."""
    keys = []
    for name, value in raw.items():
        keys += keys_of(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return keys


def on_finished(folder: Path, finished: Workspace, raw: dict[str, Any], make: MakeWorkspace) -> Workspace:
    """A workspace with other parameters and a copy of what the finished one made."""
    workspace = make(folder, raw)
    for place in ("data", "models", "metrics"):
        shutil.copytree(finished.root / place, folder / place)
    return workspace


Outcome = dict[str, str]


def outcome(folder: Path, finished: Workspace, raw: dict[str, Any], stage: str, make: MakeWorkspace) -> Outcome:
    """What the workspace holds after one more run of the stage, file by file; or the stage's error."""
    workspace = on_finished(folder, finished, raw, make)
    try:
        STAGES[stage](workspace)
    except UserError as error:
        return {"error": str(error)}
    made = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        relative = path.relative_to(folder)
        if relative.parts[0] == "scratch":
            # The folder's name has the parameters in it; which steps were saved is what counts.
            if path.suffix == ".pt":
                # Without its checksum, which the recorded parameters change.
                made[path.name[: len("step-000000000")]] = "saved"
            elif path.name == "log.jsonl":
                # Its times differ from run to run.
                made[path.name] = f"{len(path.read_text().splitlines())} rows"
        elif relative.parts[0] in ("data", "models", "metrics") and "efficiency" not in relative.parts:
            made[str(relative)] = _content(path)
    return made


def _content(path: Path) -> str:
    data = path.read_bytes()
    if path.name == "cae.safetensors":
        # The parameters are recorded in the file; only the weights must tell.
        state, _ = read_weights(path, "cae")
        data = b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in sorted(state.items()))
    if path.name in ("bundle.json", "MODEL_CARD.md") or "curves" in path.parts:
        return "there"
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def outcome_before(
    tmp_path_factory: pytest.TempPathFactory,
    finished: Workspace,
    tiny_params: dict[str, Any],
    make_workspace: MakeWorkspace,
) -> Callable[[Change], Outcome]:
    """What the stage makes without the change: run once for all changes that start from the same parameters."""
    known: dict[str, Outcome] = {}

    def before(change: Change) -> Outcome:
        key = json.dumps([change.stage, change.given])
        if key not in known:
            raw = with_values(tiny_params, change.given)
            folder = tmp_path_factory.mktemp("before") / "root"
            known[key] = outcome(folder, finished, raw, change.stage, make_workspace)
        return known[key]

    return before


def test_the_list_of_parameters_is_complete() -> None:
    assert set(keys_of(shipped_params())) == set(CHANGES) | ELSEWHERE


@pytest.mark.parametrize("key", CHANGES)
def test_parameter_changes_the_outcome(
    key: str,
    tmp_path: Path,
    finished: Workspace,
    tiny_params: dict[str, Any],
    make_workspace: MakeWorkspace,
    outcome_before: Callable[[Change], Outcome],
) -> None:
    change = CHANGES[key]
    raw = with_values(tiny_params, {**change.given, key: change.value})
    assert outcome(tmp_path / "after", finished, raw, change.stage, make_workspace) != outcome_before(change)


def test_the_same_parameters_have_the_same_outcome(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    for stage in ("prepare", "pretrain", "finetune"):
        first = outcome(tmp_path / f"{stage}1", finished, tiny_params, stage, make_workspace)
        second = outcome(tmp_path / f"{stage}2", finished, tiny_params, stage, make_workspace)
        assert first == second
        assert "error" not in first


def test_source_is_what_is_prepared(tmp_path: Path, tiny_params: dict[str, Any], make_workspace: MakeWorkspace) -> None:
    raw = with_values(tiny_params, {"prepare.source": "folder:/nowhere"})
    with pytest.raises(UserError, match=r"prepare\.source.*/nowhere"):
        STAGES["prepare"](make_workspace(tmp_path, raw))


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows the refusal of a machine without CUDA")
def test_device_cuda_is_refused_where_there_is_none(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    raw = with_values(tiny_params, {"runtime.device": "cuda"})
    result = outcome(tmp_path, finished, raw, "pretrain", make_workspace)
    assert "runtime.device" in result["error"]


def test_activation_checkpointing_computes_again_what_it_does_not_keep(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    calls = {}
    for checkpointed in (False, True):
        raw = with_values(tiny_params, {"runtime.activation_checkpointing": checkpointed})
        workspace = on_finished(tmp_path / str(checkpointed), finished, raw, make_workspace)
        counts: list[str] = []
        hook = register_module_forward_hook(lambda module, *_, seen=counts: seen.append(type(module).__name__))
        try:
            STAGES["pretrain"](workspace)
        finally:
            hook.remove()
        calls[checkpointed] = counts.count("LayerNorm")
    assert calls[True] > 1.4 * calls[False]
    weights = [tmp_path / str(checkpointed) / "models/pretrain/cae.safetensors" for checkpointed in (False, True)]
    assert _content(weights[0]) == _content(weights[1])


def test_accumulate_steps_changes_the_losses_by_rounding_alone(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    losses = []
    for steps in (1, 2):
        raw = with_values(tiny_params, {"runtime.accumulate_steps": steps, "pretrain.log_every_steps": 1})
        workspace = on_finished(tmp_path / str(steps), finished, raw, make_workspace)
        STAGES["pretrain"](workspace)
        log = next(workspace.scratch.glob("pretrain-*/log.jsonl"))
        losses.append([json.loads(line)["loss"] for line in log.read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) > 4


def test_max_skipped_steps_ends_a_training_that_diverges(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    raw = with_values(tiny_params, {"pretrain.lr": 1e30, "pretrain.warmup_epochs": 0.0, "runtime.max_skipped_steps": 1})
    result = outcome(tmp_path, finished, raw, "pretrain", make_workspace)
    assert "2 steps in a row, more than runtime.max_skipped_steps 1" in result["error"]
    written = [json.loads(line) for line in next(tmp_path.rglob("skipped-0.jsonl")).read_text().splitlines()]
    assert len(written) == 2
    assert all(key.endswith(".png") for row in written for key in row["keys"])


def test_tensorboard_gets_the_curves(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    raw = with_values(tiny_params, {"runtime.tensorboard": True})
    workspace = on_finished(tmp_path, finished, raw, make_workspace)
    STAGES["pretrain"](workspace)
    folder = next(tmp_path.glob("scratch/pretrain-*/tensorboard"))
    events = EventAccumulator(str(folder)).Reload()
    rows = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
    assert [(event.step, event.value) for event in events.Scalars("alignment_loss")] == [
        (row["step"], pytest.approx(row["alignment_loss"])) for row in rows
    ]


def test_num_workers_sets_the_processes_of_the_loader(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    for num_workers in (0, 2):
        raw = with_values(tiny_params, {"runtime.num_workers": num_workers})
        workspace = on_finished(tmp_path / str(num_workers), finished, raw, make_workspace)
        crop = CropTransform(CropFlip(workspace.params.model.size_px, workspace.params.pretrain))
        hardware = Hardware.choose(workspace.params.runtime)
        source = train_batches(workspace, crop, batch_size=8, total_steps=1, share=WHOLE, hardware=hardware)
        loader: Any = source(0)
        assert loader.num_workers == num_workers


def test_model_name_gives_depth_width_and_heads() -> None:
    sizes = {}
    for name in ("vit_nano", "vit_micro", "vit_tiny", "vit_small", "vit_base", "vit_large"):
        architecture = parse_params(with_values(shipped_params(), {"model.name": name})).architecture(3, 8)
        sizes[name] = (architecture.depth, architecture.width, architecture.num_heads)
    assert sizes["vit_small"] == (12, 384, 6)
    assert sizes["vit_base"] == (12, 768, 12)
    assert sizes["vit_large"] == (24, 1024, 16)
    assert len(set(sizes.values())) == len(sizes)


def test_min_token_agreement_is_the_gate() -> None:
    values = {"export.max_abs_diff": 1.0, "export.min_token_agreement": 0.99}
    config = parse_params(with_values(shipped_params(), values)).export
    export.check_parity(export.Parity(0.0, 0.995), config)
    with pytest.raises(UserError, match="min_token_agreement"):
        export.check_parity(export.Parity(0.0, 0.995), config.model_copy(update={"min_token_agreement": 0.999}))
