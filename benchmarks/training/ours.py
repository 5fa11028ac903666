"""Our training step, as `pretrain` runs it, by default with the tokens given in place of a tokenizer."""

from collections.abc import Callable
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.training.setting import (
    ALIGNMENT_WEIGHT,
    CAE_LAYER_SCALE,
    CLIP_GRAD,
    DROP_PATH,
    LR,
    PREDICTOR_DEPTH,
    VOCAB_SIZE,
    WEIGHT_DECAY,
    Setting,
)
from cae.architecture import Architecture
from cae.data.loader import Batch
from cae.model import ContextAutoencoder
from cae.normalization import Normalization
from cae.targets.files import AnyTarget
from cae.targets.tokens import TokenTarget
from cae.train.compile import compile_blocks
from cae.train.optimizer import BETAS, EPS
from cae.train.parallel import blocks_of
from cae.train.skipping import SkippedSteps
from cae.train.step import TrainStep
from pipeline.pretrain import Objective

NORMALIZATION = Normalization([0.5] * 3, [0.25] * 3)
NUM_STEPS = 10_000  # of the schedule, which stays at its first step


class GivenTokens(TokenTarget):
    """A target whose tokens were computed before, as BEiT's data sets have them."""

    kind = "given"
    patch_px = 1

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.num_outputs = VOCAB_SIZE
        self.tokens = tokens  # [b, n]

    def encode(self, view: Tensor) -> Tensor:
        return self.tokens


def architecture(setting: Setting, num_outputs: int = VOCAB_SIZE) -> Architecture:
    """The paper's model of that size; regressor and decoder are as wide as the encoder."""
    return Architecture(
        channels=3,
        grid=setting.grid,
        patch_size=setting.patch_size,
        depth=setting.depth,
        width=setting.width,
        num_heads=setting.num_heads,
        layer_scale=CAE_LAYER_SCALE,
        predictor_width=setting.width,
        predictor_num_heads=setting.num_heads,
        regressor_depth=PREDICTOR_DEPTH,
        decoder_depth=PREDICTOR_DEPTH,
        num_outputs=num_outputs,
        predictor_layer_scale=CAE_LAYER_SCALE,
    )


def compile_all_blocks(model: nn.Module, device: torch.device) -> None:
    """As `runtime.compile` has it."""
    compile_blocks(blocks_of(model), device)


class OurStep:
    """One step of `pretrain` on a batch of the loader; with the tokens given, or a target that computes them.

    `compile_model` does what `runtime.compile` does, where the setting asks for it.
    """

    def __init__(
        self,
        setting: Setting,
        target: Tensor | AnyTarget,
        compile_model: Callable[[nn.Module, torch.device], None] = compile_all_blocks,
    ) -> None:
        given: Any = GivenTokens(target) if isinstance(target, Tensor) else target
        self.model = ContextAutoencoder(architecture(setting, given.num_outputs), DROP_PATH).train()
        self.objective = Objective(self.model, given, NORMALIZATION, ALIGNMENT_WEIGHT, 0).to(setting.device)
        if setting.compile:
            compile_model(self.model, setting.device)
        optimizer = AdamW(self.model.parameters(), LR, BETAS, EPS, WEIGHT_DECAY, fused=True)
        self.step = TrainStep(
            self.model,
            self.objective,
            optimizer,
            CosineLRScheduler(optimizer, t_initial=NUM_STEPS, t_in_epochs=False),
            setting.hardware,
            clip_grad=CLIP_GRAD,
            accumulate=1,
            seed=0,
            skipped=SkippedSteps("bench", setting.device, 0, None, None),
        )

    def __call__(self, batch: Batch) -> None:
        self.step([batch], 0)
