"""`cae-pipe`: every stage of the pipeline, and what one does with the result.

Modules are imported inside the commands, for torch takes seconds that `--help` and `serve` need not wait.
"""

import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cae.errors import Interrupted, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.workspace import Workspace

# Read when torch is first imported. Threads of OpenMP that spin for long while they wait starve a shared processor.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

EXIT_USER_ERROR = 2
EXIT_PARTIAL = 3

app = typer.Typer(
    help="Context Autoencoder: from unlabelled images to a pretrained, probed, exported and served encoder.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

BundleOption = Annotated[Path, typer.Option("--bundle", help="Folder that `export` wrote.")]
BUNDLE = Path("models/bundle")


class ProbeName(StrEnum):
    LINEAR = "linear"
    ATTENTIVE = "attentive"
    KNN = "knn"


class ViewName(StrEnum):
    COMPLETION = "completion"
    PASTED = "pasted"
    SIDE_BY_SIDE = "side_by_side"


class DeviceName(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@app.command()
def init(
    images: Annotated[str, typer.Option(help="A folder of images, or a source such as hf:NAME (see params.yaml).")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("params.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Write over a file with changes of its own.")] = False,
) -> None:
    """Look at your images, write a params.yaml that fits them, and say what a run will take."""
    from pipeline import init as start

    start.run(images, out, force)


@app.command()
def prepare() -> None:
    """Stage 1: images of `prepare.source` to shards."""
    from pipeline import prepare as stage

    _run("prepare", stage.run)


@app.command()
def tokenizer() -> None:
    """Stage 2: train the image tokenizer."""
    from pipeline import tokenizer as stage

    _run("tokenizer", stage.run)


@app.command()
def pretrain() -> None:
    """Stage 3: pretrain the Context Autoencoder; goes on where an interrupted run stopped."""
    from pipeline import pretrain as stage

    _run("pretrain", stage.run)


@app.command()
def finetune() -> None:
    """Stage 4: train the whole encoder with labels, from pretrained and from random weights."""
    from pipeline import finetune as stage

    _run("finetune", stage.run)


@app.command()
def probe(name: Annotated[ProbeName, typer.Argument(help="Which probe.")]) -> None:
    """Stage 5: measure the frozen encoder, pretrained and random."""
    from pipeline import probe as stage

    _run(f"probe_{name.value}", lambda workspace: stage.run(workspace, name.value))


@app.command()
def export(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Pretrained weights, a file or its folder. [default: those of the pipeline]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the bundle. [default: models/bundle]")] = None,
) -> None:
    """Stage 6: encoder and reconstructors as an ONNX bundle, checked against torch."""
    from pipeline import export as stage
    from pipeline.workspace import Workspace

    if checkpoint is None and out is None:
        _run("export", stage.run)
        return
    workspace = Workspace.here()
    source = checkpoint or workspace.pretrained
    file = source / workspace.pretrained.name if source.is_dir() else source
    stage.export(workspace, file, out or workspace.bundle, metrics={})


@app.command()
def report() -> None:
    """Stage 7: one page about the last run, report/index.html."""
    from pipeline import report as stage

    _run("report", stage.run)


@app.command()
def seeds(numbers: Annotated[list[int], typer.Argument(min=0, help="Seeds, e.g. 0 1 2.")]) -> None:
    """Run the pipeline once for every seed; the report then shows the spread."""
    from pipeline import seeds as runs
    from pipeline.workspace import Workspace

    runs.run(Workspace.here(), numbers)


@app.command()
def results() -> None:
    """Print the figures of the last run."""
    from pipeline import results as table
    from pipeline.workspace import Workspace

    table.show(Workspace.here())


@app.command()
def embed(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="File to write: .parquet or .npz.")],
    bundle: BundleOption = BUNDLE,
    outputs: Annotated[str, typer.Option(help="Any of pooled, class_token, patches, class_attention.")] = "pooled",
    device: Annotated[DeviceName, typer.Option(help="Where to run.")] = DeviceName.AUTO,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once; more than 1 pays on a GPU.")] = 1,
) -> None:
    """Features of images, to a file."""
    from pipeline import inference

    opened = inference.open_bundle(bundle, device.value)
    left_out = inference.embed(opened, images, out, inference.parse_outputs(outputs), batch_size)
    if left_out:
        # The features are written; the code tells a script that some are missing.
        raise typer.Exit(EXIT_PARTIAL)


