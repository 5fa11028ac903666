"""What a step of pretraining costs in arithmetic and in memory, counted over the real modules; nothing is computed.

Arithmetic: `FlopCounterMode` on the meta device. It counts matrix products and convolutions, the two products of
attention included, and nothing else; a MAC is two of its FLOPs. Memory: the objective of `pretrain` on fake tensors of
a CPU, which have the shapes, types and kernels of real ones and no values.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from cae.config import DALLE_PATCH_PX, Params
from cae.model import ContextAutoencoder, Decoder, gather_patches
from cae.normalization import Normalization
from cae.targets.dalle import PUBLISHED_SIZES, DalleArchitecture, DalleTarget
from cae.targets.files import AnyTarget
from cae.targets.pixels import PixelArchitecture, PixelTarget
from pipeline import tokenizer
from pipeline.pretrain import Objective

# A backward pass takes the gradient by the input and that by the weights, each as much work as the forward pass.
TRAINED_PASSES, FROZEN_PASSES = 3, 1
BYTES_PER_VALUE = 4  # weights, gradients and moments are float32 under autocast too
NUM_MOMENTS = 2  # of AdamW

Precision = Literal["fp32", "bf16"]


class Part(NamedTuple):
    """One part of a step: multiply-accumulates of one forward pass for one image, and how many passes a step counts."""

    name: str
    macs: int
    passes: int


class Arithmetic(NamedTuple):
    """Multiply-accumulates for one image."""

    parts: list[Part]  # of a step with the profile's own target
    other_targets: dict[str, float]  # the whole step with another target
    encoder_all_patches: int  # inference

    @property
    def step(self) -> int:
        return sum(part.passes * part.macs for part in self.parts)


class Memory(NamedTuple):
    """Bytes on one device. Not among them: what the allocator keeps in reserve, and buffers that exchange gradients."""

    weights: int  # the frozen tokenizer's too
    gradients: int
    moments: int
    activations: dict[Precision, int]  # kept for the backward pass; with bf16 the casts of the weights are among them
    tokenizer: int  # the most that computing the targets holds at a time, which is before there are activations
    checkpoint: int  # on disk, one of them

    def total(self, precision: Precision) -> int:
        resident = self.weights + self.gradients + self.moments
        return resident + max(self.activations[precision], self.tokenizer)


def count_parameters(params: Params, channels: int) -> dict[str, int]:
    """Parameters by part; the tokenizer's are frozen in pretraining, all others trained."""
    objective = _objective(params, channels)
    model = objective.model
    parts: dict[str, nn.Module] = {
        "encoder": model.encoder,
        "projection": model.projection,
        "regressor": model.regressor,
        "decoder": model.decoder.blocks,
        "head": model.decoder.head,
    }
    counts = {name: _num_values(module) for name, module in parts.items()}
    counts["decoder"] += _num_values(model.decoder.norm)
    return {**counts, "trained": _num_values(model), "tokenizer": _num_values(objective.target)}


def count_arithmetic(params: Params, channels: int) -> Arithmetic:
    """MACs of every part of a step, in the order of the model's forward pass."""
    objective, batch = _objective(params, channels), _batch(params, channels, 1, "meta")
    model, images = objective.model, batch["images"].float()
    visible, masked = batch["visible"], batch["masked"]

    embedded, embed_macs = _macs(lambda: model.encoder.embed(images))
    z, encoder_macs = _macs(lambda: model.encoder.encode(gather_patches(embedded, visible))[:, 1:])
    z_v, projection_macs = _macs(lambda: model.projection(z))
    positions = (model.patch_positions(masked), model.patch_positions(visible))
    z_m, regressor_macs = _macs(lambda: model.regressor(z_v, *positions))
    _, alignment_macs = _macs(lambda: model.projection(model.encoder.encode(gather_patches(embedded, masked))[:, 1:]))
    _, head_macs = _macs(lambda: model.decoder.head(z_m))
    _, decoder_macs = _macs(lambda: model.decode(z_m, masked))
    _, target_macs = _macs(lambda: objective.target.encode(objective.target.view(images)))
    _, all_macs = _macs(lambda: model.encoder(images))

    def with_head(num_outputs: int) -> int:
        decoder = Decoder(params.architecture(channels, num_outputs), 0.0)
        return rest + TRAINED_PASSES * _macs(lambda: decoder(z_m, positions[0]))[1]

    parts = [
        Part("encoder", embed_macs + encoder_macs, TRAINED_PASSES),
        Part("projection", projection_macs, TRAINED_PASSES),
        Part("regressor", regressor_macs, TRAINED_PASSES),
        Part("decoder", decoder_macs - head_macs, TRAINED_PASSES),
        Part("head", head_macs, TRAINED_PASSES),
        Part("alignment", alignment_macs, FROZEN_PASSES),
        Part("tokenizer", target_macs, FROZEN_PASSES),
    ]
    rest = sum(part.passes * part.macs for part in parts if part.name not in ("decoder", "head", "tokenizer"))
    with torch.device("meta"):
        others = {
            "tokens_given": float(with_head(params.tokenizer.vocab_size)),
            "pixels": float(with_head(params.model.patch_size**2 * channels)),
        }
        if params.model.patch_size % DALLE_PATCH_PX == 0 and channels in (1, 3):
            others["dalle"] = float(with_head(PUBLISHED_SIZES.vocab_size) + dalle_macs(params.model.grid))
    return Arithmetic(parts, others, all_macs)


