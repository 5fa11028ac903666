"""Trained weights for other software: as a timm model, or as one folder with everything that cae-pipe reads."""

import logging
import shutil
from pathlib import Path
from typing import Any

import timm
from timm.models import VisionTransformer, save_for_hf

from cae.errors import UserError
from cae.timm_encoder import TimmEncoder
from cae.timm_weights import to_timm
from cae.weights import Trained, load_trained, save_trained
from pipeline.checkpoints import find_target_file
from pipeline.export import check_new
from pipeline.workspace import Workspace, published

logger = logging.getLogger(__name__)


def to_timm_folder(weights: Path, out: Path) -> None:
    """Write the encoder as `timm.create_model("local-dir:OUT", pretrained=True)` reads it, preprocessing included."""
    check_new(out)
    trained = load_trained(weights)
    with published(out) as folder:
        model = _timm_model(trained)
        # Fine-tuning has moved timm's last LayerNorm, and timm must be told.
        moved = trained.architecture.final_norm == "pooled" and isinstance(model, VisionTransformer)
        if moved:
            model.reset_classifier(0, "avg")
        save_for_hf(
            model,
            folder,
            model_args={"global_pool": "avg", "fc_norm": True} if moved else {},
            # Those of timm's own weights would be wrong for these.
            model_config={"num_classes": 0, "pretrained_cfg": {"tag": "cae_pipe", "license": "unknown"}},
            safe_serialization=True,
            data_config={
                "input_size": (trained.architecture.channels, *trained.architecture.size_px),
                "mean": tuple(trained.normalization.mean),
                "std": tuple(trained.normalization.std),
                "crop_pct": trained.eval_crop,
                "interpolation": "bicubic",
            },
        )
        # As in `cae.storage.save_weights`.
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
        _check_readable(folder, weights)
    logger.info('%s written; timm.create_model("local-dir:%s", pretrained=True) reads it', out, out)


def to_safetensors(workspace: Workspace, weights: Path, out: Path) -> None:
    """Write the weights, and the target of their decoder where it is found, as one folder that can be moved."""
    check_new(out)
    trained = load_trained(weights)
    target = find_target_file(workspace, weights, trained)
    description = {key: value for key, value in trained.metadata.items() if key != "kind"}
    with published(out) as folder:
        save_trained(folder, trained.cae or trained.encoder, description)
        if target:
            shutil.copy(target, folder / workspace.target.name)
    logger.info("%s written, %s its target", out, "with" if target else "without")


def _check_readable(folder: Path, weights: Path) -> None:
    try:
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    except RuntimeError as error:
        raise UserError(f"{weights}: timm {timm.__version__} has no model with these weights ({error})") from None


def _timm_model(trained: Trained) -> Any:
    if isinstance(trained.encoder, TimmEncoder):
        return trained.encoder.model
    source, state = to_timm(trained.encoder, trained.architecture)
    model = timm.create_model(source.name, num_classes=0, **source.args)
    model.load_state_dict(state)
    return model
