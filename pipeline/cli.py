"""`cae-pipe`: every stage of the pipeline, and what one does with the result.

Modules are imported inside the commands, for torch takes seconds that `--help` and `serve` need not wait.
"""

import logging
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cae.errors import UserError
from pipeline import failures
from pipeline.bench_command import bench
from pipeline.exit_codes import ExitCode, epilog
from pipeline.import_commands import imports
from pipeline.plan_command import plan
from pipeline.profile_commands import profile
from pipeline.stage_commands import stages

# Read when torch is first imported. Threads of OpenMP that spin for long while they wait starve a shared processor.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Panels of `--help`.
START = "Start with your images"
USE = "Use the model"
LOOK = "Look and check"

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, epilog=epilog())

BundleOption = Annotated[Path, typer.Option("--bundle", help="Folder that `export` wrote.")]
BUNDLE = Path("models/bundle")


class MaskName(StrEnum):
    RANDOM = "random"
    BLOCK = "block"


class ViewName(StrEnum):
    COMPLETION = "completion"
    PASTED = "pasted"
    SIDE_BY_SIDE = "side_by_side"


class DeviceName(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class FeatureName(StrEnum):
    POOLED = "pooled"
    CLASS_TOKEN = "class_token"  # noqa: S105 (a word of the paper)


DeviceOption = Annotated[
    DeviceName, typer.Option(help="Where to run; auto is the GPU where onnxruntime can use one, else the CPU.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"cae-pipe {version('cae-pipe')}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", envvar=failures.DEBUG_VARIABLE, help="Show the traceback of every error.", is_eager=True
        ),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """From a folder of unlabelled images to an image encoder: pretrained as a Context Autoencoder, measured, exported
    to ONNX and served.

    The usual three commands, in the root of the project:

    \b
      dvc repro                                      run what params.yaml changed
      cae-pipe embed PHOTOS/ --out features.parquet  features of your images
      cae-pipe serve                                 the same over HTTP

    Is something wrong? `cae-pipe doctor` looks.
    """
    if debug:
        os.environ[failures.DEBUG_VARIABLE] = "1"


@app.command(rich_help_panel=START)
def init(
    images: Annotated[str, typer.Option(help="A folder of images, or a source such as hf:NAME (see params.yaml).")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("params.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Write over a file with changes of its own.")] = False,
) -> None:
    """Look at your images, write a params.yaml that fits them, and say what a run will take."""
    from pipeline import init as start

    start.run(images, out, force)


@app.command(rich_help_panel=LOOK)
def seeds(numbers: Annotated[list[int], typer.Argument(min=0, help="Seeds, e.g. 0 1 2.")]) -> None:
    """Run the pipeline once for every seed; the report then shows the spread."""
    from pipeline import seeds as runs
    from pipeline.workspace import Workspace

    runs.run(Workspace.here(), numbers)


@app.command(rich_help_panel=LOOK)
def results() -> None:
    """Print the figures of the last run."""
    from pipeline import results as table
    from pipeline.workspace import Workspace

    table.show(Workspace.here())


@app.command(rich_help_panel=USE)
def embed(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="File to write, by its ending: .parquet or .npz.")],
    bundle: BundleOption = BUNDLE,
    outputs: Annotated[
        str, typer.Option(help="Which features, with commas between: pooled, class_token, patches, class_attention.")
    ] = "pooled",
    device: DeviceOption = DeviceName.AUTO,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once, 1 or more; more than 1 pays on a GPU.")] = 1,
) -> None:
    """Features of images, to a file.

    Images that cannot be read are left out, each with a warning, and the command then ends with code 3.

    \b
    Examples:
      cae-pipe embed PHOTOS/ --out features.parquet
      cae-pipe embed a.jpg b.png --out features.npz --outputs pooled,patches
      cae-pipe embed PHOTOS/ --out features.parquet --device cuda --batch-size 64
    """
    from pipeline import inference

    opened = inference.open_bundle(bundle, device.value)
    left_out = inference.embed(opened, images, out, inference.parse_outputs(outputs), batch_size)
    if left_out:
        # The features are written; the code tells a script that some are missing.
        raise typer.Exit(ExitCode.PARTIAL)


@app.command(rich_help_panel=USE)
def reconstruct(
    image: Annotated[Path, typer.Argument(help="Image file.")],
    out: Annotated[Path, typer.Option(help="Picture to write, by its ending: .png, .jpg or .webp.")],
    mask_ratio: Annotated[
        float | None, typer.Option(help="Share of the patches to hide, between 0 and 1. [default: as in pretraining]")
    ] = None,
    mask_kind: Annotated[
        MaskName, typer.Option(help="Hide patches each by itself, or in rectangles as in pretraining.")
    ] = MaskName.RANDOM,
    seed: Annotated[
        int, typer.Option(min=0, help="Which random mask, 0 or more; the same number hides the same patches.")
    ] = 0,
    view: Annotated[
        ViewName,
        typer.Option(help="All of the completion, its hidden patches pasted into the image, or three in a row."),
    ] = ViewName.PASTED,
    skip_regressor: Annotated[
        bool, typer.Option("--skip-regressor", help="Hide nothing: the encoder straight into the decoder.")
    ] = False,
    bundle: BundleOption = BUNDLE,
    device: DeviceOption = DeviceName.AUTO,
) -> None:
    """Hide patches of an image and draw what the model makes of the rest.

    \b
    Examples:
      cae-pipe reconstruct photo.jpg --out completed.png
      cae-pipe reconstruct photo.jpg --out row.png --view side_by_side --mask-ratio 0.75 --seed 3
    """
    from pipeline import inference

    if mask_ratio is not None and not 0 < mask_ratio < 1:
        raise UserError(f"--mask-ratio: {mask_ratio} must lie between 0 and 1, both excluded")
    opened = inference.open_bundle(bundle, device.value)
    inference.reconstruct(
        opened,
        image,
        out,
        mask_kind=mask_kind.value,
        mask_ratio=mask_ratio,
        seed=seed,
        view=view.value,
        skip_regressor=skip_regressor,
    )


