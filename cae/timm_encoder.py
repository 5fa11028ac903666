"""Any Vision Transformer of timm as an encoder, behind the same few methods as our own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cae.architecture import EncoderArchitecture, TimmSource
from cae.drop_path import DropPath
from cae.errors import UserError


class TimmEncoder(nn.Module):
    """A timm model without its head. Its tokens are [class token,] patches; registers work inside and are left out.

    Positions are timm's, learned for one grid. Only a plain VisionTransformer can encode a part of the patches.
    """

    def __init__(self, architecture: EncoderArchitecture, drop_path: float = 0.0) -> None:
        super().__init__()
        assert architecture.timm is not None
        self.model: Any = create(architecture.timm, drop_path)
        self.num_prefix = int(has_class_token(self.model))
        self.has_attention = bool(self.num_prefix) and _exposes_attention(self.model)
        if architecture.final_norm == "pooled" and isinstance(fc_norm(self.model), nn.Identity):
            # As in fine-tuning: a fresh LayerNorm on the mean takes the place of the one on every token.
            self.model.norm, self.model.fc_norm = nn.Identity(), nn.LayerNorm(architecture.width, eps=1e-6)
        _use_our_drop_path(self.model)

    def embed(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Patch embeddings with positions, for all patches in row-major order."""
        self.check_masking()
        return self.model._pos_embed(self.model.patch_embed(images))[:, self.model.num_prefix_tokens :]

    def check_masking(self) -> None:
        """Raise UserError where the model cannot encode a part of the patches."""
        if type(self.model) is not VisionTransformer or self.model.dynamic_img_size:
            raise UserError(
                f"{type(self.model).__name__}: only timm's plain VisionTransformer of a fixed size can be pretrained "
                "further, for CAE shows the encoder a part of the patches; this one can be probed, fine-tuned, exported"
            )

    def encode(self, embedded: Float[Tensor, "b v d"], use_drop_path: bool = True) -> Float[Tensor, "b p+v d"]:
        """Representations of the class token, where there is one, and of the embedded patches."""
        model = self.model
        # Prefix tokens carry positions of their own in some models, so timm itself puts them before blank patches.
        blank = embedded.new_zeros(embedded.shape[0], model.patch_embed.num_patches, embedded.shape[-1])
        prefix = model._pos_embed(blank)[:, : model.num_prefix_tokens]
        with _drop_path(model.blocks, use_drop_path):
            tokens = model.norm(model.blocks(model.norm_pre(torch.cat([prefix, embedded], dim=1))))
        return self._without_registers(tokens)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b p+n d"]:
        """All patches visible."""
        return self._without_registers(self.model.forward_features(images))

    def forward_with_attention(
        self, images: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b p+n d"], Float[Tensor, "b heads n"] | None]:
        """As `forward`, and the class token's attention to every patch in the last block; None where timm hides it."""
        if not self.has_attention:
            return self(images), None
        with _attention(self.model) as seen:
            tokens = self(images)
        return tokens, seen[0][:, :, 0, self.model.num_prefix_tokens :]

    def pool(self, patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        """One vector an image: the mean of its patches, after the last LayerNorm."""
        return fc_norm(self.model)(patches.mean(dim=1))

    def _without_registers(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, self.model.num_prefix_tokens :]
        return torch.cat([tokens[:, :1], patches], dim=1) if self.num_prefix else patches


def create(source: TimmSource, drop_path: float = 0.0) -> nn.Module:
    """The model that `source` names, with random weights and without a head; UserError for what timm cannot build."""
    if not timm.is_model(source.name):
        raise UserError(f"{source.name}: not a model of timm {timm.__version__}; `timm.list_models('vit*')` lists them")
    options = {**source.args, **({"drop_path_rate": drop_path} if drop_path else {})}
    try:
        return timm.create_model(source.name, pretrained=False, num_classes=0, **options)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"timm {timm.__version__} cannot build {source.name} with {options}: {error}") from None


def architecture_of(model: Any, source: TimmSource) -> EncoderArchitecture:
    """The sizes of a timm model; UserError where it is no Vision Transformer that gives a vector for every patch."""
    try:
        embed, blocks = model.patch_embed, model.blocks
        grid, patch_size, size_px = embed.grid_size, embed.patch_size, embed.img_size
        channels, num_heads = embed.proj.in_channels, blocks[-1].attn.num_heads
        with torch.no_grad():
            tokens = model.eval().forward_features(torch.zeros(1, channels, *size_px))
        fits = tokens.shape == (1, model.num_prefix_tokens + grid[0] * grid[1], model.num_features)
        covered = (grid[0] * patch_size[0], grid[1] * patch_size[1])
    except (AttributeError, TypeError, IndexError, RuntimeError):
        fits = False
    if (
        fits
        and covered != tuple(size_px)
        and grid == tuple(side // p for side, p in zip(size_px, patch_size, strict=True))
    ):
        raise UserError(f"{source.name}: patches of {patch_size[0]} px do not cover {size_px[0]} x {size_px[1]} px")
    if not fits or patch_size[0] != patch_size[1] or covered != tuple(size_px):
        raise UserError(
            f"{source.name}: no Vision Transformer with one token for each square patch; timm lists them by "
            "`timm.list_models('vit*')`, deit, beit and eva work too"
        )
    return EncoderArchitecture(
        channels=channels,
        grid=(grid[0], grid[1]),
        patch_size=patch_size[0],
        depth=len(blocks),
        width=model.num_features,
        num_heads=num_heads,
        layer_scale=1.0,
        final_norm="tokens" if isinstance(fc_norm(model), nn.Identity) else "pooled",
        timm=source,
    )


def has_class_token(model: Any) -> bool:
    """Whether the first token of a timm model is a class token."""
    return model.num_prefix_tokens > 0 and getattr(model, "cls_token", None) is not None


def fc_norm(model: Any) -> nn.Module:
    """The LayerNorm between the mean of the patches and the head; an identity where there is none."""
    return getattr(model, "fc_norm", None) or nn.Identity()


def _exposes_attention(model: Any) -> bool:
    attention = model.blocks[-1].attn
    if not (hasattr(attention, "fused_attn") and hasattr(attention, "attn_drop")):
        return False
    rows, columns = model.patch_embed.grid_size
    num_tokens = model.num_prefix_tokens + rows * columns
    with torch.no_grad(), _attention(model) as seen:
        model.forward_features(torch.zeros(1, model.patch_embed.proj.in_channels, *model.patch_embed.img_size))
    return len(seen) == 1 and seen[0].shape[2:] == (num_tokens, num_tokens)


@contextmanager
def _attention(model: Any) -> Iterator[list[Tensor]]:
    """Collects the attention weights of the last block, which its fused kernel would not show."""
    attention = model.blocks[-1].attn
    seen: list[Tensor] = []
    fused, attention.fused_attn = attention.fused_attn, False
    hook = attention.attn_drop.register_forward_hook(lambda _module, _inputs, weights: seen.append(weights))
    try:
        yield seen
    finally:
        hook.remove()
        attention.fused_attn = fused


@contextmanager
def _drop_path(blocks: nn.Module, wanted: bool) -> Iterator[None]:
    """Without drop path inside, where it is not wanted; timm's blocks take no argument for it."""
    training = blocks.training
    if not wanted:
        blocks.eval()
    try:
        yield
    finally:
        blocks.train(training)


def _use_our_drop_path(model: nn.Module) -> None:
    """In place of timm's, which would draw anew on every process."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, timm.layers.DropPath):
                setattr(module, name, DropPath(child.drop_prob))
