"""On a GPU every tensor of a training step is on the GPU: shown on a pretended one, for there may be no other.

The backward pass needs a real device: `make gpu-check` runs it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check.stage_steps import BUILDERS
from cae.targets.files import save_target
from cae.train.device import Hardware, choose_device
from cae.train.skipping import SkippedSteps
from pipeline import pretrain, tokenizer
from pipeline.workspace import Workspace
from tests.dalle_files import small_target
from tests.pipeline.conftest import MakeWorkspace
from tests.pretended import CUDA, pretended_cuda
from tests.tiny import with_values

# The training of a stage, and parameters that take it another way.
STEPS: list[tuple[str, dict[str, Any]]] = [
    ("tokenizer", {}),
    ("pretrain", {}),
    ("pretrain", {"pretrain.alignment_drop_path": True}),
    ("pretrain", {"runtime.activation_checkpointing": True}),
    ("pretrain", {"tokenizer.kind": "pixels", "tokenizer.normalize_pixels": True}),
    ("pretrain", {"tokenizer.kind": "dalle", "model.image_size": 32, "model.patch_size": 16}),
    ("finetune", {"finetune.mixup": 0.8, "finetune.cutmix": 1.0, "finetune.random_erase": 1.0}),
    ("finetune", {"finetune.relative_position_bias": True}),
    ("probe_linear", {}),
    ("probe_linear", {"probe.cache_features": False}),
    ("probe_attentive", {"probe.cache_features": False}),
]


def _workspace(folder: Path, finished: Workspace, raw: dict[str, Any], make_workspace: MakeWorkspace) -> Workspace:
    """The finished one's images and models, with other parameters and the target that they ask for."""
    workspace = make_workspace(folder, raw)
    (folder / "data").symlink_to(finished.root / "data")
    (folder / "models").mkdir()
    (folder / "models/pretrain").symlink_to(finished.pretrained)
    config = workspace.params.tokenizer
    if config.kind == "pixels":
        tokenizer.run(workspace)
    elif config.kind == "dalle":
        workspace.target.parent.mkdir()
        target = small_target(channels=1, grid=workspace.params.model.grid, dtype="bfloat16", channels_last=True)
        save_target(workspace.target, target, {})
    else:
        (folder / "models/tokenizer").symlink_to(finished.target.parent)
    return workspace


@pytest.mark.parametrize(("stage", "changes"), STEPS)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_step_leaves_nothing_on_the_cpu_and_reads_nothing_back(
    stage: str,
    changes: dict[str, Any],
    bf16: bool,
    finished: Workspace,
    tiny_params: dict[str, Any],
    make_workspace: MakeWorkspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workspace = _workspace(tmp_path / "root", finished, with_values(tiny_params, changes), make_workspace)
    with pretended_cuda():
        hardware = Hardware(choose_device("cuda"), bf16)
        training = BUILDERS[stage](workspace, hardware)
        step = training.train_step(SkippedSteps(stage, hardware.device, 1, None, None))
        # A value read back from the device, as by `item`, is an error: there is none.
        loss, parts = step.loss(next(iter(training.batches(0))), 0)
        assert {tensor.device for tensor in (loss, *parts.values())} == {CUDA}
        assert loss.dtype == torch.float32
        assert all(parameter.device == CUDA for parameter in step.parameters)
        if training.optimizer.defaults.get("fused"):  # the others decide on the host whether they step
            # The kernel itself needs a GPU: "non-finite step" of the check runs it.
            monkeypatch.setattr(training.optimizer, "step", lambda: None)
            for parameter in step.parameters:
                parameter.grad = torch.zeros_like(parameter)
            norm, bad = step.update(loss)
            assert norm.device == bad.device == CUDA


def test_an_evaluation_leaves_nothing_on_the_cpu(finished: Workspace) -> None:
    with pretended_cuda():
        hardware = Hardware(choose_device("cuda"), bf16=False)
        built = pretrain.build(finished, hardware)
        batch = next(iter(built.training.batches(0)))
        output, codes = built.objective.predict({key: value.to(CUDA) for key, value in batch.items()})
        assert output.prediction.device == codes.device == CUDA


def test_the_pretended_device_refuses_what_a_real_one_would() -> None:
    with pretended_cuda():
        there = torch.ones(2).to("cuda")
        assert (there + there).device == CUDA
        with pytest.raises(RuntimeError, match=r"same device|different devices"):
            there + torch.ones(2)
