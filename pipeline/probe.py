"""Stages `probe@linear`, `probe@attentive`, `probe@knn`: what the frozen encoder knows, beside random weights."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.optim import Lars
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from cae.config import HeadConfig
from cae.data.loader import Batch, EpochBatches, steps_per_epoch
from cae.data.shards import Split
from cae.data.transforms import CropFlip, CropTransform
from cae.heads import AttentiveHead, LinearHead, knn_predict
from cae.model import Encoder
from cae.normalization import Normalize
from cae.storage import save_weights
from cae.train.device import Hardware, set_reproducible
from cae.train.log import Row
from cae.train.loop import BatchSource, Training
from cae.train.optimizer import cosine_schedule
from cae.weights import LoadedCae, load_cae, pretrained_encoder, random_encoder
from pipeline.batches import evaluation_batches, train_batches, unit_range
from pipeline.runs import shared_folder
from pipeline.scores import Scores, scores_of, skip_without_labels
from pipeline.workspace import Workspace

Features = dict[str, Tensor]
"""`tokens` [n, 1+patches, d] after the final LayerNorm, class token first, and `labels` [n]."""

Pool = Callable[[Tensor], Tensor]
MOMENTUM = 0.9


def class_token(tokens: Tensor) -> Tensor:
    return tokens[:, 0]


def pooled(tokens: Tensor) -> Tensor:
    return tokens[:, 1:].mean(dim=1)


def patches(tokens: Tensor) -> Tensor:
    return tokens[:, 1:]


def all_tokens(tokens: Tensor) -> Tensor:
    return tokens


@dataclass
class FrozenEncoder:
    """An encoder whose features are read, never changed; `name` tells the pretrained from the random one."""

    name: Literal["pretrained", "random_init"]
    encoder: Encoder
    loaded: LoadedCae
    hardware: Hardware

    def __post_init__(self) -> None:
        self.encoder.to(self.hardware.device)
        self.normalize = Normalize(self.loaded.normalization).to(self.hardware.device)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Features of uint8 images [b, c, h, w], in float32."""
        with torch.autocast(images.device.type, enabled=False):
            return self.encoder(self.normalize(unit_range(images)))

    def features(self, workspace: Workspace, split: Split) -> Features:
        """Features of every image of a split with evaluation preprocessing, on the CPU."""
        tokens, labels = [], []
        for batch in evaluation_batches(workspace, split, 256, self.hardware):
            tokens.append(self.tokens(batch["images"].to(self.hardware.device)).cpu())
            labels.append(batch["labels"])
        return {"tokens": torch.cat(tokens), "labels": torch.cat(labels).long()}


def run(workspace: Workspace, name: str) -> None:
    """Write `models/probe/NAME` and `metrics/probe_NAME.json`; skip with the reason where no labels are."""
    if skip_without_labels(workspace, f"probe_{name}", workspace.probe(name)):
        return
    params = workspace.params
    hardware = Hardware.choose(params.runtime)
    loaded = load_cae(workspace.pretrained)
    encoders = (
        FrozenEncoder("pretrained", pretrained_encoder(loaded), loaded, hardware),
        FrozenEncoder("random_init", random_encoder(loaded, params.seed), loaded, hardware),
    )
    probes = {"linear": linear, "attentive": attentive, "knn": knn}
    with workspace.publish(workspace.probe(name)) as folder:
        quality, efficiency = probes[name](workspace, encoders, folder)
    workspace.write_metrics(f"probe_{name}", quality, efficiency)


def linear(
    workspace: Workspace, encoders: tuple[FrozenEncoder, FrozenEncoder], folder: Path
) -> tuple[dict[str, float], Row]:
    """The paper's linear probe on the class token; on the mean of the patches beside it."""
    config = workspace.params.probe.linear
    width, num_classes = encoders[0].loaded.architecture.width, len(workspace.index.classes)
    quality: dict[str, float] = {}
    efficiency: Row = {}
    for frozen in encoders:
        prefix = "" if frozen.name == "pretrained" else "random_init_"
        for pool, infix in ((class_token, ""), (pooled, "pooled_")):
            set_reproducible(workspace.params.seed)
            head = LinearHead(width, num_classes)
            optimizer = Lars(head.parameters(), lr=config.lr, momentum=MOMENTUM, weight_decay=config.weight_decay)
            scores, rates = train_head(workspace, frozen, head, optimizer, config, pool)
            quality[f"{prefix}{infix}top1"] = scores.top1
            if not prefix + infix:
                quality["top5"], efficiency = scores.top5, rates
                _save_head(folder / "linear.safetensors", head, workspace)
    return quality, efficiency


