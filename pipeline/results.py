"""The table of results that `make repro` ends with."""

from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from cae.errors import NotReady
from pipeline import seeds
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


class Figure(NamedTuple):
    """An accuracy as a fraction, and its standard deviation over seeds (0 where there is one run)."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f}" + (f" ± {100 * self.deviation:.1f}" if self.deviation else "")


class Accuracy(NamedTuple):
    """One measurement of the encoder beside random weights; both None where it was not made."""

    stage: str
    label: str
    pretrained: Figure | None
    random: Figure | None


def accuracies(workspace: Workspace) -> list[Accuracy]:
    """Every measurement: of the last run, or the mean over the seeds that `cae-pipe seeds` recorded."""
    runs = seeds.comparable(workspace)
    rows = []
    for stage, label, key, baseline in ACCURACIES:
        values = workspace.read_metrics(stage) or {}
        pair = [seeds.spread(runs, stage, name) or (values[name], 0.0) for name in (key, baseline) if name in values]
        pretrained, random = (Figure(*figure) for figure in pair) if pair else (None, None)
        rows.append(Accuracy(stage, label, pretrained, random))
    return rows


def show(workspace: Workspace) -> None:
    """Print every stage's figures; raise NotReady where the pipeline has not run."""
    metrics = {stage: workspace.read_metrics(stage) for stage in {*FIGURES, *(row[0] for row in ACCURACIES)}}
    if not any(metrics.values()):
        raise NotReady(f"{workspace.metrics}: no metrics yet; run `make repro` first")
    console = Console()
    console.print(_accuracy_table(workspace, metrics))
    console.print(_figure_table(metrics))
    if len(runs := seeds.comparable(workspace)) > 1:
        console.print(f"accuracies: mean ± standard deviation of {len(runs)} seeds (seeds.json); the rest: last run")
    console.print(f"bundle: {workspace.bundle}; serve it with `make serve`", soft_wrap=True)
    if workspace.report.exists():
        console.print(f"report: {workspace.report / 'index.html'}", soft_wrap=True)


def _accuracy_table(workspace: Workspace, metrics: dict[str, dict[str, Any] | None]) -> Table:
    table = Table("top-1 accuracy in %", "pretrained", "random weights", "gain", title="What pretraining gives")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in accuracies(workspace):
        if row.pretrained and row.random:
            gain = f"{100 * (row.pretrained.mean - row.random.mean):+.1f}"
            table.add_row(row.label, str(row.pretrained), str(row.random), gain)
        else:
            table.add_row(row.label, (metrics[row.stage] or {}).get("skipped", "not run"), "", "")
    return table


def _figure_table(metrics: dict[str, dict[str, Any] | None]) -> Table:
    table = Table("stage", "figures", title="How each stage went")
    for stage, keys in FIGURES.items():
        values = metrics[stage] or {}
        shown = [f"{key} {values[key]:.4g}" for key in keys if key in values]
        table.add_row(stage, ", ".join(shown) or values.get("skipped", "not run"))
    return table
