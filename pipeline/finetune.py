"""Stage `finetune`: the whole encoder with labels, from the pretrained weights and, beside it, from random ones."""

from dataclasses import replace
from typing import Any

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor

from cae.config import FinetuneConfig
from cae.data.loader import Batch
from cae.data.transforms import FinetuneTransform, seeded
from cae.heads import Classifier
from cae.model import AnyEncoder
from cae.normalization import Normalize
from cae.train.device import Hardware, set_reproducible
from cae.train.log import Row
from cae.train.loop import RunFolder, Sink, Training
from cae.train.optimizer import adamw
from cae.train.parallel import Ranks, checkpoint_activations
from cae.weights import Trained, describe, for_finetuning, save_trained
from pipeline.batches import evaluation_batches, unit_range
from pipeline.checkpoints import load_for_data, preprocessing_of
from pipeline.live import curves
from pipeline.runs import run_folder
from pipeline.scores import Scores, skip_without_labels
from pipeline.training import stage_training
from pipeline.workspace import Workspace, published

# Folder of the baseline's run, in that of the other.
RANDOM_INIT = "random_init"


class LabelledStep:
    """Erasing, mixing and the loss of the paper's recipe, on a batch of the loader; random by (seed, step) alone."""

    def __init__(
        self, model: Classifier, config: FinetuneConfig, normalize: Normalize, num_classes: int, seed: int
    ) -> None:
        self.model, self.normalize, self.seed = model, normalize, seed
        self.erase = RandomErasing(config.random_erase, mode="pixel", device="cpu") if config.random_erase else None
        self.mixup: Mixup | None = None
        self.loss: Any = LabelSmoothingCrossEntropy(config.label_smoothing)
        if config.mixup or config.cutmix:
            self.mixup = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=num_classes
            )
            self.loss = SoftTargetCrossEntropy()

    def __call__(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = self.normalize(unit_range(batch["images"])), batch["labels"].long()
        with seeded(self.seed + step):
            if self.erase:
                images = self.erase(images)
            if self.mixup:
                images, labels = self.mixup(images, labels)
        return self.loss(self.model(images).float(), labels), {}


def run(workspace: Workspace) -> None:
    """Write `models/finetune/classifier.safetensors` and both accuracies; skip with the reason where no labels are."""
    if skip_without_labels(workspace, "finetune", workspace.finetuned):
        workspace.curves("finetune").mkdir(parents=True, exist_ok=True)
        return
    trained = load_for_data(workspace)
    params, index = workspace.params, workspace.index
    config = params.finetune
    folder = run_folder(workspace, "finetune", config.checkpoint_every_steps)
    changes = config.drop_path, config.relative_position_bias
    with curves(folder, workspace.curves("finetune"), params.runtime.tensorboard) as sink:
        encoder, architecture = for_finetuning(trained, *changes, seed=None)
        model, scores, efficiency = train(workspace, encoder, trained, folder, sink)
        beside = replace(folder, path=folder.path / RANDOM_INIT)
        encoder, _ = for_finetuning(trained, *changes, seed=params.seed)
        _, baseline, _ = train(workspace, encoder, trained, beside, None)
    if not Ranks.from_environment().leads:
        return
    origin = {**trained.origin, "finetuned_on": index.source, "finetune": config.model_dump()}
    description = describe(architecture, trained.normalization, trained.eval_crop, origin)
    with published(workspace.finetuned) as models:
        save_trained(models, model, {**description, "classes": index.classes})
    quality = {"top1": scores.top1, "top5": scores.top5, "random_init_top1": baseline.top1}
    workspace.write_metrics("finetune", quality, efficiency)


def train(
    workspace: Workspace, encoder: AnyEncoder, trained: Trained, folder: RunFolder, sink: Sink | None
) -> tuple[Classifier, Scores, Row]:
    """Train a classifier on `encoder` and measure it on the validation images, which rank 0 does alone."""
    params = workspace.params
    hardware = Hardware.choose(params.runtime)
    set_reproducible(params.seed)
    name = "finetune from random weights" if folder.path.name == RANDOM_INIT else "finetune"
    training, step = build(workspace, encoder, trained, hardware, name, sink)
    efficiency = training.run(folder)
    model, scores = step.model, Scores()
    if not Ranks.from_environment().leads:
        return model, scores, efficiency
    model.eval()
    batch_size = params.finetune.batch_size
    with torch.inference_mode():
        for batch in evaluation_batches(workspace, "val", preprocessing_of(trained), batch_size, hardware):
            images = step.normalize(unit_range(batch["images"].to(hardware.device)))
            scores.add(model(images).cpu(), batch["labels"])
    return model, scores, efficiency


def build(
    workspace: Workspace,
    encoder: AnyEncoder,
    trained: Trained,
    hardware: Hardware,
    name: str = "finetune",
    sink: Sink | None = None,
) -> tuple[Training, LabelledStep]:
    """The training of a classifier on `encoder`, and its step, with the model on the device."""
    params, index = workspace.params, workspace.index
    config = params.finetune
    num_classes = len(index.classes)
    model = Classifier(encoder, trained.architecture.width, num_classes).to(hardware.device)
    normalize = Normalize(trained.normalization).to(hardware.device)
    step = LabelledStep(model, config, normalize, num_classes, params.seed)
    if params.runtime.activation_checkpointing:
        checkpoint_activations(model)
    training = stage_training(
        workspace,
        config,
        hardware,
        name=name,
        module=model,
        step=step,
        optimizer=adamw(model, config, config.layer_decay),
        transform=FinetuneTransform(trained.architecture.size_px, config, index.mean),
        sink=sink,
    )
    return training, step
