"""Stage `pretrain`: the Context Autoencoder on the prepared images, without labels."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cae.architecture import Architecture
from cae.config import Params
from cae.data.loader import Batch
from cae.data.order import steps_in, total_steps
from cae.data.shards import file_sha256
from cae.data.transforms import CropFlip, PretrainTransform
from cae.masking import MaskSampler
from cae.model import CaeLosses, CaeOutput, ContextAutoencoder, alignment_loss
from cae.normalization import Normalization, Normalize
from cae.targets import take
from cae.targets.files import AnyTarget, load_target
from cae.train.alarm import Alarm
from cae.train.device import Hardware, set_reproducible
from cae.train.loop import Sink, Training
from cae.train.optimizer import adamw
from cae.train.parallel import Ranks, share_out, whole_state
from cae.weights import Trained, describe, load_trained, save_trained
from pipeline.batches import (
    draw_masks,
    evaluation_batches,
    second_view_px,
    unit_range,
    view_for_target,
)
from pipeline.live import curves
from pipeline.runs import run_folder
from pipeline.start_from import fitting, load_parts
from pipeline.training import stage_training
from pipeline.workspace import Workspace, published

# Every run of docs/small-scale.md dips early on. After a third of the steps all that learn tokens stay at 0.1 or more
# with λ up to 2, and λ = 10 falls to 0.02.
COLLAPSED_VARIANCE, COLLAPSED_AFTER = 0.05, 1 / 3


class Objective:
    """Equation 1: decoding loss plus λ times alignment loss, on a batch of the loader."""

    def __init__(
        self,
        model: ContextAutoencoder,
        target: AnyTarget,
        normalization: Normalization,
        alignment_weight: float,
        alignment_warmup_steps: int,
    ) -> None:
        self.model, self.target = model, target
        self.normalize = Normalize(normalization)
        self.alignment_weight, self.alignment_warmup_steps = alignment_weight, alignment_warmup_steps

    def to(self, device: torch.device) -> "Objective":
        for module in (self.model, self.target, self.normalize):
            module.to(device)
        return self

    def __call__(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        codes = self.codes(batch)
        images = self.normalize(unit_range(batch["images"]))
        head_loss = partial(self.target.head_loss, codes=codes)
        output = self.model(images, batch["visible"], batch["masked"], head_loss)
        assert isinstance(output, CaeLosses)
        decoding, alignment = output.decoding.loss, alignment_loss(output.z_m, output.z_m_target)
        parts = {
            "decoding_loss": decoding,
            "alignment_loss": alignment,
            "latent_variance": latent_variance(output.z_m_target),
            **output.decoding.scores,
        }
        weight = self.alignment_weight * min(1.0, (step + 1) / max(1, self.alignment_warmup_steps))
        return decoding + weight * alignment, parts

    def codes(self, batch: Batch) -> Tensor:
        """The targets of the masked patches."""
        # No autocast: near ties between codes would fall either way.
        with torch.inference_mode(), torch.autocast(batch["images"].device.type, enabled=False):
            codes = take(self.target.encode(view_for_target(batch)), batch["masked"])
        # A copy, for what inference mode makes cannot take part in a loss.
        return codes.clone()

    def predict(self, batch: Batch) -> tuple[CaeOutput, Tensor]:
        """The model's whole output, and the targets of the masked patches."""
        images = self.normalize(unit_range(batch["images"]))
        output = self.model(images, batch["visible"], batch["masked"])
        assert isinstance(output, CaeOutput)
        return output, self.codes(batch)


class Pretraining(NamedTuple):
    """A pretraining that is ready to run, and what its weights are described by."""

    training: Training
    objective: Objective
    architecture: Architecture
    normalization: Normalization
    start: Trained | None  # the weights that it starts from


def run(workspace: Workspace) -> None:
    """Write `models/pretrain/cae.safetensors`; goes on from the last checkpoint of the same parameters and data."""
    params, index = workspace.params, workspace.index
    config = params.pretrain
    hardware = Hardware.choose(params.runtime)
    set_reproducible(params.seed)
    folder = run_folder(workspace, "pretrain", config.checkpoint_every_steps)
    with curves(folder, workspace.curves("pretrain"), params.runtime.tensorboard) as sink:
        training, objective, architecture, normalization, start = build(workspace, hardware, sink)
        efficiency = training.run(folder)
    state = whole_state(training.module)
    if not Ranks.from_environment().leads:
        return
    objective.model = model = ContextAutoencoder(architecture).to(hardware.device).eval()
    model.load_state_dict(state)
    quality = evaluate(workspace, objective, mask_sampler(params), hardware)
    origin = {
        "name": params.model.name,
        "source": index.source,
        "data_hash": index.hash,
        "target_sha256": file_sha256(workspace.target),
        "mask_ratio": config.mask.ratio,
        # Those that DVC tracks for this stage, no more: others may change without a new run.
        "params": folder.stamp["params"],
        **({"started_from": start.origin} if start else {}),
    }
    with published(workspace.pretrained) as models:
        save_trained(models, model, describe(architecture, normalization, params.model.eval_crop, origin))
    workspace.write_metrics("pretrain", quality, efficiency)


