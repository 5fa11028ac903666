"""What a run will take: a few real steps on random pixels on this machine, a few real images stored."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cae.config import OptimizationConfig, Params
from cae.data.shards import decode_stored
from cae.data.sources import Reject, Source
from cae.data.transforms import CropFlip, to_array
from cae.heads import Classifier
from cae.model import ContextAutoencoder, Encoder
from cae.normalization import Normalization
from cae.train.device import Hardware
from cae.train.optimizer import adamw
from pipeline.batches import draw_masks, unit_range
from pipeline.inspection import Findings, sample_positions
from pipeline.prepare import Preparation
from pipeline.pretrain import Objective, mask_sampler
from pipeline.tokenizer import build, temperature

TIMED_STEPS = 3
STORED_SAMPLE = 64
BYTES_PER_PARAMETER = 3 * 4  # AdamW keeps two moments beside each weight
PASSES_OF_PROBES = 3 * 2  # three probes, each on the pretrained and on a random encoder


class Steps(NamedTuple):
    """Seconds of one step of each training, and of the encoder on one image."""

    tokenizer_s: float
    pretrain_s: float
    finetune_s: float
    encode_s: float
    num_parameters: int


class Storing(NamedTuple):
    """One stored image: bytes on disk, seconds to read and crop it."""

    bytes: float
    load_s: float


def time_steps(params: Params, channels: int, num_classes: int) -> Steps:
    """Run a few steps of the three trainings with these parameters, on random pixels."""
    hardware = Hardware.choose(params.runtime)
    model, config = params.model, params.tokenizer
    normalization = Normalization([0.5] * channels, [0.25] * channels)
    dvae = build(params, normalization).to(hardware.device)
    architecture = params.architecture(channels, dvae.num_outputs)
    cae = ContextAutoencoder(architecture, params.pretrain.drop_path)
    objective = Objective(cae, dvae, normalization, params.pretrain.alignment_weight, 1)
    objective.to(hardware.device)
    pooled = architecture.model_copy(update={"final_norm": "pooled"})
    encoder = Encoder(pooled, params.finetune.drop_path)
    classifier = Classifier(encoder, architecture.width, max(2, num_classes)).to(hardware.device)

    def batch(size: int) -> dict[str, Tensor]:
        visible, masked = draw_masks(mask_sampler(params), 0, range(size))
        images = torch.randint(0, 256, (size, channels, *model.size_px), dtype=torch.uint8)
        parts = {"images": images, "visible": visible, "masked": masked}
        return {name: part.to(hardware.device) for name, part in parts.items()}

    def tokenizer_loss(b: dict[str, Tensor]) -> Tensor:
        loss = dvae.training_loss(unit_range(b["images"]), temperature(config, 0, 1))
        return loss.reconstruction + loss.unused

    tokenizer_s = _seconds(tokenizer_loss, dvae, config, batch, hardware)
    pretrain_s = _seconds(lambda b: objective(b, 0)[0], cae, params.pretrain, batch, hardware)
    finetune_s = _seconds(
        lambda b: classifier(unit_range(b["images"])).sum(), classifier, params.finetune, batch, hardware
    )
    # A forward pass costs about a third of a step.
    encode_s = finetune_s / 3 / params.finetune.batch_size
    return Steps(tokenizer_s, pretrain_s, finetune_s, encode_s, sum(p.numel() for p in cae.parameters()))


def _seconds(
    loss: Callable[[dict[str, Tensor]], Tensor],
    module: nn.Module,
    config: OptimizationConfig,
    batch: Callable[[int], dict[str, Tensor]],
    hardware: Hardware,
) -> float:
    """The fastest of a few steps; the first one also allocates."""
    optimizer = adamw(module, config)
    given = batch(config.batch_size)
    fastest = float("inf")
    for _ in range(1 + TIMED_STEPS):
        started = time.perf_counter()
        with hardware.autocast():
            value = loss(given)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        float(value.detach())  # waits for a GPU
        fastest = min(fastest, time.perf_counter() - started)
    return fastest


def measure_storing(source: Source, params: Params, channels: int) -> Storing:
    """Store a few images as `prepare` would, and read them as training would."""
    preparation = Preparation(source, channels, params.prepare.short_side_px)
    crop, rng = CropFlip(params.model.size_px, params.pretrain), np.random.default_rng(0)
    stored = [preparation[position] for position in sample_positions(len(source), STORED_SAMPLE)]
    images = [result.row.image for result in stored if not isinstance(result, Reject)]
    started = time.perf_counter()
    for data in images:
        to_array(crop(decode_stored(data, channels), rng))
    elapsed = time.perf_counter() - started
    return Storing(sum(map(len, images)) / max(1, len(images)), elapsed / max(1, len(images)))


def stage_seconds(params: Params, findings: Findings, steps: Steps, storing: Storing) -> dict[str, float]:
    """Seconds of each stage. Workers read while the model computes; without them the two add up."""
    workers = params.runtime.num_workers
    load_s = storing.load_s / max(1, workers)

    def training(step_s: float, config: OptimizationConfig) -> float:
        waiting = load_s * config.batch_size
        one = max(step_s, waiting) if workers else step_s + waiting
        return config.epochs * (findings.num_train // config.batch_size) * one

    num_images = findings.num_train + findings.num_val
    result = {
        "prepare": findings.num_images * findings.decode_s * 1.5 / max(1, workers),
        "tokenizer": training(steps.tokenizer_s, params.tokenizer),
        "pretrain": training(steps.pretrain_s, params.pretrain),
    }
    if findings.class_counts:
        # From the pretrained weights, and beside it from random ones.
        result["finetune"] = 2 * training(steps.finetune_s, params.finetune)
        result["probes"] = PASSES_OF_PROBES * num_images * (steps.encode_s + load_s)
    return result


def disk_bytes(findings: Findings, steps: Steps, storing: Storing) -> float:
    """Prepared images and their copy in DVC's cache; two checkpoints, the model and its ONNX files."""
    images = 2 * (findings.num_train + findings.num_val) * storing.bytes
    return images + steps.num_parameters * (2 * BYTES_PER_PARAMETER + 6 * 4)
