"""Plans of a pretraining: what it costs by `pipeline.costs`, and how long it takes on given devices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cae.config import Params
from cae.data.order import total_steps
from cae.data.shards import INDEX_NAME, Index
from cae.errors import UserError
from pipeline import profiles
from pipeline.costs import Arithmetic, Memory, count_arithmetic, count_memory, count_parameters, dalle_macs
from pipeline.workspace import Workspace

# TFLOP/s in bf16 without sparsity, from NVIDIA's data sheets, which name twice as many where they count zeros.
PEAK_TFLOPS = {"a100": 312.0, "h100-pcie": 756.0, "h100-sxm": 989.0, "h200": 989.0}
# Nothing has been measured on a GPU yet; the paper's own run reached less (`Table10Row.utilization`).
ASSUMED_UTILIZATION = 0.3

# Training images. The source is the one that params/imagenet.yaml names.
IMAGENET, IMAGENET_TRAIN = "folder:data/imagenet", 1_281_167
MNIST5K, CIFAR10_TRAIN = 5_000, 50_000

# The paper's Table 10.
TABLE_10_EPOCHS, TABLE_10_BATCH, TABLE_10_GPUS = 1600, 2048, 32

FLOPS_PER_MAC = 2
S_PER_H = 3600


@dataclass(frozen=True)
class Machine:
    """What to compute on. Without a peak and without a rate no hours can be told."""

    devices: int
    tflops: float | None
    utilization: float | None
    images_per_s: float | None  # of one device

    @classmethod
    def parse(
        cls,
        *,
        devices: int,
        device: str | None,
        device_tflops: float | None,
        utilization: float | None,
        images_per_s: float | None,
    ) -> "Machine":
        """Options of the command line; raise UserError for values out of range and for pairs that contradict."""
        positive = {"--device-tflops": device_tflops, "--utilization": utilization, "--images-per-s": images_per_s}
        for option, value in positive.items():
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{option}: {value} must be a number above 0")
        if utilization is not None and utilization > 1:
            raise UserError(f"--utilization: {utilization} must be a share, at most 1")
        if device and device_tflops:
            raise UserError(f"--device {device} has a peak of its own; leave out --device-tflops, or --device")
        tflops = PEAK_TFLOPS[device] if device else device_tflops
        if utilization and images_per_s:
            raise UserError("--images-per-s says how fast a device is; leave out --utilization, or --images-per-s")
        if utilization and not tflops:
            raise UserError("--utilization is a share of a peak; add --device or --device-tflops")
        return cls(devices, tflops, utilization, images_per_s)


class Speed(NamedTuple):
    """Images a second of one device, where the figure comes from, and the share of the peak that it is."""

    images_per_s: float
    origin: Literal["assumed", "given", "measured"]
    utilization: float | None


@dataclass(frozen=True)
class Plan:
    """All figures of one profile."""

    name: str
    params: Params
    channels: int
    batch_size: int  # over all devices
    batch_per_device: int
    parameters: dict[str, int]
    arithmetic: Arithmetic
    memory: Memory
    num_images: int | None  # None: nobody knows
    speed: Speed | None
    hours: float | None

    @property
    def is_table_10(self) -> bool:
        """Whether the step is that of the paper's Table 10: ViT-B, 98 of 196 patches masked, the paper's predictor."""
        model, pretrain = self.params.model, self.params.pretrain
        return (
            (model.name, model.size_px, model.patch_size, self.params.num_masked) == ("vit_base", (224, 224), 16, 98)
            and (model.depth, model.width, model.num_heads) == (None, None, None)
            and (pretrain.regressor_depth, pretrain.decoder_depth, self.params.predictor_width) == (4, 4, 768)
            and self.channels == 3
        )


def make(
    workspace: Workspace, names: Sequence[str], machine: Machine, batch_size: int | None, num_images: int | None
) -> list[Plan]:
    """A plan for each profile, or for the workspace's params.yaml where none is named."""
    if not names:
        rate = (workspace.read_metrics("efficiency/pretrain") or {}).get("images_per_s")
        return [_plan(workspace, workspace.params_file.name, workspace.params, machine, batch_size, num_images, rate)]
    read = [profiles.read(workspace.profiles, name) for name in names]
    return [_plan(workspace, found.name, found.params, machine, batch_size, num_images, None) for found in read]


