"""Classifiers on features that never change: what the probes and the gate of the export's variants have in common."""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn
from torch.optim import Optimizer

from cae.config import HeadConfig, NeighborConfig
from cae.data.loader import Batch
from cae.data.order import EpochBatches, SampleOrder, total_steps
from cae.heads import LinearHead, knn_predict
from cae.train.device import Hardware
from cae.train.loop import BatchSource, Training
from cae.train.optimizer import cosine_schedule
from pipeline.scores import Scores, scores_of

Features = dict[str, Tensor]
"""`patches` [n, p, d] and, where the encoder has one, `class_token` [n, d], after the last LayerNorm; `labels` [n]."""

Pool = Callable[[Features], Tensor]
MOMENTUM = 0.9


def class_token(features: Features) -> Tensor:
    return features["class_token"]


def pooled(features: Features) -> Tensor:
    return features["pooled"]


def patches(features: Features) -> Tensor:
    return features["patches"]


def all_tokens(features: Features) -> Tensor:
    return torch.cat([features["class_token"].unsqueeze(1), features["patches"]], dim=1)


def linear_probe(width: int, num_classes: int, config: HeadConfig) -> tuple[LinearHead, Optimizer]:
    """The paper's linear probe: a head at random, and LARS."""
    head = LinearHead(width, num_classes)
    return head, Lars(head.parameters(), lr=config.lr, momentum=MOMENTUM, weight_decay=config.weight_decay)


def head_training(
    name: str,
    head: nn.Module,
    optimizer: Optimizer,
    config: HeadConfig,
    num_train: int,
    batches: Callable[[int], BatchSource],
    values: Pool,
    hardware: Hardware,
    seed: int,
) -> Training:
    """The training of `head` on what `values` makes of a batch; `batches` gives them, whole, for a number of steps."""
    head.to(hardware.device)
    num_steps = total_steps(num_train, config.batch_size, config.epochs)

    def step(batch: Batch, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return F.cross_entropy(head(values(batch)).float(), batch["labels"].long()), {}

    return Training(
        name=name,
        module=head,
        step=step,
        optimizer=optimizer,
        schedule=cosine_schedule(optimizer, config, num_train),
        total_steps=num_steps,
        batches=batches(num_steps),
        hardware=hardware,
        seed=seed,
    )


def head_scores(head: nn.Module, values: Tensor, labels: Tensor, hardware: Hardware) -> Scores:
    """Accuracy of a trained head on the values [n, ...] of images and their labels [n]."""
    head.eval()
    with torch.inference_mode():
        logits = [head(chunk.to(hardware.device)).cpu() for chunk in values.split(1024)]
    return scores_of(torch.cat(logits), labels)


def neighbor_scores(bank: Features, queries: Features, config: NeighborConfig, num_classes: int) -> Scores:
    """Accuracy of the weighted vote of the nearest images of `bank`."""
    pool = pooled if config.feature == "pooled" else class_token
    votes = knn_predict(
        pool(queries),
        pool(bank),
        bank["labels"],
        k=config.k,
        temperature=config.temperature,
        num_classes=num_classes,
    )
    return scores_of(votes, queries["labels"])


def cached_batches(features: Features, batch_size: int, seed: int, num_steps: int) -> BatchSource:
    """Batches of features that are all in memory, in the order of `EpochBatches`."""
    order = SampleOrder([len(features["labels"])], seed)

    def from_step(start: int) -> Iterable[Batch]:
        return _pick(features, EpochBatches(order, batch_size, start, num_steps))

    return from_step


def _pick(features: Features, order: EpochBatches) -> Iterator[Batch]:
    for samples in order:
        positions = torch.tensor([sample.position for sample in samples])
        yield {name: values[positions] for name, values in features.items()}
