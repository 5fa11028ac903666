"""Mean and standard deviation of the data, and the module that takes them off an image."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel, pixels in 0-1."""

    mean: list[float]
    std: list[float]


class Normalize(nn.Module):
    """Mean off, divided by the standard deviation. Images are float32 in 0-1."""

    mean: Tensor
    std: Tensor

    def __init__(self, normalization: Normalization) -> None:
        super().__init__()
        for name, values in normalization._asdict().items():
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return (images - self.mean) / self.std
