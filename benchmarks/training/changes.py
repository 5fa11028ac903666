"""What each change of our step brings: the step again with one of them undone, in turn.

`python -m benchmarks.training.changes`, in processor time of one thread, which other programs disturb less than they
disturb the clock on the wall. Optional arguments: fp32 or bf16, and rounds. With a change's name as well: the peak
memory of that step, in a process of its own.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW

from benchmarks.training import memory
from benchmarks.training.contenders import Batch, build
from benchmarks.training.setting import Setting
from cae.blocks import _weights


def _linear(x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    return F.linear(x, weight, bias) * gain


def _mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, gain: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2) * gain


def _cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight, bias)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), classes.flatten())
    return loss, (logits.argmax(-1) == classes).float().mean()


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    return (_weights(query, key, bias) @ value).transpose(1, 2).flatten(2)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2).flatten(2)


UNDONE: dict[str, list[tuple[str, Any]]] = {
    "none": [],
    "gain in the weight, GELU computed again": [("cae.blocks.gained_linear", _linear), ("cae.blocks.gained_mlp", _mlp)],
    "head and cross-entropy in chunks": [("cae.targets.tokens.linear_cross_entropy", _cross_entropy)],
    "fused attention in float32": [("cae.blocks._attend", _attention)],
    "attention by its parts in bf16": [("cae.blocks._attend", _fused_attention)],
    "fused AdamW": [("benchmarks.training.ours.AdamW", partial(AdamW, foreach=False))],
}


@contextmanager
def undone(name: str) -> Iterator[None]:
    """The code without one change."""
    with ExitStack() as patches:
        for place, replacement in UNDONE[name]:
            patches.enter_context(patch(place, replacement))
        yield


def step_without(name: str, setting: Setting) -> Callable[[], object]:
    """A step that runs without one change."""
    with undone(name):
        step = build("cae", Batch.draw(setting))

    def run() -> None:
        with undone(name):
            step()

    return run


def main() -> None:
    precision, rounds, *alone = [*sys.argv[1:], "fp32", "5"][: max(2, len(sys.argv) - 1)]
    torch.set_num_threads(1)
    setting = Setting("vit_small", 224, 16, 16, torch.device("cpu"), precision, compile=False)
    if alone:
        sys.stdout.write(f"{memory.peak_of(lambda: step_without(alone[0], setting), setting.device)}\n")
        return
    steps = {name: step_without(name, setting) for name in UNDONE}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(int(rounds) + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if number:  # the first is warm-up
                seconds[name].append(time.process_time() - start)
    for name, values in seconds.items():
        ratio = statistics.median(v / base for v, base in zip(values, seconds["none"], strict=True))
        command = [sys.executable, "-m", "benchmarks.training.changes", precision, rounds, name]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        sys.stdout.write(
            f"{name}: {statistics.median(values):.2f} s, {ratio:.3f} times ours, {peak / 2**20:,.0f} MiB\n"
        )


if __name__ == "__main__":
    main()
