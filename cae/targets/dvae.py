"""Our own discrete VAE: strided convolutions to one logit vector a patch, Gumbel-softmax, a learned codebook.

The token grid is the patch grid by construction: the strides are the prime factors of the patch size.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cae.section import Section
from cae.targets import channel_buffer
from cae.targets.tokens import TokenTarget, perplexity


class DvaeArchitecture(Section):
    """Every size that fixes the shapes of a Dvae; stored with its weights."""

    channels: int
    patch_size: int
    grid: tuple[int, int]
    vocab_size: int
    code_width: int
    hidden_width: int
    num_res_blocks: int


class DvaeLoss(NamedTuple):
    """Parts of the training loss."""

    reconstruction: Float[Tensor, ""]  # share of the data's variance that is not reconstructed
    unused: Float[Tensor, ""]  # nats by which the batch's code usage falls short of uniform
    perplexity: Float[Tensor, ""]  # of the batch's hard codes


class Dvae(TokenTarget):
    """Tokenizer and its decoder; also the `Target` that predicts its tokens. Images are float32 in 0-1."""

    kind = "dvae"
    mean: Tensor
    std: Tensor

    def __init__(self, architecture: DvaeArchitecture, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.architecture = architecture
        self.num_outputs = architecture.vocab_size
        self.patch_px = architecture.patch_size
        hidden, channels = architecture.hidden_width, architecture.channels
        factors = prime_factors(architecture.patch_size)
        blocks = [ResidualBlock(hidden) for _ in range(architecture.num_res_blocks)]
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1),
            *(layer for factor in factors for layer in (nn.ReLU(), _downsample(hidden, factor))),
            *blocks,
            nn.ReLU(),
        )
        self.to_logits = nn.Conv2d(hidden, self.num_outputs, 1)
        self.codebook = nn.Parameter(torch.randn(self.num_outputs, architecture.code_width))
        self.decoder = nn.Sequential(
            nn.Conv2d(architecture.code_width, hidden, 1),
            *(ResidualBlock(hidden) for _ in range(architecture.num_res_blocks)),
            *(
                layer
                for factor in reversed(factors)
                for layer in (nn.Upsample(scale_factor=factor), nn.Conv2d(hidden, hidden, 3, padding=1), nn.ReLU())
            ),
            nn.Conv2d(hidden, channels, 3, padding=1),
        )
        self.register_buffer("mean", channel_buffer(mean))
        self.register_buffer("std", channel_buffer(std))
        # Convolutions of few channels: on a CPU half the time to encode, an eighth off a training step.
        self.to(memory_format=torch.channels_last)

    def logits(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k gh gw"]:
        return self.to_logits(self.encoder((images - self.mean) / self.std)).float()

    def training_loss(self, images: Float[Tensor, "b c h w"], temperature: float) -> DvaeLoss:
        """Soft codes by Gumbel-softmax at `temperature`, in float32 whatever autocast says."""
        logits = self.logits(images)
        soft = F.gumbel_softmax(logits, tau=temperature, dim=1)
        decoded = self.decoder(torch.einsum("bkhw,kd->bdhw", soft, self.codebook))
        reconstruction = F.mse_loss(decoded.float(), (images - self.mean) / self.std)
        # Entropy of the usage over the whole batch; a KL for each position would fight the reconstruction.
        usage = logits.softmax(dim=1).mean(dim=(0, 2, 3))
        entropy = -(usage * usage.clamp_min(1e-10).log()).sum()
        return DvaeLoss(
            reconstruction, math.log(self.num_outputs) - entropy, perplexity(self.count_codes(logits.argmax(dim=1)))
        )

    def view(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return images

    def speed_up(self) -> None:
        """Nothing to do: it is small, and its tokens are float32."""

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Int[Tensor, "b n"]:
        """Hard tokens: the most likely code of every patch."""
        return self.logits(images).argmax(dim=1).flatten(1)

    def decode(self, codes: Int[Tensor, "b n"]) -> Float[Tensor, "b c h w"]:
        embedded = self.codebook[codes].transpose(1, 2).unflatten(2, self.architecture.grid)
        return self.decoder(embedded) * self.std + self.mean

    @torch.no_grad()
    def replace_code(self, dead: int, alive: int, noise: float, generator: torch.Generator) -> None:
        """Restart a dead code as a noisy copy of one in use, so that the two share its patches."""
        for weight in (self.to_logits.weight, self.codebook):
            drawn = torch.randn(weight[alive].shape, generator=generator).to(weight)
            weight[dead] = weight[alive] + noise * weight[alive].std(correction=0) * drawn
        if self.to_logits.bias is not None:
            self.to_logits.bias[dead] = self.to_logits.bias[alive]


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))) at the same width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 3, padding=1)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        return x + self.mix(self.spatial(x.relu()).relu())


def prime_factors(number: int) -> list[int]:
    """Prime factors in ascending order; empty for 1."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def _downsample(width: int, factor: int) -> nn.Conv2d:
    # Overlapping windows where the arithmetic allows it: even kernels of twice the stride keep the size exact.
    if factor == 2:
        return nn.Conv2d(width, width, 4, stride=2, padding=1)
    return nn.Conv2d(width, width, factor, stride=factor)
