"""Classification heads: the linear and the attentive probe on a frozen encoder, mean pooling for fine-tuning."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cae.blocks import NORM_EPS, Attention
from cae.model import AnyEncoder

# The official fine-tuning starts its classifier near zero.
FINETUNE_HEAD_SCALE = 0.001


class LinearHead(nn.Module):
    """BatchNorm without affine, then a linear layer: the linear probe, on one vector an image."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.fc = nn.Linear(width, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        return self.fc(self.norm(features))


class AttentiveHead(nn.Module):
    """One cross-attention with a learned query over the tokens, no MLP and no skip; then a linear probe (Figure 5).

    The query starts at zero. Three LayerNorms as in the regressor; keys have no bias, as everywhere in CAE.
    """

    def __init__(self, width: int, num_heads: int, num_classes: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width, eps=NORM_EPS) for _ in range(3))
        self.attn = Attention(width, num_heads)
        self.attn.init_separately()
        self.classifier = LinearHead(width, num_classes)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b k"]:
        pooled = self.attn.cross(self._queries(tokens), self.norm_k(tokens), self.norm_v(tokens))
        return self.classifier(pooled.squeeze(1))

    def attention(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n"]:
        """Attention weights of the query over the tokens, per head (Figure 5)."""
        return self.attn.cross_weights(self._queries(tokens), self.norm_k(tokens)).squeeze(2)

    def _queries(self, tokens: Tensor) -> Tensor:
        return self.norm_q(self.query).expand(len(tokens), -1, -1)


class Classifier(nn.Module):
    """Encoder, mean of the patch representations, LayerNorm, a linear layer: what fine-tuning trains.

    The encoder is one of `cae.weights.for_finetuning`: its last LayerNorm stands on the mean, as in the official code.
    """

    def __init__(self, encoder: AnyEncoder, width: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.weight *= FINETUNE_HEAD_SCALE

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        return self.head(self.encoder.pool(self.encoder(images)[:, self.encoder.num_prefix :]))

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Layers for layer decay, as timm asks for them: the embedding, each block, and the rest, which is the head."""
        return {
            # All of the encoder before its blocks; positions and registers, where timm's has them, too.
            "stem": r"^encoder\.(?:model\.)?(?!model\.|blocks\.|norm\.|fc_norm\.)",
            "blocks": r"^encoder\.(?:model\.)?blocks\.(\d+)",
        }


def knn_predict(
    queries: Float[Tensor, "q d"],
    bank: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    *,
    k: int,
    temperature: float,
    num_classes: int,
) -> Float[Tensor, "q c"]:
    """Class scores by the `k` nearest neighbours in cosine similarity, each voting exp(similarity / temperature).

    Source: the weighted vote of Wu et al. 2018 (arXiv 1805.01978), as used by DINO.
    """
    bank = F.normalize(bank, dim=1)
    scores = []
    # In chunks, for the similarity matrix of a large validation set would not fit.
    for chunk in F.normalize(queries, dim=1).split(1024):
        similarity, neighbors = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)
        # Relative to the nearest, or a low temperature would overflow; the order of the classes stays the same.
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        scores.append(torch.zeros(len(chunk), num_classes).scatter_add_(1, labels[neighbors], votes))
    return torch.cat(scores)
