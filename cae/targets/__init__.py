"""What the decoder predicts for a masked patch: tokens of a discrete VAE, or pixels."""

from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Codes = Tensor
"""Targets of patches: int64 [b, n] for tokens, float32 [b, n, p·p·c] for pixels."""


class TrainingLoss(NamedTuple):
    """A decoding loss, and what was learned on the way of how good the prediction is, without gradient."""

    loss: Float[Tensor, ""]
    scores: dict[str, Float[Tensor, ""]]


class Target(Protocol):
    """Everything that pretraining and reconstruction need from a target. Images are float32 in 0-1."""

    kind: str  # as in tokenizer.kind
    num_outputs: int
    predicts_tokens: bool  # whether an argmax of the decoder's output gives tokens
    patch_px: int  # side of a patch in the view that `encode` reads; the model's patches may be larger

    def view(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c vh vw"]:
        """The view that `encode` reads, made from the model's images, for where the original is not at hand."""
        ...

    def speed_up(self) -> None:
        """From now on `encode` runs as fast as it was found that it may; before, it runs in float32."""
        ...

    def encode(self, view: Float[Tensor, "b c vh vw"]) -> Codes:
        """Targets of all patches, row-major; no gradient. The view has `patch_px` pixels for a patch."""
        ...

    def loss(self, prediction: Float[Tensor, "b m k"], codes: Codes) -> Float[Tensor, ""]:
        """Decoding loss of the decoder's output against the targets of the same patches."""
        ...

    def head_loss(self, decoded: Float[Tensor, "b m d"], head: nn.Linear, codes: Codes) -> TrainingLoss:
        """`loss(head(decoded), codes)`, for training: without the whole prediction where that is large."""
        ...

    def scores(self, prediction: Float[Tensor, "b m k"], codes: Codes) -> dict[str, Float[Tensor, ""]]:
        """How good the prediction is in units that mean something to a reader."""
        ...

    def codes_from(self, prediction: Float[Tensor, "b m k"]) -> Codes:
        """The targets that the decoder's output stands for."""
        ...

    def decode(self, codes: Codes) -> Float[Tensor, "b c h w"]:
        """Images of the model's size, in 0-1, from the targets of all patches."""
        ...


def take(codes: Codes, index: Int[Tensor, "b m"]) -> Codes:
    """The targets of the patches that `index` names."""
    return codes.gather(1, _index_like(index, codes))


def put(codes: Codes, index: Int[Tensor, "b m"], values: Codes) -> Codes:
    """`codes` with the targets of the patches that `index` names replaced."""
    return codes.scatter(1, _index_like(index, codes), values)


def _index_like(index: Tensor, codes: Codes) -> Tensor:
    return index if codes.dim() == 2 else index.unsqueeze(-1).expand(-1, -1, codes.shape[-1])


def patchify(images: Float[Tensor, "b c h w"], patch_size: int) -> Float[Tensor, "b n ppc"]:
    """Pixels of every patch, row-major patches, each as [p, p, c] flattened (as MAE does)."""
    patches = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Float[Tensor, "b n ppc"], grid: tuple[int, int], patch_size: int) -> Float[Tensor, "b c h w"]:
    """Inverse of `patchify`."""
    blocks = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def hide(
    images: Float[Tensor, "b c h w"], visible: Int[Tensor, "b v"], fill: Float[Tensor, " c"], patch_size: int
) -> Float[Tensor, "b c h w"]:
    """Images in which every patch outside `visible` is the plain colour `fill`."""
    grid = (images.shape[2] // patch_size, images.shape[3] // patch_size)
    patches = patchify(images, patch_size)
    blank = fill.repeat(patch_size * patch_size).expand_as(patches)
    return unpatchify(put(blank, visible, take(patches, visible)), grid, patch_size)


def reconstruct(
    target: Target,
    images: Float[Tensor, "b c h w"],
    visible: Int[Tensor, "b v"],
    masked: Int[Tensor, "b m"],
    prediction: Float[Tensor, "b m k"],
    fill: Float[Tensor, " c"],
    patch_size: int,
) -> Float[Tensor, "b c h w"]:
    """The whole image from its visible patches and the decoder's output for the masked ones.

    A tokenizer looks beyond the patch it encodes, so hidden pixels are blanked before the visible patches are encoded:
    the result depends on nothing that the mask hides.
    """
    codes = target.encode(target.view(hide(images, visible, fill, patch_size)))
    return target.decode(put(codes, masked, target.codes_from(prediction))).clamp(0, 1)


def channel_buffer(values: list[float]) -> Tensor:
    """One value a channel, shaped to broadcast over [b, c, h, w]."""
    return torch.tensor(values).view(1, -1, 1, 1)