def count_memory(params: Params, channels: int, batch_size: int) -> Memory:
    """Memory of one step of `pretrain` on `batch_size` images."""
    parameters = count_parameters(params, channels)
    trained = BYTES_PER_VALUE * parameters["trained"]
    return Memory(
        weights=trained + BYTES_PER_VALUE * parameters["tokenizer"],
        gradients=trained,
        moments=NUM_MOMENTS * trained,
        activations={
            "fp32": _saved_bytes(params, channels, batch_size, bf16=False),
            "bf16": _saved_bytes(params, channels, batch_size, bf16=True),
        },
        tokenizer=_tokenizer_bytes(params, channels, batch_size),
        checkpoint=(1 + NUM_MOMENTS) * trained,
    )


def _saved_bytes(params: Params, channels: int, batch_size: int, bf16: bool) -> int:
    """What autograd keeps between forward and backward, losses and drop path included."""
    objective = _objective(params, channels)
    modules = (objective.model, objective.target, objective.normalize)
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # By storage, for many saved tensors are views of one; holding them keeps the numbers from being used again.
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    # The modules come from the meta device, whose tensors are no fake ones.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in modules:
            module.to_empty(device="cpu")
        resident = {value.untyped_storage()._cdata for m in modules for value in (*m.parameters(), *m.buffers())}
        batch = _batch(params, channels, batch_size, "cpu")
        with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            objective(batch, 0)
        return sum(tensor.untyped_storage().nbytes() for number, tensor in saved.items() if number not in resident)


def _tokenizer_bytes(params: Params, channels: int, batch_size: int) -> int:
    target = _objective(params, channels).target
    with FakeTensorMode(allow_non_fake_inputs=True):
        target.to_empty(device="cpu")
        images = _batch(params, channels, batch_size, "cpu")["images"].float()
        tracker = MemTracker()
        tracker.track_external(target, images)
        with torch.no_grad(), tracker:
            target.encode(target.view(images))
        peak, after = (tracker.get_tracker_snapshot(moment)[images.device]["Total"] for moment in ("peak", "current"))
        return peak - after


def _objective(params: Params, channels: int) -> Objective:
    """The objective of `pretrain` in train mode, on the meta device."""
    normalization = Normalization([0.5] * channels, [0.25] * channels)
    with torch.device("meta"):
        target = _target(params, normalization)
        architecture = params.architecture(channels, target.num_outputs)
        model = ContextAutoencoder(architecture, params.pretrain.drop_path, params.pretrain.alignment_drop_path)
        return Objective(model, target, normalization, params.pretrain.alignment_weight, 0)


def dalle_macs(grid: tuple[int, int]) -> int:
    """MACs of the published DALL-E tokenizer for the tokens of a grid of patches."""
    with torch.device("meta"):
        target = _dalle(3, grid, DALLE_PATCH_PX)
        view = torch.empty(1, 3, grid[0] * DALLE_PATCH_PX, grid[1] * DALLE_PATCH_PX)
    return _macs(lambda: target.encode(view))[1]


def _dalle(channels: int, grid: tuple[int, int], patch_size: int) -> DalleTarget:
    sizes = PUBLISHED_SIZES.model_dump()
    shown: Literal[1, 3] = 1 if channels == 1 else 3
    return DalleTarget(
        DalleArchitecture(
            **sizes, channels=shown, patch_size=patch_size, grid=grid, dtype="float32", channels_last=False
        )
    )


def _target(params: Params, normalization: Normalization) -> AnyTarget:
    if params.tokenizer.kind == "dvae":
        return tokenizer.build(params, normalization).eval()
    if params.tokenizer.kind == "dalle":
        return _dalle(len(normalization.mean), params.model.grid, params.model.patch_size)
    architecture = PixelArchitecture(
        channels=len(normalization.mean),
        patch_size=params.model.patch_size,
        grid=params.model.grid,
        per_patch=params.tokenizer.normalize_pixels,
    )
    return PixelTarget(architecture, *normalization)


def _batch(params: Params, channels: int, batch_size: int, device: str) -> dict[str, Tensor]:
    """A batch of the loader without values."""
    num_visible = params.model.num_patches - params.num_masked
    with torch.device(device):
        return {
            "images": torch.empty(batch_size, channels, *params.model.size_px, dtype=torch.uint8),
            "visible": torch.empty(batch_size, num_visible, dtype=torch.int64),
            "masked": torch.empty(batch_size, params.num_masked, dtype=torch.int64),
        }


def _macs(forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What `forward` returns, and its multiply-accumulates."""
    with FlopCounterMode(display=False) as counter:
        result = forward()
    return result, counter.get_total_flops() // 2


def _num_values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
