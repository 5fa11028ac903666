"""Accuracy of the labelled stages, and what they do where there are no labels."""

import logging
from pathlib import Path

import torch
from timm.utils import accuracy
from torch import Tensor

from pipeline.workspace import Workspace, published

logger = logging.getLogger(__name__)


class Scores:
    """Top-1 and top-5 accuracy as fractions, over batches; top-5 counts all classes where they are fewer."""

    def __init__(self) -> None:
        self.num_images, self._top1, self._top5 = 0, 0.0, 0.0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits [b, k], labels [b]."""
        top1, top5 = accuracy(logits, labels, topk=(1, min(5, logits.shape[1])))
        self._top1 += float(top1) / 100 * len(labels)
        self._top5 += float(top5) / 100 * len(labels)
        self.num_images += len(labels)

    @property
    def top1(self) -> float:
        return self._top1 / self.num_images

    @property
    def top5(self) -> float:
        return self._top5 / self.num_images


def scores_of(logits: Tensor, labels: Tensor) -> Scores:
    """Scores of one batch that holds everything."""
    scores = Scores()
    scores.add(logits, labels.to(torch.int64))
    return scores


def skip_without_labels(workspace: Workspace, stage: str, output: Path) -> bool:
    """Where the data has no labels: log the reason, write it as metrics and as the stage's output, and return True."""
    if workspace.index.classes:
        return False
    reason = f"{workspace.index.source} has no labels; class sub-folders would give them"
    logger.warning("%s is skipped: %s", stage, reason)
    with published(output) as folder:
        (folder / "skipped.txt").write_text(reason + "\n")
    workspace.write_metrics(stage, {"skipped": reason}, {})
    return True
