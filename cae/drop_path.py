"""Stochastic depth that is the same however many processes share a batch."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class DropPath(nn.Module):
    """Leaves a residual branch out for a share `rate` of the samples, and scales it for the others.

    The training step gives `factors`, one for each sample of its part of the batch, drawn for the whole batch by (seed,
    step): a sample then has the same fate on one process and on a thousand. Without them, and where no gradient is
    taken (the alignment target), the global generator decides.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        # A compiler makes new code for every rate that it sees read, and shares it where none is.
        self.drops = rate > 0
        self.factors: Tensor | None = None  # [b]

    def forward(self, branch: Tensor) -> Tensor:
        factors = self._factors(branch)
        return branch if factors is None else branch * factors

    def add(self, stream: Tensor, branch: Tensor) -> Tensor:
        """`stream + self(branch)`, and of the branch nothing is kept for the backward pass."""
        factors = self._factors(stream)
        if factors is None:
            return stream + branch
        return torch.addcmul(stream, branch.to(stream.dtype), factors)

    def _factors(self, x: Tensor) -> Tensor | None:
        """What each sample's branch is multiplied with [b, 1, ...]; None where all are kept."""
        if not self.training or not self.drops:
            return None
        factors = self.factors if torch.is_grad_enabled() else None
        if factors is None:
            factors = keep_factors(torch.rand(x.shape[0], device=x.device), self.rate)
        return factors.to(x.dtype).view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def keep_factors(draws: Float[Tensor, "*shape"], rate: float | Tensor) -> Float[Tensor, "*shape"]:
    """0 for the share `rate` of uniform draws, and for the others what makes up for it."""
    return (draws >= rate) / (1 - rate)
