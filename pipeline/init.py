"""`cae-pipe init`: look at images, write a params.yaml that fits them, and say what a run will take."""

import os
import subprocess
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from ruamel.yaml.comments import CommentedMap

from cae.config import Params, load_params
from cae.data.sources import open_source
from cae.errors import UserError
from pipeline import estimate, params_file
from pipeline.choice import MAX_BROKEN, Choice, choose, lengths, tolerance
from pipeline.inspection import Findings, inspect

KINDS_BY_SUFFIX = {".csv": "csv", ".parquet": "parquet", ".tar": "wds"}
SHOWN_BROKEN = 10
COLOURS = {1: "grey", 3: "colour"}


def run(images: str, out: Path, force: bool) -> None:
    """Write `out` for the source or folder `images`. The params.yaml of the current folder is the template.

    Raises UserError when `out` has changes of its own, or there is nothing to train on.
    """
    root = Path.cwd()
    template = root / "params.yaml"
    shipped = load_params(template)
    check_free(out, force)
    url = source_url(images, root)
    source = open_source(url, root, root / "data/downloads")
    console = Console()
    findings = inspect(source, shipped.prepare.val_fraction)
    console.print(_findings_table(url, findings))
    _warn(console, findings)
    gpu = torch.cuda.is_available() and shipped.runtime.device != "cpu"
    choices = choose(findings, url, gpu=gpu, num_cores=os.cpu_count() or 1)
    choices += tolerance(findings, shipped.prepare.max_reject_fraction)
    raw = with_choices(template, choices)
    params = params_file.validate(raw, str(out))
    console.print("timing a few steps on this machine ...")
    steps = estimate.time_steps(params, findings.channels, len(findings.class_counts))
    batches = {name: getattr(params, name).batch_size for name in ("tokenizer", "pretrain", "finetune")}
    shipped_epochs = {name: getattr(shipped, name).epochs for name in batches}
    choices += lengths(findings.num_train, batches, steps.pretrain_s, shipped_epochs, gpu=gpu)
    raw = with_choices(template, choices)
    params = params_file.validate(raw, str(out))
    storing = estimate.measure_storing(source, params, findings.channels)
    params_file.write(out, params_file.text_of(raw))
    console.print(_choices_table(choices))
    console.print(_estimate_table(params, findings, steps, storing))
    console.print(f"{out} written; next: `dvc repro`", soft_wrap=True)


def source_url(images: str, root: Path) -> str:
    """`images` as a source: it may be one already, or a path whose kind shows."""
    path = root / images
    if not path.exists():
        if ":" not in images and images not in ("mnist5k", "cifar10"):
            raise UserError(f"--images: {images} is no file or folder, and no source such as folder:PATH or hf:NAME")
        return images
    if path.is_dir():
        saved = any((path / name).exists() for name in ("dataset_dict.json", "state.json"))
        return f"{'hf' if saved else 'folder'}:{images}"
    if path.suffix not in KINDS_BY_SUFFIX:
        raise UserError(f"--images: {images} is one file; expected a folder, or a .csv, .parquet or .tar file")
    return f"{KINDS_BY_SUFFIX[path.suffix]}:{images}"


def check_free(out: Path, force: bool) -> None:
    """Raise UserError where writing would lose what no commit holds."""
    if force or not out.exists():
        return
    path = out.resolve()
    shown = subprocess.run(  # noqa: S603 (a fixed command on a path of the caller's)
        ["git", "-C", str(path.parent), "show", f"HEAD:./{path.name}"],  # noqa: S607
        capture_output=True,
    )
    if shown.returncode or shown.stdout != path.read_bytes():
        raise UserError(
            f"{out}: differs from the committed one, and init would write over it. Commit it, move it away, write "
            "elsewhere with --out, or give --force"
        )


def with_choices(template: Path, choices: list[Choice]) -> CommentedMap:
    """The template with its comments and order, and other values."""
    raw = params_file.read(template)
    for choice in choices:
        params_file.change(raw, choice.key, choice.value, str(template))
    return raw


def _findings_table(url: str, findings: Findings) -> Table:
    table = Table("what", "found", title=f"{findings.num_images} files in {url}")
    if len(findings.sizes_px):
        columns = findings.sizes_px.T.tolist()
        for name, values in zip(("width, px", "height, px"), columns, strict=True):
            middle = sorted(values)[len(values) // 2]
            table.add_row(name, f"{min(values)} smallest, {middle} median, {max(values)} largest")
    table.add_row("colour", COLOURS.get(findings.channels, f"{findings.channels} channels"))
    table.add_row("formats", ", ".join(f"{name} {count}" for name, count in findings.formats.items()) or "none")
    counts = findings.class_counts.values()
    labels = f"{len(counts)} classes of {min(counts)} to {max(counts)} images" if counts else "none"
    table.add_row("labels", labels)
    split = "of the source" if findings.has_split else "drawn"
    table.add_row("split", f"{split}: about {findings.num_train} to train on, {findings.num_val} to validate")
    reasons = Counter(reject.reason for reject in findings.broken)
    table.add_row("broken", ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "none")
    table.add_row("other files", str(findings.num_strays))
    if findings.num_sampled < findings.num_images:
        table.caption = f"Sizes, formats and broken files: of {findings.num_sampled} drawn at random."
    return table


def _warn(console: Console, findings: Findings) -> None:
    for reject in findings.broken[:SHOWN_BROKEN]:
        console.print(f"{reject.key}: {reject.reason} ({reject.detail})", soft_wrap=True, markup=False)
    if findings.broken_fraction > MAX_BROKEN:
        console.print(
            f"{findings.broken_fraction:.0%} are broken, more than half: `prepare` will stop. Mend or remove them, or "
            "raise prepare.max_reject_fraction",
            soft_wrap=True,
        )
    if not findings.class_counts:
        console.print(
            "No labels: the probes and fine-tuning will be skipped. Labels come from one sub-folder for each class "
            "(folder:), or from a column `label` (csv:, parquet:)",
            soft_wrap=True,
        )


def _choices_table(choices: list[Choice]) -> Table:
    table = Table("key", "value", "because", title="Chosen")
    for choice in choices:
        table.add_row(choice.key, str(choice.value), choice.reason)
    return table


def _estimate_table(params: Params, findings: Findings, steps: estimate.Steps, storing: estimate.Storing) -> Table:
    table = Table("stage", "about", title="What a run will take on this machine, as busy as it is now")
    seconds = estimate.stage_seconds(params, findings, steps, storing)
    for stage, value in {**seconds, "all": sum(seconds.values())}.items():
        table.add_row(stage, f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h")
    table.add_row("disk", f"{estimate.disk_bytes(findings, steps, storing) / 1e6:.0f} MB")
    return table
