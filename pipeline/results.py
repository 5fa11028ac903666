"""The table of results that `make repro` ends with."""

from typing import Any

from rich.console import Console
from rich.table import Table

from cae.errors import NotReady
from pipeline.workspace import Workspace

# Stage, its figures in the order shown, and what they say.
ACCURACIES = [
    ("probe_linear", "linear probe, class token", "top1", "random_init_top1"),
    ("probe_linear", "linear probe, mean of patches", "pooled_top1", "random_init_pooled_top1"),
    ("probe_attentive", "attentive probe", "top1", "random_init_top1"),
    ("probe_knn", "nearest neighbours", "top1", "random_init_top1"),
    ("finetune", "fine-tuning", "top1", "random_init_top1"),
]
FIGURES = {
    "prepare": ("num_train", "num_val", "num_classes", "num_rejected"),
    "tokenizer": ("usage", "perplexity", "psnr_db"),
    "pretrain": ("decoding_loss", "alignment_loss", "latent_variance", "token_accuracy", "masked_psnr_db"),
    "export": ("max_abs_diff", "token_agreement"),
}


def show(workspace: Workspace) -> None:
    """Print every stage's figures; raise NotReady where the pipeline has not run."""
    metrics = {stage: workspace.read_metrics(stage) for stage in {*FIGURES, *(row[0] for row in ACCURACIES)}}
    if not any(metrics.values()):
        raise NotReady(f"{workspace.metrics}: no metrics yet; run `make repro` first")
    console = Console()
    console.print(_accuracy_table(metrics))
    console.print(_figure_table(metrics))
    console.print(f"bundle: {workspace.bundle}; serve it with `make serve`", soft_wrap=True)


def _accuracy_table(metrics: dict[str, dict[str, Any] | None]) -> Table:
    table = Table("top-1 accuracy", "pretrained", "random weights", "gain", title="What pretraining gives")
    for column in table.columns[1:]:
        column.justify = "right"
    for stage, label, key, baseline in ACCURACIES:
        values = metrics[stage] or {}
        if key in values:
            gain = f"{100 * (values[key] - values[baseline]):+.1f}"
            table.add_row(label, f"{values[key]:.1%}", f"{values[baseline]:.1%}", gain)
        else:
            table.add_row(label, values.get("skipped", "not run"), "", "")
    return table


def _figure_table(metrics: dict[str, dict[str, Any] | None]) -> Table:
    table = Table("stage", "figures", title="How each stage went")
    for stage, keys in FIGURES.items():
        values = metrics[stage] or {}
        shown = [f"{key} {values[key]:.4g}" for key in keys if key in values]
        table.add_row(stage, ", ".join(shown) or values.get("skipped", "not run"))
    return table
