"""What all tokenizers have in common as targets: one token a patch, predicted as a class."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cae.lean import linear_cross_entropy
from cae.targets import Codes, TrainingLoss


class TokenTarget(nn.Module):
    """The half of a `Target` that reads predictions; a tokenizer adds `encode` and `decode`."""

    predicts_tokens = True
    num_outputs: int

    def count_codes(self, tokens: Int[Tensor, "..."]) -> Int[Tensor, " k"]:
        """How many patches have each code."""
        # Not bincount, which has to wait for the device.
        counts = torch.zeros(self.num_outputs, dtype=torch.int64, device=tokens.device)
        return counts.scatter_add_(0, tokens.flatten(), torch.ones_like(tokens.flatten()))

    def loss(self, prediction: Float[Tensor, "b m k"], codes: Codes) -> Float[Tensor, ""]:
        return F.cross_entropy(prediction.flatten(0, 1).float(), codes.flatten())

    def head_loss(self, decoded: Float[Tensor, "b m d"], head: nn.Linear, codes: Codes) -> TrainingLoss:
        loss, accuracy = linear_cross_entropy(decoded, head.weight, head.bias, codes)
        return TrainingLoss(loss, {"token_accuracy": accuracy})

    def scores(self, prediction: Float[Tensor, "b m k"], codes: Codes) -> dict[str, Float[Tensor, ""]]:
        return {"token_accuracy": (prediction.argmax(-1) == codes).float().mean()}

    def codes_from(self, prediction: Float[Tensor, "b m k"]) -> Int[Tensor, "b m"]:
        return prediction.argmax(dim=-1)


def perplexity(counts: Int[Tensor, " k"]) -> Float[Tensor, ""]:
    """exp of the entropy of a code's distribution: how many codes would be in use if all were used alike."""
    share = counts.double() / counts.sum()
    return (-(share * share.clamp_min(1e-12).log()).sum()).exp()