def _plan(
    workspace: Workspace,
    name: str,
    params: Params,
    machine: Machine,
    batch_size: int | None,
    num_images: int | None,
    measured: float | None,
) -> Plan:
    prepared = _prepared(workspace, params)
    channels = prepared.channels if prepared else _channels(params)
    batch_size = batch_size or params.pretrain.batch_size
    if batch_size < machine.devices:
        raise UserError(f"--devices: {machine.devices} devices cannot share a batch of {batch_size} images")
    per_device = math.ceil(batch_size / machine.devices)
    arithmetic = count_arithmetic(params, channels)
    num_images = num_images or (prepared.count["train"] if prepared else _images_of(params))
    speed = speed_of(arithmetic.step, machine, measured)
    hours = None
    if speed and num_images:
        seen = images_seen(num_images, params.pretrain.epochs, batch_size)
        hours = seen / (speed.images_per_s * machine.devices) / S_PER_H
    return Plan(
        name=name,
        params=params,
        channels=channels,
        batch_size=batch_size,
        batch_per_device=per_device,
        parameters=count_parameters(params, channels),
        arithmetic=arithmetic,
        memory=count_memory(params, channels, per_device),
        num_images=num_images,
        speed=speed,
        hours=hours,
    )


def speed_of(step_macs: float, machine: Machine, measured: float | None) -> Speed | None:
    """From a rate that was given, from the device's peak, or from the rate that the last run of the pipeline had."""
    peak = machine.tflops and 1e12 * machine.tflops / (FLOPS_PER_MAC * step_macs)  # images/s at full use
    if machine.images_per_s:
        return Speed(machine.images_per_s, "given", machine.images_per_s / peak if peak else None)
    if peak:
        share = machine.utilization or ASSUMED_UTILIZATION
        return Speed(share * peak, "given" if machine.utilization else "assumed", share)
    return Speed(measured, "measured", None) if measured else None


def images_seen(num_images: int, epochs: int, batch_size: int) -> int:
    """Images that all steps take together; the last batch is full, too."""
    return total_steps(num_images, batch_size, epochs) * batch_size


def _prepared(workspace: Workspace, params: Params) -> Index | None:
    """The prepared data, if it is this profile's."""
    if not (workspace.prepared / INDEX_NAME).exists():
        return None
    return workspace.index if workspace.index.source == params.prepare.source else None


def _channels(params: Params) -> int:
    if params.prepare.channels != "auto":
        return params.prepare.channels
    return 1 if params.prepare.source == "mnist5k" else 3


def _images_of(params: Params) -> int | None:
    """Training images of a source whose size is known without looking."""
    source = params.prepare.source
    if source == "mnist5k":
        return round(MNIST5K * (1 - params.prepare.val_fraction))
    if source.partition(":")[0] == "cifar10":
        return CIFAR10_TRAIN
    return IMAGENET_TRAIN if source == IMAGENET else None


class Table10Row(NamedTuple):
    """A row of the paper's Table 10 (ViT-B, 1600 epochs, batch 2048, 32 A100) beside its arithmetic."""

    method: str
    hours: float
    memory_mib: int
    step_macs: float  # for one image

    @property
    def images_per_s(self) -> float:
        """Of one GPU."""
        return images_seen(IMAGENET_TRAIN, TABLE_10_EPOCHS, TABLE_10_BATCH) / (self.hours * S_PER_H * TABLE_10_GPUS)

    @property
    def utilization(self) -> float:
        return self.images_per_s * FLOPS_PER_MAC * self.step_macs / (1e12 * PEAK_TFLOPS["a100"])

    def hours_at(self, utilization: float) -> float:
        return self.hours * self.utilization / utilization


def table_10(cae: Plan) -> list[Table10Row]:
    """BEiT: the encoder on all patches, a head on 75 of them, DALL-E. MAE: 49 visible patches, a decoder 8 × 512.

    The paper does not say which tokenizer this table had. With DALL-E for BEiT and CAE alike, the rows compare.
    """
    return [
        Table10Row("BEiT", 115, 14330, 54.1e9 + dalle_macs((14, 14))),
        Table10Row("MAE", 85, 11222, 29.3e9),
        Table10Row("CAE", 109, 13730, cae.arithmetic.other_targets["dalle"]),
    ]


def as_dict(plan: Plan) -> dict[str, Any]:
    """For JSON; units in the names."""
    arithmetic, memory = plan.arithmetic, plan.memory
    return {
        "name": plan.name,
        "channels": plan.channels,
        "epochs": plan.params.pretrain.epochs,
        "batch_size": plan.batch_size,
        "batch_per_device": plan.batch_per_device,
        "num_parameters": plan.parameters,
        "num_macs": {part.name: part.macs for part in arithmetic.parts}
        | {"encoder_all_patches": arithmetic.encoder_all_patches},
        "num_step_macs": {plan.params.tokenizer.kind: arithmetic.step, **arithmetic.other_targets},
        "memory_bytes": {
            **{key: value for key, value in memory._asdict().items() if key != "activations"},
            **{f"activations_{precision}": value for precision, value in memory.activations.items()},
            "total_fp32": memory.total("fp32"),
            "total_bf16": memory.total("bf16"),
        },
        "num_images": plan.num_images,
        "images_per_s_per_device": plan.speed and plan.speed.images_per_s,
        "images_per_s_origin": plan.speed and plan.speed.origin,
        "utilization": plan.speed and plan.speed.utilization,
        "hours": plan.hours,
    }
