"""The Context Autoencoder; to be read beside section 3 of the paper (arXiv 2202.03026).

X_v ──encoder F──▶ Z_v ──regressor H──▶ Z_m ──decoder G──▶ Y_m      decoding loss on Y_m
X_m ──encoder F, no gradient──▶ Z̄_m                                alignment loss between Z_m and Z̄_m
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cae.architecture import Architecture, EncoderArchitecture
from cae.blocks import NORM_EPS, Block, RegressorBlock, init_weights
from cae.lean import gather_rows
from cae.positions import sincos_positions
from cae.targets import TrainingLoss
from cae.timm_encoder import TimmEncoder


def gather_patches(x: Float[Tensor, "b n d"], index: Int[Tensor, "b m"]) -> Float[Tensor, "b m d"]:
    """The patches that `index` names, by a gather: no boolean index, so no device sync and static shapes."""
    return gather_rows(x, index)


class PatchEmbed(nn.Module):
    """Linear projection of every patch; a convolution, whose weights are timm's."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return self.proj(images).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """ViT over any subset of the patches (F in the paper). Parameter names follow timm's VisionTransformer.

    Positions are a fixed table for the grid of `image_size`, kept out of the state dict.
    """

    num_prefix = 1  # tokens before the patches: the class token
    has_attention = True
    positions: Tensor

    def __init__(self, architecture: EncoderArchitecture, drop_path: float = 0.0) -> None:
        super().__init__()
        width = architecture.width
        window = architecture.grid if architecture.relative_position_bias else None
        self.patch_embed = PatchEmbed(architecture.channels, width, architecture.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            Block(width, architecture.num_heads, architecture.layer_scale, rate, window)
            for rate in drop_path_rates(drop_path, architecture.depth)
        )
        on_tokens = architecture.final_norm == "tokens"
        self.norm: nn.Module = nn.LayerNorm(width, eps=NORM_EPS) if on_tokens else nn.Identity()
        self.fc_norm: nn.Module = nn.Identity() if on_tokens else nn.LayerNorm(width, eps=NORM_EPS)
        self.register_buffer("positions", sincos_positions(architecture.grid, width), persistent=False)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.patch_embed.proj.weight, std=0.02)

    def embed(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Patch embeddings with positions, for all patches in row-major order."""
        return self.patch_embed(images) + self.positions[1:]

    def encode(self, embedded: Float[Tensor, "b v d"], use_drop_path: bool = True) -> Float[Tensor, "b 1+v d"]:
        """Representations after the final LayerNorm of the class token (first) and of the embedded patches."""
        return self.norm(self._blocks(embedded, len(self.blocks), use_drop_path))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1+n d"]:
        """All patches visible; class token first."""
        return self.encode(self.embed(images))

    def forward_with_attention(
        self, images: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b 1+n d"], Float[Tensor, "b heads n"]]:
        """As `forward`, and the class token's attention to every patch in the last block (Figure 4)."""
        x = self._blocks(self.embed(images), len(self.blocks) - 1, use_drop_path=True)
        last = cast(Block, self.blocks[-1])
        attention = last.attn.first_row(last.norm1(x))[:, :, 1:]
        return self.norm(last(x)), attention

    def pool(self, patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        """One vector an image: the mean of its patches, after the last LayerNorm."""
        return self.fc_norm(patches.mean(dim=1))

    def _blocks(self, embedded: Tensor, count: int, use_drop_path: bool) -> Tensor:
        # Row 0 of the table is zero, so the class token needs no position.
        x = torch.cat([self.cls_token.expand(embedded.shape[0], -1, -1).to(embedded.dtype), embedded], dim=1)
        for block in self.blocks[:count]:
            x = block(x, use_drop_path)
        return x


AnyEncoder = Encoder | TimmEncoder


def build_encoder(architecture: EncoderArchitecture, drop_path: float = 0.0) -> AnyEncoder:
    """An encoder with random weights."""
    return (TimmEncoder if architecture.timm else Encoder)(architecture, drop_path)


class Regressor(nn.Module):
    """Latent contextual regressor (H): predicts Z_m from Z_v by cross-attention from one learned mask query."""

    def __init__(self, architecture: Architecture, drop_path: float) -> None:
        super().__init__()
        width = architecture.predictor_width
        self.mask_query = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            RegressorBlock(width, architecture.predictor_num_heads, architecture.predictor_layer_scale, rate)
            for rate in drop_path_rates(drop_path, architecture.regressor_depth)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.apply(init_weights)
        for block in self.blocks:
            cast(RegressorBlock, block).attn.init_separately()
        nn.init.trunc_normal_(self.mask_query, std=0.02)

    def forward(
        self,
        z_v: Float[Tensor, "b v d"],
        positions_m: Float[Tensor, "b m d"],
        positions_v: Float[Tensor, "b v d"],
    ) -> Float[Tensor, "b m d"]:
        x = self.mask_query.expand(positions_m.shape[0], positions_m.shape[1], -1).to(z_v.dtype)
        for block in self.blocks:
            x = block(x, z_v, positions_m, positions_v)
        return self.norm(x)


class Decoder(nn.Module):
    """Decoder (G): maps Z_m and its positions, nothing of the visible patches, to the targets."""

    def __init__(self, architecture: Architecture, drop_path: float) -> None:
        super().__init__()
        width = architecture.predictor_width
        self.blocks = nn.ModuleList(
            Block(width, architecture.predictor_num_heads, architecture.predictor_layer_scale, rate)
            for rate in drop_path_rates(drop_path, architecture.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, architecture.num_outputs)
        self.apply(init_weights)

    def forward(self, z_m: Float[Tensor, "b m d"], positions_m: Float[Tensor, "b m d"]) -> Float[Tensor, "b m k"]:
        return self.head(self.before_head(z_m, positions_m))

    def before_head(self, z_m: Float[Tensor, "b m d"], positions_m: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        """All but the last linear layer, which a loss may want to do piece by piece."""
        x = z_m + positions_m
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


HeadLoss = Callable[[Float[Tensor, "b m d"], nn.Linear], TrainingLoss]
"""Decoding loss from the input of the decoder's last layer, and that layer: see `Target.head_loss`."""


class CaeOutput(NamedTuple):
    """What one forward pass gives, in the words of the equations."""

    prediction: Float[Tensor, "b m k"]  # Y_m: logits over the vocabulary, or pixels
    z_m: Float[Tensor, "b m d"]
    z_m_target: Float[Tensor, "b m d"]


class CaeLosses(NamedTuple):
    """What one forward pass gives where the decoding loss is taken inside it."""

    decoding: TrainingLoss
    z_m: Float[Tensor, "b m d"]
    z_m_target: Float[Tensor, "b m d"]


class ContextAutoencoder(nn.Module):
    """Encoder, latent contextual regressor, decoder; the alignment target is the encoder again, without gradient.

    The official release keeps the alignment encoder as a second module with the same weights; here it is stored once.
    """

    positions: Tensor

    def __init__(self, architecture: Architecture, drop_path: float = 0.0, alignment_drop_path: bool = False) -> None:
        super().__init__()
        self.alignment_drop_path = alignment_drop_path
        width, predictor_width = architecture.width, architecture.predictor_width
        self.encoder = build_encoder(architecture, drop_path)
        # Maps Z_v and Z̄_m when the predictor has another width (ViT-L as released: 1024 to 768).
        self.projection: nn.Module = (
            nn.Identity()
            if predictor_width == width
            else nn.Sequential(nn.Linear(width, predictor_width), nn.LayerNorm(predictor_width, eps=NORM_EPS))
        )
        self.projection.apply(init_weights)
        self.regressor = Regressor(architecture, drop_path)
        self.decoder = Decoder(architecture, drop_path)
        self.register_buffer("positions", sincos_positions(architecture.grid, predictor_width), persistent=False)

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        visible: Int[Tensor, "b v"],
        masked: Int[Tensor, "b m"],
        head_loss: HeadLoss | None = None,
    ) -> CaeOutput | CaeLosses:
        """`images` are normalised; `visible` and `masked` are ascending patch indices, row-major.

        With `head_loss` it gives CaeLosses: all logits at once would be the largest tensor of a training step. The
        loss is taken in here, for the wrappers of parallel training see only what `forward` uses.
        """
        embedded = self.encoder.embed(images)
        # The pass with gradient comes first: autocast keeps its bf16 copies of the weights for the second pass, and
        # some versions of torch lose the gradient of copies that were first made under no_grad.
        z_m = self.regress(embedded, visible, masked)
        with torch.no_grad():
            target = self.encoder.encode(gather_patches(embedded, masked), self.alignment_drop_path)
            z_m_target = self.projection(target[:, self.encoder.num_prefix :])
        if head_loss is None:
            return CaeOutput(self.decode(z_m, masked), z_m, z_m_target)
        decoded = self.decoder.before_head(z_m, self.patch_positions(masked))
        return CaeLosses(head_loss(decoded, self.decoder.head), z_m, z_m_target)

    def regress(
        self, embedded: Float[Tensor, "b n d"], visible: Int[Tensor, "b v"], masked: Int[Tensor, "b m"]
    ) -> Float[Tensor, "b m p"]:
        """Z_m from the visible patches alone; the class token stops at the encoder."""
        visible_tokens = self.encoder.encode(gather_patches(embedded, visible))
        z_v = self.projection(visible_tokens[:, self.encoder.num_prefix :])
        return self.regressor(z_v, self.patch_positions(masked), self.patch_positions(visible))

    def decode(self, z_m: Float[Tensor, "b m p"], masked: Int[Tensor, "b m"]) -> Float[Tensor, "b m k"]:
        return self.decoder(z_m, self.patch_positions(masked))

    def predict(
        self, images: Float[Tensor, "b c h w"], visible: Int[Tensor, "b v"], masked: Int[Tensor, "b m"]
    ) -> Float[Tensor, "b m k"]:
        """Y_m without the alignment branch, for inference."""
        return self.decode(self.regress(self.encoder.embed(images), visible, masked), masked)

    def predict_without_regressor(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n k"]:
        """Every patch from its own representation: encoder straight into decoder (Figure 3)."""
        z = self.projection(self.encoder(images)[:, self.encoder.num_prefix :])
        return self.decoder(z, self.positions[1:].expand(z.shape[0], -1, -1))

    def patch_positions(self, index: Int[Tensor, "b m"]) -> Float[Tensor, "b m p"]:
        return self.positions[1:][index]


def alignment_loss(z_m: Float[Tensor, "b m d"], z_m_target: Float[Tensor, "b m d"]) -> Float[Tensor, ""]:
    """Mean squared error in float32 against the target without gradient: the second term of equation 1, without λ."""
    return F.mse_loss(z_m.float(), z_m_target.detach().float())


def drop_path_rates(largest: float, depth: int) -> list[float]:
    """Stochastic depth grows linearly from 0 in the first block to `largest` in the last."""
    # On the CPU, for under `torch.device("meta")` a tensor has no values.
    return torch.linspace(0, largest, depth, device="cpu").tolist()