def attentive(
    workspace: Workspace, encoders: tuple[FrozenEncoder, FrozenEncoder], folder: Path
) -> tuple[dict[str, float], Row]:
    """The paper's attentive probe on the patches."""
    config = workspace.params.probe.attentive
    num_heads = encoders[0].loaded.architecture.num_heads
    pool = all_tokens if config.use_class_token else patches
    quality: dict[str, float] = {}
    efficiency: Row = {}
    for frozen in encoders:
        set_reproducible(workspace.params.seed)
        head = AttentiveHead(frozen.loaded.architecture.width, num_heads, len(workspace.index.classes))
        optimizer = SGD(head.parameters(), lr=config.lr, momentum=MOMENTUM, weight_decay=config.weight_decay)
        scores, rates = train_head(workspace, frozen, head, optimizer, config, pool)
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
    config = workspace.params.probe.knn
    pool = pooled if config.feature == "pooled" else class_token
    results = {}
    for frozen in encoders:
        bank, queries = (split_features(workspace, frozen, split) for split in ("train", "val"))
        votes = knn_predict(
            pool(queries["tokens"]),
            pool(bank["tokens"]),
            bank["labels"],
            k=config.k,
            temperature=config.temperature,
            num_classes=len(workspace.index.classes),
        )
        results[frozen.name] = scores_of(votes, queries["labels"])
    (folder / "README.txt").write_text("The kNN probe has no weights: its classifier is the training images.\n")
    best = results["pretrained"]
    return {"top1": best.top1, "top5": best.top5, "random_init_top1": results["random_init"].top1}, {}


def train_head(
    workspace: Workspace, frozen: FrozenEncoder, head: nn.Module, optimizer: Optimizer, config: HeadConfig, pool: Pool
) -> tuple[Scores, Row]:
    """Train `head` on the frozen features and measure it on the validation images."""
    hardware = frozen.hardware
    head.to(hardware.device)
    per_epoch = steps_per_epoch(workspace.index.count["train"], config.batch_size)
    total_steps = config.epochs * per_epoch

    def step(batch: Batch, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = batch["tokens"] if "tokens" in batch else frozen.tokens(batch["images"])
        return F.cross_entropy(head(pool(tokens)).float(), batch["labels"].long()), {}

    efficiency = Training(
        name=f"probe {frozen.name} {type(head).__name__} {pool.__name__}",
        module=head,
        step=step,
        optimizer=optimizer,
        schedule=cosine_schedule(optimizer, config, per_epoch),
        total_steps=total_steps,
        batches=_batches(workspace, frozen, config, total_steps),
        hardware=hardware,
    ).run()
    head.eval()
    val = split_features(workspace, frozen, "val")
    with torch.inference_mode():
        logits = [head(pool(chunk.to(hardware.device))).cpu() for chunk in val["tokens"].split(1024)]
    return scores_of(torch.cat(logits), val["labels"]), efficiency


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
        crop = CropTransform(CropFlip(workspace.params.model.size_px, config))
        return train_batches(
            workspace, crop, batch_size=config.batch_size, total_steps=total_steps, hardware=frozen.hardware
        )
    features = split_features(workspace, frozen, "train")
    seed = workspace.params.seed

    def from_step(start: int) -> Iterable[Batch]:
        return _cached_batches(
            features, EpochBatches(len(features["labels"]), config.batch_size, seed, start, total_steps)
        )

    return from_step


def _cached_batches(features: Features, order: EpochBatches) -> Iterator[Batch]:
    for samples in order:
        positions = torch.tensor([sample.position for sample in samples])
        yield {"tokens": features["tokens"][positions], "labels": features["labels"][positions]}


def _save_head(path: Path, head: nn.Module, workspace: Workspace) -> None:
    save_weights(path, head, {"kind": path.stem, "classes": workspace.index.classes})
