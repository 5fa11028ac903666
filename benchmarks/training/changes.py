"""Our step with one of its changes undone, by the name of the change."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW

from benchmarks.training import contenders
from benchmarks.training.contenders import Batch, Step
from cae.blocks import Attention, _weights


def _linear(x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    return F.linear(x, weight, bias) * gain


def _mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, gain: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2) * gain


def _cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight, bias)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), classes.flatten())
    return loss, (logits.argmax(-1) == classes).float().mean()


def _attention(self: Attention, *projected: Tensor, bias: Tensor | None = None) -> Tensor:
    query, key, value = self._all_heads(*projected)
    return (_weights(query, key, bias) @ value).transpose(1, 2).flatten(2)


def _fused_attention(self: Attention, *projected: Tensor, bias: Tensor | None = None) -> Tensor:
    query, key, value = self._all_heads(*projected)
    return F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2).flatten(2)


def _loop_adamw(*arguments: Any, **options: Any) -> AdamW:
    return AdamW(*arguments, **{**options, "fused": False, "foreach": False})


# The attention of float32 and that of bf16 are two changes with one place.
UNDONE: dict[str, list[tuple[str, Any]]] = {
    "gain in the weight, GELU computed again": [("cae.blocks.gained_linear", _linear), ("cae.blocks.gained_mlp", _mlp)],
    "head and cross-entropy in chunks": [("cae.targets.tokens.linear_cross_entropy", _cross_entropy)],
    "attention that is not written out": [("cae.blocks.Attention._attend", _attention)],
    "attention in bf16 that is not torch's fused one": [("cae.blocks.Attention._attend", _fused_attention)],
    "freed memory kept": [("cae.train.step.keep_freed_memory", lambda: None)],
    "fused AdamW": [("benchmarks.training.ours.AdamW", _loop_adamw)],
}


@contextmanager
def undone(name: str) -> Iterator[None]:
    """The code without one change."""
    with ExitStack() as patches:
        for place, replacement in UNDONE[name]:
            patches.enter_context(patch(place, replacement))
        yield


def build(name: str, batch: Batch) -> Step:
    """A contender, or our step that runs without the change of that name."""
    if name not in UNDONE:
        return contenders.build(name, batch)
    with undone(name):
        step = contenders.build("cae", batch)

    def run() -> None:
        with undone(name):
            step()

    return run
