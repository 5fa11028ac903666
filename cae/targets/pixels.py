"""RGB pixels as targets (Table 9). Nobody has published the code: an N-way head of p·p·c values, mean squared error."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cae.section import Section
from cae.targets import Codes, TrainingLoss, channel_buffer, patchify, unpatchify

VARIANCE_FLOOR = 1e-6


class PixelArchitecture(Section):
    """What a PixelTarget needs to know; stored as `target.safetensors` like a tokenizer."""

    channels: int
    patch_size: int
    grid: tuple[int, int]
    per_patch: bool


class PixelTarget(nn.Module):
    """Targets are pixels in 0-1; the loss compares them normalised by data set or by patch.

    A per-patch normalised prediction has lost brightness and contrast of its patch, so its picture shows those of the
    data set instead: what is hidden stays hidden.
    """

    kind = "pixels"
    predicts_tokens = False
    mean: Tensor
    std: Tensor

    def __init__(self, architecture: PixelArchitecture, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.architecture = architecture
        self.num_outputs = architecture.patch_size**2 * architecture.channels
        self.patch_px = architecture.patch_size
        self.register_buffer("mean", channel_buffer(mean))
        self.register_buffer("std", channel_buffer(std))

    def view(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return images

    def speed_up(self) -> None:
        """Nothing to do."""

    def encode(self, images: Float[Tensor, "b c h w"]) -> Codes:
        return patchify(images, self.architecture.patch_size)

    def loss(self, prediction: Float[Tensor, "b m k"], codes: Codes) -> Float[Tensor, ""]:
        return F.mse_loss(prediction.float(), self._normalize(codes))

    def head_loss(self, decoded: Float[Tensor, "b m d"], head: nn.Linear, codes: Codes) -> TrainingLoss:
        return TrainingLoss(self.loss(head(decoded), codes), {})

    def scores(self, prediction: Float[Tensor, "b m k"], codes: Codes) -> dict[str, Float[Tensor, ""]]:
        error = F.mse_loss(self.codes_from(prediction), codes)
        return {"masked_psnr_db": -10 * error.log10()}

    def codes_from(self, prediction: Float[Tensor, "b m k"]) -> Codes:
        mean, std = self._per_value()
        return (prediction.float() * std + mean).clamp(0, 1)

    def decode(self, codes: Codes) -> Float[Tensor, "b c h w"]:
        return unpatchify(codes, self.architecture.grid, self.architecture.patch_size)

    def _normalize(self, codes: Codes) -> Tensor:
        if not self.architecture.per_patch:
            mean, std = self._per_value()
            return (codes - mean) / std
        mean, variance = codes.mean(-1, keepdim=True), codes.var(-1, keepdim=True, correction=0)
        return (codes - mean) / (variance + VARIANCE_FLOOR).sqrt()

    def _per_value(self) -> tuple[Tensor, Tensor]:
        area = self.architecture.patch_size**2
        return self.mean.flatten().repeat(area), self.std.flatten().repeat(area)
