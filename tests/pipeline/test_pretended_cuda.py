"""On a GPU every tensor of a training step is on the GPU: shown on a pretended one, for there may be no other.

The backward pass needs a real device: `make gpu-check` runs it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD

from cae.heads import AttentiveHead
from cae.normalization import Normalization
from cae.targets.files import save_target
from cae.train.device import Hardware, choose_device
from cae.train.loop import Training
from cae.train.skipping import SkippedSteps
from cae.weights import for_finetuning, load_trained, trained_encoder
from pipeline import finetune, pretrain, probe, tokenizer
from pipeline.workspace import Workspace
from tests.dalle_files import small_target
from tests.pipeline.conftest import MakeWorkspace
from tests.pretended import CUDA, pretended_cuda
from tests.tiny import with_values

Build = Callable[[Workspace, Hardware], Training]


def _tokenizer(workspace: Workspace, hardware: Hardware) -> Training:
    index = workspace.index
    dvae = tokenizer.build(workspace.params, Normalization(index.mean, index.std)).to(hardware.device)
    return tokenizer.dvae_training(workspace, dvae, hardware)


def _pretrain(workspace: Workspace, hardware: Hardware) -> Training:
    return pretrain.build(workspace, hardware).training


def _finetune(workspace: Workspace, hardware: Hardware) -> Training:
    trained = load_trained(workspace.pretrained)
    encoder, _ = for_finetuning(trained, 0.1, relative_position_bias=True, seed=None)
    return finetune.build(workspace, encoder, trained, hardware)[0]


def _linear(workspace: Workspace, hardware: Hardware) -> Training:
    frozen, config = _frozen(workspace, hardware), workspace.params.probe.linear
    head, optimizer = probe.linear_probe(frozen.width, len(workspace.index.classes), config)
    return probe.probe_training(workspace, frozen, head, optimizer, config, probe.class_token)


def _attentive(workspace: Workspace, hardware: Hardware) -> Training:
    frozen, config = _frozen(workspace, hardware), workspace.params.probe.attentive
    head = AttentiveHead(frozen.width, 2, len(workspace.index.classes))
    return probe.probe_training(workspace, frozen, head, SGD(head.parameters(), lr=0.1), config, probe.all_tokens)


def _frozen(workspace: Workspace, hardware: Hardware) -> probe.FrozenEncoder:
    trained = load_trained(workspace.pretrained)
    return probe.FrozenEncoder("pretrained", trained_encoder(trained), trained, hardware)


STEPS: dict[str, tuple[Build, dict[str, Any]]] = {
    "tokenizer": (_tokenizer, {}),
    "pretrain": (_pretrain, {}),
    "pretrain, drop path on the target": (_pretrain, {"pretrain.alignment_drop_path": True}),
    "pretrain, activations checkpointed": (_pretrain, {"runtime.activation_checkpointing": True}),
    "pretrain, pixels": (_pretrain, {"tokenizer.kind": "pixels", "tokenizer.normalize_pixels": True}),
    "pretrain, dalle": (_pretrain, {"tokenizer.kind": "dalle", "model.image_size": 32, "model.patch_size": 16}),
    "finetune": (_finetune, {"finetune.mixup": 0.8, "finetune.cutmix": 1.0, "finetune.random_erase": 1.0}),
    "linear probe, images": (_linear, {"probe.cache_features": False}),
    "linear probe, features": (_linear, {}),
    "attentive probe, images": (_attentive, {"probe.cache_features": False}),
}


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


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_step_leaves_nothing_on_the_cpu(
    name: str,
    bf16: bool,
    finished: Workspace,
    tiny_params: dict[str, Any],
    make_workspace: MakeWorkspace,
    tmp_path: Path,
) -> None:
    build, changes = STEPS[name]
    workspace = _workspace(tmp_path / "root", finished, with_values(tiny_params, changes), make_workspace)
    with pretended_cuda():
        hardware = Hardware(choose_device("cuda"), bf16)
        training = build(workspace, hardware)
        step = training.train_step(SkippedSteps(name, hardware.device, 1, None, None))
        loss, parts = step.loss(next(iter(training.batches(0))), 0)
        assert {tensor.device for tensor in (loss, *parts.values())} == {CUDA}
        assert loss.dtype == torch.float32
        assert all(parameter.device == CUDA for parameter in step.parameters)
        bad = step.skipped.update((~loss.isfinite()).float())
        assert bad.device == CUDA


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
