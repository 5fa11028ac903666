"""Stages `probe@linear`, `probe@attentive`, `probe@knn`: what the frozen encoder knows, beside random weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from cae.config import HeadConfig, ProbeConfig
from cae.data.order import WHOLE
from cae.data.shards import Split
from cae.data.transforms import CropFlip, CropTransform
from cae.errors import UserError
from cae.heads import AttentiveHead
from cae.model import AnyEncoder
from cae.storage import save_weights
from cae.train.device import Hardware, set_reproducible
from cae.train.log import Row
from cae.train.loop import BatchSource, Training
from cae.weights import Trained, random_encoder, trained_encoder
from pipeline.batches import evaluation_batches, train_batches
from pipeline.checkpoints import load_for_data, preprocessing_of
from pipeline.frozen_features import (
    MOMENTUM,
    Features,
    Pool,
    all_tokens,
    cached_batches,
    class_token,
    head_scores,
    head_training,
    linear_probe,
    neighbor_scores,
    patches,
    pooled,
)
from pipeline.graphs import EncoderGraph
from pipeline.runs import shared_folder
from pipeline.scores import Scores, skip_without_labels
from pipeline.workspace import Workspace, published


@dataclass
class FrozenEncoder:
    """An encoder whose features are read, never changed; `name` tells the pretrained from the random one."""

    name: Literal["pretrained", "random_init"]
    encoder: AnyEncoder
    trained: Trained
    hardware: Hardware

    def __post_init__(self) -> None:
        self.graph = EncoderGraph(self.encoder, self.trained.normalization).eval().to(self.hardware.device)

    @property
    def width(self) -> int:
        return self.trained.architecture.width

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images [b, c, h, w], in float32."""
        with torch.autocast(images.device.type, enabled=False):
            features = self.graph.features(images)
        features.pop("class_attention", None)
        return features

    def features(self, workspace: Workspace, split: Split) -> Features:
        """Features of every image of a split with evaluation preprocessing, on the CPU."""
        parts: dict[str, list[Tensor]] = {}
        for batch in evaluation_batches(workspace, split, preprocessing_of(self.trained), 256, self.hardware):
            features = self(batch["images"].to(self.hardware.device))
            for name, values in {**features, "labels": batch["labels"].long()}.items():
                parts.setdefault(name, []).append(values.cpu())
        return {name: torch.cat(values) for name, values in parts.items()}


def run(workspace: Workspace, name: str) -> None:
    """Write `models/probe/NAME` and `metrics/probe_NAME.json`; skip with the reason where no labels are."""
    if skip_without_labels(workspace, f"probe_{name}", workspace.probe(name)):
        return
    params = workspace.params
    hardware = Hardware.choose(params.runtime)
    trained = load_for_data(workspace)
    check_class_token(name, params.probe, trained)
    encoders = (
        FrozenEncoder("pretrained", trained_encoder(trained), trained, hardware),
        FrozenEncoder("random_init", random_encoder(trained, params.seed), trained, hardware),
    )
    probes = {"linear": linear, "attentive": attentive, "knn": knn}
    with published(workspace.probe(name)) as folder:
        quality, efficiency = probes[name](workspace, encoders, folder)
    workspace.write_metrics(f"probe_{name}", quality, efficiency)


def check_class_token(name: str, config: ProbeConfig, trained: Trained) -> None:
    """Raise UserError where a probe is to read a class token that the encoder does not have."""
    wrong = {
        "attentive": "probe.attentive.use_class_token: false" if config.attentive.use_class_token else None,
        "knn": "probe.knn.feature: pooled" if config.knn.feature == "class_token" else None,
    }
    if not trained.encoder.num_prefix and wrong.get(name):
        raise UserError(f"the encoder has no class token; set {wrong[name]}")


def linear(
    workspace: Workspace, encoders: tuple[FrozenEncoder, FrozenEncoder], folder: Path
) -> tuple[dict[str, float], Row]:
    """The paper's linear probe on the class token; on the mean of the patches beside it.

    An encoder without class token has the mean alone, which then stands for both.
    """
    config = workspace.params.probe.linear
    num_classes = len(workspace.index.classes)
    quality: dict[str, float] = {}
    efficiency: Row = {}
    for frozen in encoders:
        prefix = "" if frozen.name == "pretrained" else "random_init_"
        pools = ((class_token, ""), (pooled, "pooled_")) if frozen.encoder.num_prefix else ((pooled, ""),)
        for pool, infix in pools:
            set_reproducible(workspace.params.seed)
            head, optimizer = linear_probe(frozen.width, num_classes, config)
            scores, rates = probe_head(workspace, frozen, head, optimizer, config, pool)
            quality[f"{prefix}{infix}top1"] = scores.top1
            if not prefix + infix:
                quality["top5"], efficiency = scores.top5, rates
                _save_head(folder / "linear.safetensors", head, workspace)
        quality.setdefault(f"{prefix}pooled_top1", quality[f"{prefix}top1"])
    return quality, efficiency


