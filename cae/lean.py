"""Functions whose backward pass keeps less than autograd would, and does less work; the values are the same.

Under autocast they compute in its type, as the linear layers that they stand for. None can be differentiated twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# Logits that are held at a time. On a CPU they should stay in its caches, a GPU wants large products.
CPU_CHUNK, GPU_CHUNK = 2**22, 2**24


def gained_linear(
    x: Float[Tensor, "... i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"], gain: Float[Tensor, " o"]
) -> Float[Tensor, "... o"]:
    """`gain * linear(x, weight, bias)`, with the gain in the weight: its gradient needs no output to be kept."""
    return _GainedLinear.apply(x, weight, bias, gain)


def gained_mlp(
    x: Float[Tensor, "... d"],
    weight1: Float[Tensor, "h d"],
    bias1: Float[Tensor, " h"],
    weight2: Float[Tensor, "d h"],
    bias2: Float[Tensor, " d"],
    gain: Float[Tensor, " d"],
) -> Float[Tensor, "... d"]:
    """`gain * linear(gelu(linear(x, weight1, bias1)), weight2, bias2)`; the backward pass has a GELU of its own."""
    return _GainedMlp.apply(x, weight1, bias1, weight2, bias2, gain)


def linear_cross_entropy(
    x: Float[Tensor, "... d"], weight: Float[Tensor, "k d"], bias: Float[Tensor, " k"], classes: Int[Tensor, "..."]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`cross_entropy(linear(x, weight, bias), classes)`, the mean, in float32, with a few rows of logits at a time.

    Its gradients are computed in the forward pass, so no logits are kept. The second value is the share of rows whose
    largest logit is that of their class; it has no gradient.
    """
    return _LinearCrossEntropy.apply(x.flatten(0, -2), weight, bias, classes.flatten())