@app.command(rich_help_panel=USE)
def serve(
    bundle: Annotated[Path | None, typer.Option(help="Folder that `export` wrote. [default: models/bundle]")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on, 0 to 65535; 0 takes a free one. [default: 8000]")
    ] = None,
    device: Annotated[
        DeviceName | None, typer.Option(help="Where to run; cuda does not start without a working GPU. [default: auto]")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with these and all other settings.")] = None,
) -> None:
    """Answer POST /embed and POST /reconstruct over HTTP, with a page to try them, until Ctrl-C.

    Without a flag the variable CAE_SERVING_BUNDLE (_HOST, _PORT, _DEVICE) decides, then the file, then the default.

    \b
    Examples:
      cae-pipe serve
      cae-pipe serve --host 0.0.0.0 --port 8080
      curl --data-binary @photo.jpg http://127.0.0.1:8000/embed
    """
    from serving.__main__ import main as serve_main

    flags = {"--bundle": bundle, "--host": host, "--port": port, "--device": device, "--config": config}
    given = [(flag, str(value)) for flag, value in flags.items() if value is not None]
    raise typer.Exit(serve_main([text for pair in given for text in pair]))


@app.command(rich_help_panel=USE)
def similar(
    image: Annotated[
        Path | None, typer.Argument(help="Image to find the like of. Without it: near-duplicates within the features.")
    ] = None,
    features: Annotated[Path, typer.Option(help="File that `cae-pipe embed` wrote, .parquet or .npz.")] = Path(
        "features.parquet"
    ),
    bundle: BundleOption = BUNDLE,
    feature: Annotated[
        FeatureName | None, typer.Option(help="Which features to compare. [default: pooled, else class_token]")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="With IMAGE: how many neighbours, 1 or more.")] = 5,
    threshold: Annotated[
        float,
        typer.Option(
            min=-1, max=1, help="Without IMAGE: least similarity of near-duplicates, -1 to 1; lower finds more."
        ),
    ] = 0.98,
    center: Annotated[
        bool, typer.Option(help="Subtract the mean of the set first; --no-center for a set that shows one thing only.")
    ] = True,
    contact_sheet: Annotated[
        Path | None, typer.Option(help="Picture of what was found to write: .png, .jpg or .webp.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs in place of the table.")] = False,
    device: DeviceOption = DeviceName.AUTO,
) -> None:
    """The images most like an image, or the near-duplicates in a folder, by their features.

    Similarity is the cosine of the features after the mean of the set is taken away. All images share that mean; with
    it in, a cosine of 0.98 is a duplicate for one model and a chance pair for another. Groups of near-duplicates are
    chains: each member reaches the threshold with at least one other.

    \b
    Examples:
      cae-pipe embed PHOTOS/ --out features.parquet
      cae-pipe similar photo.jpg --features features.parquet --top 8 --contact-sheet like.png
      cae-pipe similar --features features.parquet --threshold 0.95 --json
    """
    from pipeline import similar as search

    searched = search.Features.read(features, feature.value if feature else None)
    found: search.Found
    if image is None:
        found = search.near_duplicates(searched, threshold, center=center)
    else:
        found = search.neighbors(searched, image, bundle, device.value, top, center=center)
    search.show(found, as_json=as_json, contact_sheet=contact_sheet)


@app.command(rich_help_panel=LOOK)
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs in place of the table.")] = False,
) -> None:
    """Check versions, devices, disk, params.yaml, data, DVC, the bundle and the port; say what to do.

    Ends with code 0 when nothing is a problem (warnings may be there), else with 6. It changes nothing.
    """
    from pipeline import doctor as checks

    if checks.run(as_json=as_json):
        raise typer.Exit(ExitCode.DOCTOR)


app.add_typer(stages)
app.command(rich_help_panel=LOOK)(plan)
app.command(rich_help_panel=LOOK)(bench)
app.add_typer(profile, name="profile", rich_help_panel=START)
app.add_typer(imports, name="import", rich_help_panel=START)


def main() -> None:
    """Entry point: errors of the user are one message without a traceback, and every kind of end has its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in ("benchmarks", "cae", "pipeline", "serving"):
        logging.getLogger(package).setLevel(logging.INFO)
    failures.run(app)


if __name__ == "__main__":
    # `torchrun -m pipeline.cli pretrain`, and the ranks that `pipeline.launch` starts.
    main()
