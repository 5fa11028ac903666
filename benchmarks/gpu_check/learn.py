"""Part 6: a pretraining in the time that is left, and what its encoder knows before and after."""

import json
import os
from dataclasses import replace
from typing import Any

from benchmarks.gpu_check import workspaces
from benchmarks.gpu_check.parts import Check, Context, Figures, Result
from cae.data.order import steps_in
from cae.train.device import Hardware, set_reproducible
from pipeline import prepare, pretrain, probe, tokenizer
from pipeline.workspace import Workspace

SIZE_PX, PATCH_PX = 32, 4
MANY_IMAGES = 20_000  # from here on fewer epochs fill the codebook
# Of the time that is left after a trial. The rest is for its evaluation and for the neighbours.
TRAINING_SHARE = 0.6
TRIAL_STEPS, MOST_EPOCHS = 30, 400
NUM_ROWS = 20  # of the curve
KEYS = ("loss", "decoding_loss", "alignment_loss", "latent_variance", "token_accuracy")


def pretraining(context: Context) -> Result:
    """Tokenizer and CAE on three-channel images of 32 px; the loss must fall."""
    workspace = _first_workspace(context)
    prepare.run(workspace)
    num_train = workspace.index.count["train"]
    epochs = context.size(2 if num_train > MANY_IMAGES else 6, 1)
    workspace = _changed(context, workspace, {"tokenizer.epochs": epochs})
    tokenizer.run(workspace)
    if not context.dry:
        workspace = _changed(context, workspace, {"tokenizer.epochs": epochs, **_epochs_that_fit(context, workspace)})
    pretrain.run(workspace)
    rows = _curve(workspace)
    context.kept["workspace"] = workspace
    efficiency = workspace.read_metrics("efficiency/pretrain") or {}
    figures: Figures = {
        "images": num_train,
        "epochs": workspace.params.pretrain.epochs,
        "images_per_s": efficiency.get("images_per_s"),
        "data_wait_fraction": efficiency.get("data_wait_fraction"),
        "tokenizer_perplexity": (workspace.read_metrics("tokenizer") or {}).get("perplexity"),
        "curve": rows[:: max(1, len(rows) // NUM_ROWS)],
    }
    first, last = rows[0]["decoding_loss"], rows[-1]["decoding_loss"]
    said = f"the decoding loss went from {first:.3f} to {last:.3f}; expected it to fall"
    return Result(figures, [] if last < first else [said])


def neighbours(context: Context) -> Result:
    """Top-1 of the nearest neighbours, by the pretrained encoder and by the one at random that it began as."""
    if "workspace" not in context.kept:
        raise RuntimeError("the pretraining before this check failed, so there is no encoder to measure")
    workspace: Workspace = context.kept["workspace"]
    probe.run(workspace, "knn")
    return Result(workspace.read_metrics("probe_knn") or {})


def _first_workspace(context: Context) -> Workspace:
    source = context.data
    if source is None:
        source = context.folder / "digits.parquet"
        workspaces.write_digits(source, *context.size((10, None), (4, 40)))
    return _changed(context, None, {"prepare.source": f"parquet:{source}"})


def _changed(context: Context, before: Workspace | None, values: dict[str, Any]) -> Workspace:
    """A workspace with these parameters, and with what the one before it has made."""
    if before:
        values = {"prepare.source": before.params.prepare.source, **values}
    if context.dry:
        base = {**workspaces.TINY, "tokenizer.epochs": 1, "pretrain.epochs": 3, "pretrain.log_every_steps": 2}
    else:
        base = {
            "runtime.num_workers": max(1, len(os.sched_getaffinity(0)) - 1),
            "prepare.channels": 3,
            "model.name": "vit_tiny",
            "model.image_size": SIZE_PX,
            "model.patch_size": PATCH_PX,
            "tokenizer.min_perplexity": 1.0,
        }
    folder = context.folder / f"workspace-{len(list(context.folder.glob('workspace-*')))}"
    workspace = workspaces.make(folder, {**base, "runtime.device": context.device.type, **values})
    for name in ("data", "models", "metrics") if before else ():
        assert before
        if (before.root / name).exists():
            (folder / name).symlink_to(before.root / name)
    return workspace


def _epochs_that_fit(context: Context, workspace: Workspace) -> dict[str, Any]:
    """`pretrain.epochs` for the time that is left, by the rate of some first steps, with a tenth of them as warm-up."""
    set_reproducible(workspace.params.seed)
    training = pretrain.build(workspace, Hardware.choose(workspace.params.runtime)).training
    # The meter leaves the first half out, in which the workers start.
    num_steps = min(2 * TRIAL_STEPS, training.total_steps)
    images_per_s = replace(training, total_steps=num_steps, log_every_steps=num_steps // 2).run()["images_per_s"]
    num_train, config = workspace.index.count["train"], workspace.params.pretrain
    per_epoch = steps_in(1, num_train, config.batch_size) * config.batch_size
    epochs = int(TRAINING_SHARE * context.left_s * images_per_s / per_epoch)
    epochs = min(MOST_EPOCHS, max(1, epochs))
    return {"pretrain.epochs": epochs, "pretrain.warmup_epochs": 0.1 * epochs}


def _curve(workspace: Workspace) -> list[Figures]:
    (path,) = workspace.scratch.glob("pretrain-*/log.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{"step": row["step"], **{key: row[key] for key in KEYS if key in row}} for row in rows]


CHECKS = (Check("pretraining", pretraining), Check("nearest neighbours", neighbours))