def build(workspace: Workspace, hardware: Hardware, sink: Sink | None = None) -> Pretraining:
    """Model, target and objective on the device, and their training."""
    params, index = workspace.params, workspace.index
    config = params.pretrain
    target = load_target(workspace.target)
    target.speed_up()
    architecture = params.architecture(index.channels, target.num_outputs)
    normalization = Normalization(index.mean, index.std)
    start = None
    if config.start_from is not None:
        start = load_trained(workspace.root / config.start_from)
        architecture = fitting(architecture, start, Path(config.start_from))
        # The weights know the images that they were trained on.
        normalization = start.normalization
    model = ContextAutoencoder(architecture, config.drop_path, config.alignment_drop_path)
    if start:
        load_parts(model, start)
    model.to(hardware.device)
    share_out(model, params.runtime)
    num_train = index.count["train"]
    lr_warmup_steps = steps_in(config.warmup_epochs, num_train, config.batch_size)
    warmup_steps = steps_in(config.alignment_warmup_epochs, num_train, config.batch_size)
    objective = Objective(model, target, normalization, config.alignment_weight, warmup_steps).to(hardware.device)
    num_steps = total_steps(num_train, config.batch_size, config.epochs)
    training = stage_training(
        workspace,
        config,
        hardware,
        name="pretrain",
        module=model,
        step=objective,
        optimizer=adamw(model, config),
        transform=training_transform(params, target),
        sink=sink,
        clip_grad=config.clip_grad,
        log_every_steps=config.log_every_steps,
        alarms=(collapse_alarm(max(lr_warmup_steps, round(COLLAPSED_AFTER * num_steps))),),
    )
    return Pretraining(training, objective, architecture, normalization, start)


def training_transform(params: Params, target: AnyTarget) -> PretrainTransform:
    """Crop, flip and mask; the target's own view where it reads another size than the model."""
    view_px = second_view_px(params.model, target.patch_px)
    return PretrainTransform(CropFlip(params.model.size_px, params.pretrain), mask_sampler(params), view_px)


def collapse_alarm(from_step: int) -> Alarm:
    """Sounds when the encoder gives all patches of an image the same representation."""
    return Alarm(
        key="latent_variance",
        floor=COLLAPSED_VARIANCE,
        from_step=from_step,
        meaning="the alignment has collapsed the representation, all patches of an image look alike to the encoder",
        advice="Lower pretrain.alignment_weight or pretrain.lr, or set pretrain.alignment_warmup_epochs",
    )


def mask_sampler(params: Params) -> MaskSampler:
    """The masks of `pretrain.mask`."""
    mask = params.pretrain.mask
    return MaskSampler(params.model.grid, params.num_masked, mask.kind, mask.min_block)


@torch.inference_mode()
def evaluate(workspace: Workspace, objective: Objective, masks: MaskSampler, hardware: Hardware) -> dict[str, float]:
    """Losses and scores on the validation images, each with a mask of its own that is the same in every run."""
    totals: dict[str, float] = {}
    num_images = 0
    params = workspace.params
    view_px = second_view_px(params.model, objective.target.patch_px)
    given = workspace.preprocessing(), params.pretrain.batch_size, hardware, view_px
    for batch in evaluation_batches(workspace, "val", *given):
        size = len(batch["images"])
        positions = range(num_images, num_images + size)
        batch["visible"], batch["masked"] = draw_masks(masks, params.seed, positions)
        batch = {key: value.to(hardware.device) for key, value in batch.items()}
        output, codes = objective.predict(batch)
        values: dict[str, Any] = {
            "decoding_loss": objective.target.loss(output.prediction, codes),
            "alignment_loss": alignment_loss(output.z_m, output.z_m_target),
            "latent_variance": latent_variance(output.z_m_target),
            **objective.target.scores(output.prediction, codes),
        }
        for key, value in values.items():
            totals[key] = totals.get(key, 0.0) + size * float(value)
        num_images += size
    return {key: value / num_images for key, value in totals.items()}


def latent_variance(z_m_target: Tensor) -> Tensor:
    """Variance of the target representations over the patches of an image; near 0 the alignment has collapsed."""
    return z_m_target.float().var(dim=1).mean()
