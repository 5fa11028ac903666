"""`cae-pipe prepare` to `cae-pipe report`: the stages of the pipeline, which `dvc repro` runs."""

from contextlib import nullcontext
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cae.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.workspace import Workspace

PANEL = "Pipeline stages (dvc repro runs them)"

stages = typer.Typer()


class ProbeName(StrEnum):
    LINEAR = "linear"
    ATTENTIVE = "attentive"
    KNN = "knn"


class FormatName(StrEnum):
    ONNX = "onnx"
    TIMM = "timm"
    SAFETENSORS = "safetensors"


WeightsOption = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="Other trained weights, a file or its folder; outside the pipeline, with --out."),
]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force", help="Go on from the newest checkpoint of the stage, whatever parameters, data or code it is of."
    ),
]
ResultsOption = Annotated[Path | None, typer.Option("--out", help="With --checkpoint: folder for what it gives.")]


@stages.command(rich_help_panel=PANEL)
def prepare() -> None:
    """Stage 1: images of `prepare.source` to shards."""
    from pipeline import prepare as stage

    _run("prepare", stage.run)


@stages.command(rich_help_panel=PANEL)
def tokenizer(force: ForceOption = False) -> None:
    """Stage 2: train the image tokenizer."""
    _train("tokenizer", force)


@stages.command(rich_help_panel=PANEL)
def pretrain(force: ForceOption = False) -> None:
    """Stage 3: pretrain the Context Autoencoder; goes on where an interrupted run stopped."""
    _train("pretrain", force)


@stages.command(rich_help_panel=PANEL)
def finetune(weights: WeightsOption = None, out: ResultsOption = None, force: ForceOption = False) -> None:
    """Stage 4: train the whole encoder with labels, from pretrained and from random weights."""
    _train("finetune", force, weights, out)


@stages.command(rich_help_panel=PANEL)
def probe(
    name: Annotated[
        ProbeName, typer.Argument(help="Which probe: a linear layer, one attention layer, or nearest neighbours.")
    ],
    weights: WeightsOption = None,
    out: ResultsOption = None,
) -> None:
    """Stage 5: measure the frozen encoder, pretrained and random.

    \b
    Examples:
      cae-pipe probe linear
      cae-pipe probe knn --checkpoint imported/vit-b --out measured/vit-b
    """
    from pipeline import probe as stage

    _run(f"probe_{name.value}", lambda workspace: stage.run(workspace, name.value), weights, out)


@stages.command(rich_help_panel=PANEL)
def export(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Trained weights, a file or its folder. [default: those of the pipeline]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="models/bundle")] = None,
    format: Annotated[
        FormatName,
        typer.Option(
            help="onnx: the bundle that the server reads; timm: the encoder for timm.create_model; safetensors: "
            "weights and target in one folder, for cae-pipe elsewhere."
        ),
    ] = FormatName.ONNX,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also an encoder in 8 bits, the faster one on a CPU, if it passes its gate.")
    ] = False,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Also an encoder in half precision, for a GPU, if it passes its gate.")
    ] = False,
) -> None:
    """Stage 6: encoder and reconstructors as an ONNX bundle, checked against torch.

    With --checkpoint, --out or --format it exports outside the pipeline and writes no metrics. --int8 and --fp16 count
    for this call; `export.int8` and `export.fp16` in params.yaml for every run.

    \b
    Examples:
      cae-pipe export
      cae-pipe export --int8
      cae-pipe export --checkpoint imported/vit-b --out /srv/bundle
      cae-pipe export --checkpoint models/finetune --out vit-timm --format timm
    """
    from pipeline import export as stage
    from pipeline import export_formats as formats
    from pipeline import variants
    from pipeline.workspace import Workspace

    workspace = Workspace.here()
    weights = checkpoint or workspace.pretrained
    if out is None and (checkpoint or format != FormatName.ONNX):
        # The bundle of the pipeline is the pipeline's own.
        raise UserError("--out: give the folder to write; --checkpoint and --format export outside the pipeline")
    if (int8 or fp16) and format != FormatName.ONNX:
        raise UserError("--int8, --fp16: only --format onnx has these variants; leave them out")
    if format == FormatName.TIMM and out:
        formats.to_timm_folder(weights, out)
    elif format == FormatName.SAFETENSORS and out:
        formats.to_safetensors(workspace, weights, out)
    elif out:
        stage.export(workspace, weights, out, {}, variants.wanted(workspace.params.export, int8, fp16))
    else:
        _run("export", lambda here: stage.run(here, int8, fp16))


@stages.command(rich_help_panel=PANEL)
def report() -> None:
    """Stage 7: one page about the last run, report/index.html."""
    from pipeline import report as stage

    _run("report", stage.run)


def _run(stage: str, run: "Callable[[Workspace], None]", weights: Path | None = None, out: Path | None = None) -> None:
    """A stage in the current folder, alone; with other weights outside the pipeline, and its figures printed."""
    from pipeline.runs import stage_lock

    workspace = _workspace(weights, out)
    with stage_lock(workspace, stage):
        run(workspace)
    if weights:
        figures = workspace.read_metrics(stage) or {}
        typer.echo("  ".join(f"{name} {value}" for name, value in figures.items()))


def _train(stage: str, force: bool, weights: Path | None = None, out: Path | None = None) -> None:
    """As `_run`, on as many processes as there are to be: this one starts them, or is one of them."""
    from pipeline import launch

    workspace = _workspace(weights, out)
    machines = launch.Machines.here(workspace.params.runtime)
    if not launch.is_rank() and not machines.is_one_process:
        raise typer.Exit(launch.launch(launch.this_command(), machines, workspace.scratch / "ranks" / stage))
    module = import_module(f"pipeline.{stage}")

    def run(here: "Workspace") -> None:
        module.run(here.forced() if force else here)

    if launch.is_rank():
        _run_rank(stage, run, workspace)
    else:
        _run(stage, run, weights, out)


def _run_rank(stage: str, run: "Callable[[Workspace], None]", workspace: "Workspace") -> None:
    """One process of a stage that several share; rank 0 holds the lock and writes what the stage gives."""
    from cae.train.device import choose_device
    from cae.train.parallel import Ranks, joined
    from pipeline.launch import follow_launcher
    from pipeline.runs import stage_lock

    follow_launcher()
    leads = Ranks.from_environment().leads
    with (
        stage_lock(workspace, stage) if leads else nullcontext(),
        joined(choose_device(workspace.params.runtime.device)),
    ):
        run(workspace)


def _workspace(weights: Path | None, out: Path | None) -> "Workspace":
    from pipeline.workspace import Workspace

    if (weights is None) != (out is None):
        raise UserError("--checkpoint and --out go together: other weights, and a folder for what they give")
    here = Workspace.here()
    return here.measuring(weights, out) if weights and out else here