def attentive(
    workspace: Workspace, encoders: tuple[FrozenEncoder, FrozenEncoder], folder: Path
) -> tuple[dict[str, float], Row]:
    """The paper's attentive probe on the patches."""
    config = workspace.params.probe.attentive
    num_heads = encoders[0].trained.architecture.num_heads
    pool = all_tokens if config.use_class_token else patches
    quality: dict[str, float] = {}
    efficiency: Row = {}
    for frozen in encoders:
        set_reproducible(workspace.params.seed)
        head = AttentiveHead(frozen.width, num_heads, len(workspace.index.classes))
        optimizer = SGD(head.parameters(), lr=config.lr, momentum=MOMENTUM, weight_decay=config.weight_decay)
        scores, rates = probe_head(workspace, frozen, head, optimizer, config, pool)
        if frozen.name == "pretrained":
            quality, efficiency = {"top1": scores.top1, "top5": scores.top5}, rates
            _save_head(folder / "attentive.safetensors", head, workspace)
        else:
            quality["random_init_top1"] = scores.top1
    return quality, efficiency


def knn(
    workspace: Workspace, encoders: tuple[FrozenEncoder, FrozenEncoder], folder: Path
) -> tuple[dict[str, float], Row]:
    """Weighted vote of the nearest training images; nothing is trained."""
    results = {}
    for frozen in encoders:
        bank, queries = (split_features(workspace, frozen, split) for split in ("train", "val"))
        results[frozen.name] = neighbor_scores(bank, queries, workspace.params.probe.knn, len(workspace.index.classes))
    (folder / "README.txt").write_text("The kNN probe has no weights: its classifier is the training images.\n")
    best = results["pretrained"]
    return {"top1": best.top1, "top5": best.top5, "random_init_top1": results["random_init"].top1}, {}


def probe_head(
    workspace: Workspace, frozen: FrozenEncoder, head: nn.Module, optimizer: Optimizer, config: HeadConfig, pool: Pool
) -> tuple[Scores, Row]:
    """Train `head` on the frozen features and measure it on the validation images."""
    efficiency = probe_training(workspace, frozen, head, optimizer, config, pool).run()
    val = split_features(workspace, frozen, "val")
    return head_scores(head, pool(val), val["labels"], frozen.hardware), efficiency


def probe_training(
    workspace: Workspace, frozen: FrozenEncoder, head: nn.Module, optimizer: Optimizer, config: HeadConfig, pool: Pool
) -> Training:
    """The training of `head` on the frozen features that `pool` picks."""
    return head_training(
        name=f"probe {frozen.name} {type(head).__name__} {pool.__name__}",
        head=head,
        optimizer=optimizer,
        config=config,
        num_train=workspace.index.count["train"],
        batches=lambda total_steps: _batches(workspace, frozen, config, total_steps),
        values=lambda batch: pool(frozen(batch["images"]) if "images" in batch else batch),
        hardware=frozen.hardware,
        seed=workspace.params.seed,
    )


def split_features(workspace: Workspace, frozen: FrozenEncoder, split: Split) -> Features:
    """Evaluation features of a split; with `probe.cache_features` the first probe computes them for all."""
    if not workspace.params.probe.cache_features:
        return frozen.features(workspace, split)
    with shared_folder(workspace, "probe") as folder:
        path = folder / f"{frozen.name}-{split}.safetensors"
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            save_file(frozen.features(workspace, split), temporary)
            temporary.replace(path)
        return load_file(path)


def _batches(workspace: Workspace, frozen: FrozenEncoder, config: HeadConfig, total_steps: int) -> BatchSource:
    if not workspace.params.probe.cache_features:
        crop = CropTransform(CropFlip(frozen.trained.architecture.size_px, config))
        return train_batches(
            workspace,
            crop,
            batch_size=config.batch_size,
            total_steps=total_steps,
            share=WHOLE,
            hardware=frozen.hardware,
        )
    features = split_features(workspace, frozen, "train")
    return cached_batches(features, config.batch_size, workspace.params.seed, total_steps)


def _save_head(path: Path, head: nn.Module, workspace: Workspace) -> None:
    save_weights(path, head, {"kind": path.stem, "classes": workspace.index.classes})
