"""The contenders, each as a function that does one whole training step on the same images."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.training.plain import PlainCae, PlainStep
from benchmarks.training.setting import (
    ALIGNMENT_WEIGHT,
    BEIT_MASKED_SHARE,
    CAE_LAYER_SCALE,
    CLIP_GRAD,
    DROP_PATH,
    LR,
    MAE_MASKED_SHARE,
    MASKED_SHARE,
    PREDICTOR_DEPTH,
    VOCAB_SIZE,
    WEIGHT_DECAY,
    Setting,
)
from cae.masking import MaskSampler
from cae.train.optimizer import BETAS, EPS
from pipeline.batches import draw_masks

Step = Callable[[], object]


@dataclass(frozen=True)
class Batch:
    """What every contender is given, on the device: the same images, and tokens of all patches."""

    images: Tensor  # uint8 [b, 3, h, w], as the loader gives them
    normalized: Tensor  # float32, for those that do not count this in
    tokens: Tensor  # int64 [b, n]
    setting: Setting

    @classmethod
    def draw(cls, setting: Setting) -> "Batch":
        rng = torch.Generator().manual_seed(0)
        size = (setting.batch_size, 3, setting.image_size, setting.image_size)
        images = torch.randint(0, 256, size, dtype=torch.uint8, generator=rng)
        tokens = torch.randint(0, VOCAB_SIZE, (setting.batch_size, setting.num_patches), generator=rng)
        normalized = (images.float() / 255 - 0.5) / 0.25
        device = setting.device
        return cls(images.to(device), normalized.to(device), tokens.to(device), setting)

    def masks(self, share: float) -> tuple[Tensor, Tensor]:
        """Indices of the visible [b, v] and of the masked patches [b, m]."""
        sampler = MaskSampler(self.setting.grid, self.setting.num_masked(share), "block", 0.08)
        visible, masked = draw_masks(sampler, 0, range(self.setting.batch_size))
        return visible.to(self.setting.device), masked.to(self.setting.device)

    def bool_mask(self, share: float) -> Tensor:
        """True for masked patches, [b, n]."""
        _, masked = self.masks(share)
        mask = torch.zeros(self.tokens.shape, dtype=torch.bool, device=self.setting.device)
        return mask.scatter(1, masked, torch.ones_like(masked, dtype=torch.bool))


def _plain(batch: Batch) -> Step:
    setting = batch.setting
    model = PlainCae(
        grid=setting.grid,
        patch_size=setting.patch_size,
        width=setting.width,
        depth=setting.depth,
        num_heads=setting.num_heads,
        predictor_depth=PREDICTOR_DEPTH,
        vocab_size=VOCAB_SIZE,
        layer_scale=CAE_LAYER_SCALE,
        drop_path=DROP_PATH,
    )
    step = PlainStep(model.to(setting.device).train(), ALIGNMENT_WEIGHT, CLIP_GRAD, LR, WEIGHT_DECAY)
    mask = batch.bool_mask(MASKED_SHARE)
    return lambda: step(batch.normalized, mask, batch.tokens)


def _beit(batch: Batch) -> Step:
    from transformers import BeitConfig, BeitForMaskedImageModeling

    config = BeitConfig(
        vocab_size=VOCAB_SIZE,
        use_mask_token=True,
        use_absolute_position_embeddings=False,
        use_shared_relative_position_bias=True,
        drop_path_rate=DROP_PATH,
        layer_scale_init_value=CAE_LAYER_SCALE,
        **_transformer(batch.setting),
    )
    mask = batch.bool_mask(BEIT_MASKED_SHARE)
    labels = batch.tokens[mask]

    def loss(model: Any) -> Tensor:
        return model(batch.normalized, bool_masked_pos=mask, labels=labels).loss

    return _peer(BeitForMaskedImageModeling(config), loss, batch.setting)


def _mae(batch: Batch) -> Step:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(mask_ratio=MAE_MASKED_SHARE, norm_pix_loss=True, **_transformer(batch.setting))
    return _peer(ViTMAEForPreTraining(config), lambda model: model(batch.normalized).loss, batch.setting)


def _transformer(setting: Setting) -> dict[str, Any]:
    return {
        "image_size": setting.image_size,
        "patch_size": setting.patch_size,
        "hidden_size": setting.width,
        "num_hidden_layers": setting.depth,
        "num_attention_heads": setting.num_heads,
        "intermediate_size": 4 * setting.width,
        "attn_implementation": "sdpa",
    }


def _peer(model: nn.Module, loss_of: Callable[[nn.Module], Tensor], setting: Setting) -> Step:
    """The step that ours does, around a model of transformers: same autocast, clipping and fused AdamW."""
    model.to(setting.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, BETAS, EPS, WEIGHT_DECAY, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with setting.hardware.autocast():
            loss = loss_of(model)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.step()
        return loss.detach()

    return step


def _cae(batch: Batch) -> Step:
    from benchmarks.training.ours import OurStep

    visible, masked = batch.masks(MASKED_SHARE)
    step = OurStep(batch.setting, batch.tokens)
    labels = batch.tokens[:, 0]  # the loader gives some, and nothing reads them
    fed = {"images": batch.images, "visible": visible, "masked": masked, "labels": labels}
    return lambda: step(fed)


BUILDERS: dict[str, Callable[[Batch], Step]] = {"cae": _cae, "plain": _plain, "beit": _beit, "mae": _mae}
PEERS = ("beit", "mae")
MEANINGS = {
    "cae": "our step",
    "plain": "plain CAE, float32",
    "beit": "transformers BEiT",
    "mae": "transformers ViTMAE",
}


def left_out(names: tuple[str, ...]) -> dict[str, str]:
    """Which of the contenders cannot run here, and why."""
    if importlib.util.find_spec("transformers"):
        return {}
    reason = "transformers is not installed; `pip install transformers` (5 or newer) adds this peer"
    return {name: reason for name in names if name in PEERS}


def build(name: str, batch: Batch) -> Step:
    """One contender with random weights, in train mode on the device; a call is one training step."""
    torch.manual_seed(0)
    return BUILDERS[name](batch)
