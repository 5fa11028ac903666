"""Pretraining that goes on from trained weights (`pretrain.start_from`) in place of random ones."""

import logging
from pathlib import Path

from torch import nn

from cae.architecture import Architecture, TimmSource
from cae.errors import UserError
from cae.model import ContextAutoencoder
from cae.timm_encoder import TimmEncoder
from cae.weights import Trained

logger = logging.getLogger(__name__)

# Sizes that the weights fix, and the parameter that sets each.
SIZES = {
    "channels": "prepare.channels",
    "patch_size": "model.patch_size",
    "depth": "model.depth",
    "width": "model.width",
    "num_heads": "model.num_heads",
}
PARTS = ("projection", "regressor", "decoder.blocks", "decoder.norm", "decoder.head")


def fitting(architecture: Architecture, trained: Trained, path: Path) -> Architecture:
    """The architecture of a run that starts from `trained`; UserError names every parameter that must change for it."""
    given = trained.architecture
    wrong = {key: name for name, key in SIZES.items() if getattr(given, name) != getattr(architecture, name)}
    if given.timm and given.grid != architecture.grid:
        # Ours are a formula; timm's were learned for one grid.
        wrong["model.image_size"] = "size_px"
    same_width = isinstance(given, Architecture) and given.predictor_width == architecture.predictor_width
    if same_width and given.predictor_num_heads != architecture.predictor_num_heads:  # type: ignore[attr-defined]
        # Shapes would not tell, and the regressor would compute something else with them.
        wrong["pretrain.predictor_num_heads"] = "predictor_num_heads"
    if wrong:
        changes = ", ".join(f"{key}: {_as_yaml(getattr(given, name))}" for key, name in wrong.items())
        raise UserError(f"pretrain.start_from: {path} was made with other sizes; set {changes}")
    if given.relative_position_bias:
        raise UserError(
            f"pretrain.start_from: {path} has a relative position bias over all patches, which CAE cannot use on a "
            "part of them; it can be probed, fine-tuned and exported"
        )
    if given.timm is None:
        return architecture
    assert isinstance(trained.encoder, TimmEncoder)
    trained.encoder.check_masking()
    # CAE aligns patches after a LayerNorm of their own; a model with one on the mean alone begins with a fresh one.
    return architecture.model_copy(
        update={"timm": TimmSource(name=given.timm.name, args={**given.timm.args, "fc_norm": False})}
    )


def load_parts(model: ContextAutoencoder, trained: Trained) -> None:
    """Take over every part that fits, and tell which parts keep their random weights."""
    missing, _ = model.encoder.load_state_dict(trained.encoder.state_dict(), strict=False)
    fresh = [f"encoder.{name}" for name in missing]
    for part in PARTS:
        module = model.get_submodule(part)
        source = trained.cae.get_submodule(part) if trained.cae else None
        if source is not None and _shapes(source) == _shapes(module):
            module.load_state_dict(source.state_dict())
        elif _shapes(module):
            fresh.append(part)
    logger.info("pretrain starts from trained weights; random ones in: %s", ", ".join(fresh) or "nothing")


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def _as_yaml(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