def attention(num_heads: int, *projected: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
    """Scaled dot-product attention of query, key and value, given as three tensors or side by side in one.

    The weights are kept, [b, heads, m, n]. For bf16 on a CPU, where the backward pass of
    `F.scaled_dot_product_attention` takes three to ten times as long.
    """
    return _Attention.apply(num_heads, *projected)


def gather_rows(x: Float[Tensor, "b n d"], index: Int[Tensor, "b m"]) -> Float[Tensor, "b m d"]:
    """The rows of `x` that `index` names, none of them twice; its gradient is put back row by row.

    That of `Tensor.gather` adds every single element to its place, and where `use_deterministic_algorithms` is on a
    GPU sorts all of their places for it.
    """
    return _GatherRows.apply(x, index)


def _cast(x: Tensor, *others: Tensor) -> list[Tensor]:
    """All in the type that autocast would compute a linear layer in. It leaves float64 alone."""
    kind, dtype = x.device.type, x.dtype
    # Meta tensors, which only count, have none. Asking `is_autocast_available` would break the graphs of torch 2.11.
    if kind != "meta" and torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    return [tensor.to(dtype) for tensor in (x, *others)]


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, num_heads: int, *projected: Tensor) -> Tensor:
        together = 3 // len(projected)
        split = [part for tensor in _cast(*projected) for part in _split_heads(tensor, num_heads, together)]
        query, key, value = split
        weights = _scaled_product(query, key.mT, query.shape[-1] ** -0.5).softmax(-1)
        ctx.save_for_backward(*split, weights)
        ctx.num_heads, ctx.together = num_heads, together
        return _merge_heads(num_heads, weights @ value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        (grad,) = _split_heads(grad, ctx.num_heads, 1)
        of_products = torch._softmax_backward_data(grad @ value.mT, weights, -1, weights.dtype)
        of_parts = (
            _scaled_product(of_products, key, scale),
            _scaled_product(of_products.mT, query, scale),
            weights.mT @ grad,
        )
        if ctx.together == 3:
            return None, _merge_heads(ctx.num_heads, *of_parts)
        return None, *(_merge_heads(ctx.num_heads, part) for part in of_parts)


def _scaled_product(
    left: Float[Tensor, "g m k"], right: Float[Tensor, "g k n"], scale: float
) -> Float[Tensor, "g m n"]:
    nothing = left.new_empty(()).expand(len(left), left.shape[1], right.shape[2])
    return torch.baddbmm(nothing, left, right, beta=0, alpha=scale)


def _split_heads(x: Float[Tensor, "b n d"], num_heads: int, parts: int) -> tuple[Float[Tensor, "g n e"], ...]:
    """Each of `parts` that lie side by side, with heads beside the batch: g = b · heads."""
    return x.unflatten(-1, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2).unbind()


def _merge_heads(num_heads: int, *parts: Float[Tensor, "g n e"]) -> Float[Tensor, "b n d"]:
    """What `_split_heads` undoes."""
    groups, length, size = parts[0].shape
    merged = parts[0].new_empty(groups // num_heads, length, len(parts), num_heads, size)
    for number, part in enumerate(parts):
        merged[:, :, number] = part.unflatten(0, (-1, num_heads)).transpose(1, 2)
    return merged.flatten(2)


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = x.shape[1]
        return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        size, _, width = grad.shape
        first = torch.arange(0, size * ctx.num_rows, ctx.num_rows, device=index.device)
        out = grad.new_zeros(size * ctx.num_rows, width)
        out.index_copy_(0, (index + first[:, None]).flatten(), grad.flatten(0, 1))
        return out.unflatten(0, (size, ctx.num_rows)), None


class _GainedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
        x, folded, folded_bias = _cast(x, gain[:, None] * weight, gain * bias)
        ctx.save_for_backward(x, folded, weight, bias, gain)
        return F.linear(x, folded, folded_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, folded, weight, bias, gain = ctx.saved_tensors
        return grad @ folded, *_through_gain(grad.flatten(0, -2), x.flatten(0, -2), weight, bias, gain)


class _GainedMlp(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, gain: Tensor
    ) -> Tensor:
        x, cast1, cast_bias1, folded, folded_bias = _cast(x, weight1, bias1, gain[:, None] * weight2, gain * bias2)
        inner = F.linear(x, cast1, cast_bias1)
        ctx.save_for_backward(x, inner, cast1, folded, weight2, bias2, gain)
        return F.linear(F.gelu(inner), folded, folded_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, inner, weight1, folded, weight2, bias2, gain = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        of_second = _through_gain(rows, F.gelu(inner).flatten(0, -2), weight2, bias2, gain)
        grad_inner = torch.ops.aten.gelu_backward(grad @ folded, inner)
        inner_rows = grad_inner.flatten(0, -2)
        return grad_inner @ weight1, inner_rows.mT @ x.flatten(0, -2), inner_rows.sum(0), *of_second


def _through_gain(
    grad: Float[Tensor, "n o"],
    x: Float[Tensor, "n i"],
    weight: Float[Tensor, "o i"],
    bias: Float[Tensor, " o"],
    gain: Float[Tensor, " o"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, bias and gain.

    The gain's is the sum over rows of grad · (W x + b), which the product grad^T x already holds.
    """
    product, total = (grad.mT @ x).to(weight.dtype), grad.sum(0).to(bias.dtype)
    of_gain = torch.linalg.vecdot(product, weight) + total * bias
    return product.mul_(gain[:, None]), total * gain, of_gain


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        x, cast, cast_bias = _cast(x, weight, bias)
        precise = torch.promote_types(x.dtype, torch.float32)
        loss, hits = x.new_zeros((), dtype=precise), x.new_zeros((), dtype=precise)
        grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
        step = max(1, (CPU_CHUNK if x.device.type == "cpu" else GPU_CHUNK) // len(weight))
        for start in range(0, len(x), step):
            rows, wanted = x[start : start + step], classes[start : start + step, None]
            log_share = F.linear(rows, cast, cast_bias).log_softmax(-1, dtype=precise)
            of_class = log_share.gather(1, wanted)
            loss -= of_class.sum()
            hits += (of_class >= log_share.amax(1, keepdim=True)).sum()
            # The gradient by the logits: the shares, less one at the class.
            share = log_share.exp_()
            share.scatter_add_(1, wanted, share.new_full((), -1).expand_as(wanted))
            grad_bias += share.sum(0)
            narrow = share.to(x.dtype)
            torch.mm(narrow, cast, out=grad_x[start : start + step])
            if narrow.dtype == grad_weight.dtype:
                grad_weight.addmm_(narrow.mT, rows)
            else:
                grad_weight += narrow.mT @ rows
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        ctx.num_rows = len(x)
        share_right = hits / len(x)
        ctx.mark_non_differentiable(share_right)
        return loss / len(x), share_right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad / ctx.num_rows
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        return grad_x * scale.to(grad_x.dtype), grad_weight * scale, grad_bias * scale, None
