"""The parts that encoder, regressor and decoder are built from: one Attention, one Block, one RegressorBlock."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import RelPosBias
from torch import Tensor, nn

from cae.drop_path import DropPath
from cae.lean import attention, gained_linear, gained_mlp

# Epsilon of every LayerNorm in the official models.
NORM_EPS = 1e-6


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linears, zero biases: what takes effect in the official code."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


class Attention(nn.Module):
    """Multi-head attention, self or cross. Queries and values have a bias, keys have none.

    One weight holds the three projections, so that self-attention is a single matrix product. With `window`, the grid
    of patches, self-attention over the class token and all patches adds a learned bias by relative position.
    """

    def __init__(self, width: int, num_heads: int, window: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.relative_position = RelPosBias(window, num_heads, prefix_tokens=1) if window else None
        if self.relative_position:
            # So that adding it to a trained encoder changes nothing at first.
            nn.init.zeros_(self.relative_position.relative_position_bias_table)
        self.apply(init_weights)

    def init_separately(self) -> None:
        """Xavier by the fan of each projection, as where the official code has three; otherwise by that of all."""
        for weight in self.qkv.weight.detach().chunk(3):
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Self-attention."""
        return self.proj(self.mix(x))

    def mix(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Self-attention before its output projection."""
        bias = self.relative_position.get_bias() if self.relative_position else None
        return self._attend(self._project(x), bias=bias)

    def cross(
        self, query: Float[Tensor, "b m d"], key: Float[Tensor, "b n d"], value: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b m d"]:
        """Cross-attention."""
        return self.proj(self.mix_cross(query, key, value))

    def mix_cross(
        self, query: Float[Tensor, "b m d"], key: Float[Tensor, "b n d"], value: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b m d"]:
        """Cross-attention before its output projection."""
        q_weight, k_weight, v_weight = self.qkv.weight.chunk(3)
        return self._attend(
            F.linear(query, q_weight, self.q_bias), F.linear(key, k_weight), F.linear(value, v_weight, self.v_bias)
        )

    def cross_weights(self, query: Float[Tensor, "b m d"], key: Float[Tensor, "b n d"]) -> Float[Tensor, "b h m n"]:
        """Attention weights of cross-attention, per head."""
        q_weight, k_weight, _ = self.qkv.weight.chunk(3)
        return _weights(self._heads(F.linear(query, q_weight, self.q_bias)), self._heads(F.linear(key, k_weight)))

    def first_row(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n"]:
        """Attention weights of the first token (the class token) over all tokens, per head."""
        query, key, _ = self._all_heads(self._project(x))
        bias = self.relative_position.get_bias()[:, :, :1] if self.relative_position else None
        return _weights(query[:, :, :1], key, bias).squeeze(2)

    def _project(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n 3*d"]:
        """Query, key and value side by side."""
        return F.linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))

    def _attend(
        self, *projected: Float[Tensor, "b n d"], bias: Float[Tensor, "1 h m n"] | None = None
    ) -> Float[Tensor, "b m d"]:
        """Query, key and value are three tensors, or lie side by side in one."""
        first = projected[0]
        if bias is None and first.device.type == "cpu" and first.dtype == torch.bfloat16:
            return attention(self.num_heads, *projected)
        query, key, value = self._all_heads(*projected)
        if bias is None:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            # Fused attention with a bias is no graph that torch 2.15 can export.
            mixed = _weights(query, key, bias) @ value
        return mixed.transpose(1, 2).flatten(2)

    def _all_heads(self, *projected: Float[Tensor, "b n d"]) -> list[Float[Tensor, "b h n e"]]:
        """Of query, key and value as `_attend` takes them."""
        return [self._heads(part) for part in (projected if len(projected) == 3 else projected[0].chunk(3, dim=-1))]

    def _heads(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n e"]:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _weights(
    query: Float[Tensor, "b h m e"], key: Float[Tensor, "b h n e"], bias: Float[Tensor, "1 h m n"] | None = None
) -> Float[Tensor, "b h m n"]:
    products = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return (products if bias is None else products + bias).softmax(dim=-1)


class LayerScale(nn.Module):
    """Learned gain of a residual branch, one value a channel; the branch's last linear layer multiplies it in."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, four times as wide inside; then the branch's gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "b n d"], scale: LayerScale) -> Float[Tensor, "b n d"]:
        return gained_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, scale.gamma)


def _project(mixed: Float[Tensor, "b n d"], attention: Attention, scale: LayerScale) -> Float[Tensor, "b n d"]:
    """The attention's output projection, then the branch's gain."""
    return gained_linear(mixed, attention.proj.weight, attention.proj.bias, scale.gamma)


class Block(nn.Module):
    """Pre-norm transformer block with layer scale; used by encoder and decoder. Parameter names follow timm."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        layer_scale: float,
        drop_path: float,
        window: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, num_heads, window)
        self.ls1 = LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n d"], use_drop_path: bool = True) -> Float[Tensor, "b n d"]:
        attended = _project(self.attn.mix(self.norm1(x)), self.attn, self.ls1)
        x = self.drop_path.add(x, attended) if use_drop_path else x + attended
        mapped = self.mlp(self.norm2(x), self.ls2)
        return self.drop_path.add(x, mapped) if use_drop_path else x + mapped


class RegressorBlock(nn.Module):
    """Cross-attention from mask queries to [visible; queries]; the visible representations are never updated.

    Positions go into queries and keys, not into values. After the attention the second LayerNorm replaces the stream,
    which is no ordinary pre-norm residual. Source: official `modeling_cae_helper.py`, `RegressorBlock`.
    """

    def __init__(self, width: int, num_heads: int, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.norm_q = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm_k = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm_v = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, num_heads)
        self.ls1 = LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Float[Tensor, "b m d"],
        z_v: Float[Tensor, "b v d"],
        positions_m: Float[Tensor, "b m d"],
        positions_v: Float[Tensor, "b v d"],
    ) -> Float[Tensor, "b m d"]:
        context = torch.cat([z_v, x], dim=1)
        positions = torch.cat([positions_v, positions_m], dim=1)
        query = self.norm_q(x + positions_m)
        mixed = self.attn.mix_cross(query, self.norm_k(context + positions), self.norm_v(context))
        x = self.norm2(self.drop_path.add(x, _project(mixed, self.attn, self.ls1)))
        return self.drop_path.add(x, self.mlp(x, self.ls2))
