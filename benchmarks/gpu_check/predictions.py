"""Predict the cost of the ViT-B step on a GPU: its FLOP over the matrix rate, its bytes over the copy bandwidth.

`python -m benchmarks.gpu_check.predictions` prints the table for an H200; a run of the check holds each line against
what it measured, at the rates that it measured.

The step is run on tensors without values, and every operator's FLOP and bytes are taken down. An operator takes the
longer of the two times; one that is not a matrix product has bytes alone.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.gpu_check.process import ROOT
from benchmarks.gpu_check.verdicts import Prediction
from benchmarks.training.contest import flops
from benchmarks.training.ours import NORMALIZATION, GivenTokens, architecture
from benchmarks.training.setting import ALIGNMENT_WEIGHT, DROP_PATH, MASKED_SHARE, Setting
from cae.config import load_params
from cae.drop_path import DropPath
from cae.lean import GPU_CHUNK
from cae.model import ContextAutoencoder
from pipeline import tokenizer
from pipeline.costs import dalle_macs
from pipeline.pretrain import Objective

# Measured on an H200: a bf16 product of two 8192 x 8192 matrices, and a copy, what is read and written counted.
H200 = {"bf16_tflops": 790.0, "copy_tb_per_s": 4.3}
TERA, MS, GIB = 1e12, 1e3, 2**30
# Of the rate of a large square product, for the products and convolutions here.
PRODUCT_SHARE, CONVOLUTION_SHARE = 0.75, 0.6
TF32_SHARE = 0.5  # of the bf16 rate, for float32 convolutions as they are shipped
LAUNCH_US = 6.0  # of the host, for an operator of eager PyTorch with its autograd
# Passes over memory as large as the weights: AdamW reads four and writes three, clipping reads two and writes one.
UPDATE_PASSES = 7 + 3
COMPILED_SHARE = 0.5  # of the bytes that are no product's: every second pass over a tensor goes away

# The kernels of a GPU and the operators of PyTorch that belong to each line, by words in their names; the first fits.
CATEGORIES = {
    "attention": r"flash|fmha|attention|_Attention",
    "matrix products": r"gemm|cutlass|cublas|nvjet|xmma|wgmma|aten::(add)?mm|aten::bmm|aten::baddbmm|conv",
    "LayerNorm": r"layer_norm|LayerNorm|GammaBeta",
    "GELU": r"[Gg][Ee][Ll][Uu]",
    "optimizer and clipping": r"[Aa]dam|multi_tensor|[Ll]p_?[Nn]orm|vector_norm|_foreach",
    "cross-entropy": r"[Ss]oft[Mm]ax|log_softmax",
}
REST = "casts, residuals, drop path, gathers"


def category_of(name: str) -> str:
    """The line of the predictions that a kernel or an operator belongs to."""
    return next((category for category, words in CATEGORIES.items() if re.search(words, name)), REST)


@dataclass
class Count:
    """FLOP and bytes per category, number of launches, and peak memory of a step."""

    flop: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    held: int = 0

    def seconds(self, rates: dict[str, float]) -> dict[str, float]:
        """Of each category on a device with these rates: the longer of arithmetic and memory."""
        rate, bandwidth = PRODUCT_SHARE * rates["bf16_tflops"] * TERA, rates["copy_tb_per_s"] * TERA
        return {name: max(self.flop[name] / rate, moved / bandwidth) for name, moved in self.bytes.items()}


class _Counting(TorchDispatchMode):
    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # A view, a question, and memory that is only made, cost nothing.
        if func.namespace == "prim" or func.is_view or re.search("view|empty|detach", str(func)):
            return out
        name = category_of(str(func).replace("aten.", "aten::"))
        if flop := flop_registry.get(func.overloadpacket):
            self.count.flop[name] += flop(*args, **kwargs, out_val=out)
        tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        self.count.bytes[name] += sum(map(_bytes, tensors.values()))
        self.count.launches += 1
        return out


def _bytes(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor: an expanded dimension is read from one place."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


def count_step(setting: Setting) -> Count:
    """Our step with the tokens given, attention by a fused kernel."""
    count = Count()
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # By storage, for many are views of one; holding them keeps the numbers from being used again.
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(patch("cae.blocks.Attention._attend", _fused_attention(count)))
        stack.enter_context(patch("cae.lean.CPU_CHUNK", GPU_CHUNK))
        # These two read values, and there are none.
        stack.enter_context(patch("cae.model.drop_path_rates", lambda largest, depth: [largest] * depth))
        stack.enter_context(patch("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor))
        model = ContextAutoencoder(architecture(setting), DROP_PATH).train()
        target: Any = GivenTokens(torch.zeros(setting.batch_size, setting.num_patches, dtype=torch.int64))
        objective = Objective(model, target, NORMALIZATION, ALIGNMENT_WEIGHT, 0)
        for module in model.modules():
            if isinstance(module, DropPath):
                module.factors = torch.zeros(setting.batch_size)
        batch = _batch(setting)
        with _Counting(count), saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bf16"):
                loss, _ = objective(batch, 0)
            loss.backward()
        weights = sum(map(_bytes, model.parameters()))
        own = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers())}
        activations = sum(t.untyped_storage().nbytes() for number, t in saved.items() if number not in own)
    count.bytes["optimizer and clipping"] += UPDATE_PASSES * weights
    count.held = 4 * weights + activations  # weights, gradients, two moments
    return count


def _batch(setting: Setting) -> dict[str, Tensor]:
    side, masked = setting.image_size, setting.num_masked(MASKED_SHARE)
    return {
        "images": torch.zeros(setting.batch_size, 3, side, side, dtype=torch.uint8),
        "visible": torch.zeros(setting.batch_size, setting.num_patches - masked, dtype=torch.int64),
        "masked": torch.zeros(setting.batch_size, masked, dtype=torch.int64),
    }


def _fused_attention(count: Count) -> Callable[..., Tensor]:
    """In place of `Attention._attend`: nothing but inputs and outputs pass through memory."""

    def attend(_self: nn.Module, *projected: Tensor, bias: Tensor | None = None) -> Tensor:
        return _FusedAttention.apply(count, *projected)

    return attend


class _FusedAttention(Function):
    @staticmethod
    def forward(ctx: Any, count: Count, *projected: Tensor) -> Tensor:
        query, key = projected[0], projected[-1]
        width = key.shape[-1] // (3 if len(projected) == 1 else 1)
        out = query.new_empty(*query.shape[:2], width)
        ctx.save_for_backward(*projected, out)
        ctx.count, ctx.flop = count, 4 * query.shape[0] * query.shape[1] * key.shape[1] * width
        ctx.moved = sum(map(_bytes, (*projected, out)))
        _note(count, ctx.flop, ctx.moved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The weights are computed again: five products in place of two, and as many bytes in as out.
        _note(ctx.count, 2.5 * ctx.flop, 2 * ctx.moved)
        return None, *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:-1])


def _note(count: Count, flop: float, moved: int) -> None:
    count.flop["attention"] += int(flop)
    count.bytes["attention"] += moved
    count.launches += 1


# Checks of part `fast`, and a figure of theirs.
EAGER, COMPILED = "ViT-B, tokens given, eager", "ViT-B, tokens given, compiled"
PROFILED, FEW = "ViT-B, tokens given, profiled", "ViT-B, tokens given, 8 images"
FREE = "ViT-B, tokens given, not deterministic"
TOKENIZERS = {"dalle": "ViT-B, DALL-E", "dvae": "ViT-B, d-VAE"}
SPEED = "images_per_s"


def predict(setting: Setting, rates: dict[str, float]) -> list[Prediction]:
    """All lines for a step of `setting`, at the rates of a device."""
    count = count_step(setting)
    seconds = count.seconds(rates)
    device_s, host_s = sum(seconds.values()), count.launches * LAUNCH_US / 1e6
    products = ("matrix products", "attention", "optimizer and clipping")
    compiled_s = sum(value * (1 if name in products else COMPILED_SHARE) for name, value in seconds.items())
    batch, step_s = setting.batch_size, max(device_s, host_s)
    lines = [
        Prediction(f"eager step: {name}", MS * value, "ms", PROFILED, f"ms: {name}")
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    lines += [
        Prediction("eager step", batch / step_s, "images/s", EAGER, SPEED),
        Prediction("eager step: memory", count.held / GIB, "GiB", EAGER, "peak_memory_gib"),
        Prediction("eager step: share of gaps", max(0.0, 1 - device_s / host_s), "", PROFILED, "eager_share_of_gaps"),
        Prediction("eager step: copies that the host waits for", 0.0, "", PROFILED, "copies_to_host_a_step"),
        Prediction("8 images: bound by launches (what CUDA graphs would save)", MS * host_s, "ms", FEW, "step_ms"),
        Prediction("compiled step", batch / compiled_s, "images/s", COMPILED, SPEED),
        Prediction("without determinism", batch / step_s, "images/s", FREE, SPEED),
    ]
    bf16, tf32 = (CONVOLUTION_SHARE * share * rates["bf16_tflops"] * TERA for share in (1, TF32_SHARE))
    for kind, name, rate in (("dalle", "DALL-E in bf16, channels last", bf16), ("dvae", "our d-VAE in TF32", tf32)):
        tokens_s = batch * tokenizer_flop(kind, setting) / rate
        check = TOKENIZERS[kind]
        lines.append(Prediction(f"eager step and {name}", batch / (step_s + tokens_s), "images/s", check, SPEED))
    return lines


def tokenizer_flop(kind: str, setting: Setting) -> float:
    """FLOP for the tokens of one image."""
    if kind == "dalle":
        return 2.0 * dalle_macs(setting.grid)
    with torch.device("meta"):
        dvae = tokenizer.build(load_params(ROOT / "params/imagenet.yaml"), NORMALIZATION)
        images = torch.zeros(1, 3, setting.image_size, setting.image_size)
        return flops(lambda: dvae.encode(images))


def main() -> None:
    setting = Setting("vit_base", 224, 16, 256, torch.device("cpu"), "bf16", compile=False)
    sys.stdout.write(
        "| ViT-B, 224 px, 256 images, tokens given, bf16 | predicted for an H200 | measured |\n|---|---:|---:|\n"
    )
    for line in predict(setting, H200):
        sys.stdout.write(f"| {line.name} | {line.value:,.4g} {line.unit} | not yet measured |\n")


if __name__ == "__main__":
    main()