@app.command()
def reconstruct(
    image: Annotated[Path, typer.Argument(help="Image file.")],
    out: Annotated[Path, typer.Option(help="Picture to write.")],
    mask_ratio: Annotated[
        float | None, typer.Option(help="Share of the patches to hide. [default: as in pretraining]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which random mask.")] = 0,
    view: Annotated[ViewName, typer.Option(help="What the picture shows.")] = ViewName.PASTED,
    skip_regressor: Annotated[
        bool, typer.Option("--skip-regressor", help="Hide nothing; encoder straight into decoder.")
    ] = False,
    bundle: BundleOption = BUNDLE,
    device: Annotated[DeviceName, typer.Option(help="Where to run.")] = DeviceName.AUTO,
) -> None:
    """Hide patches of an image and draw what the model makes of the rest."""
    from pipeline import inference

    if mask_ratio is not None and not 0 < mask_ratio < 1:
        raise UserError(f"--mask-ratio: {mask_ratio} must lie between 0 and 1, both excluded")
    opened = inference.open_bundle(bundle, device.value)
    inference.reconstruct(
        opened, image, out, mask_ratio=mask_ratio, seed=seed, view=view.value, skip_regressor=skip_regressor
    )


@app.command()
def serve(
    bundle: Annotated[Path | None, typer.Option(help="Folder that `export` wrote. [default: models/bundle]")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. [default: 8000]")] = None,
    device: Annotated[DeviceName | None, typer.Option(help="Where to run. [default: auto]")] = None,
) -> None:
    """Answer POST /embed and POST /reconstruct over HTTP."""
    from serving.__main__ import main as serve_main

    flags = {"--bundle": bundle, "--host": host, "--port": port, "--device": device}
    given = [(flag, str(value)) for flag, value in flags.items() if value is not None]
    raise typer.Exit(serve_main([text for pair in given for text in pair]))


profile = typer.Typer(help="Ready-made parameters, those of the paper among them.", no_args_is_help=True)
app.add_typer(profile, name="profile")
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another value, e.g. pretrain.epochs=100.")
]
ProfileName = Annotated[str, typer.Argument(help="One of `cae-pipe profile list`.")]


@profile.command("list")
def profile_list() -> None:
    """What there is in params/."""
    from pipeline import profiles
    from pipeline.workspace import Workspace

    profiles.show_all(Workspace.here())


@profile.command("show")
def profile_show(name: ProfileName, changes: SetOption = None) -> None:
    """Print the whole params.yaml of a profile."""
    from pipeline import profiles
    from pipeline.workspace import Workspace

    profiles.show(Workspace.here(), name, changes or [])


@profile.command("apply")
def profile_apply(
    name: ProfileName,
    changes: SetOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite changes of params.yaml that are not kept.")] = False,
) -> None:
    """Write a profile to params.yaml."""
    from pipeline import profiles
    from pipeline.workspace import Workspace

    profiles.apply(Workspace.here(), name, changes or [], force)


def _run(stage: str, run: "Callable[[Workspace], None]") -> None:
    """A stage in the current folder, alone."""
    from pipeline.runs import stage_lock
    from pipeline.workspace import Workspace

    workspace = Workspace.here()
    with stage_lock(workspace, stage):
        run(workspace)


def main() -> None:
    """Entry point: user errors are one message without a traceback, and every kind of end has its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in ("cae", "pipeline", "serving"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        app()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(EXIT_USER_ERROR)
    except Interrupted as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
