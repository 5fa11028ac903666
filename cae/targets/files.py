"""Targets on disk: a trained tokenizer, or the description of a pixel target, in the same kind of file."""

from pathlib import Path
from typing import Any

from cae.storage import load_into, read_architecture, read_weights, save_weights
from cae.targets.dvae import Dvae, DvaeArchitecture
from cae.targets.pixels import PixelArchitecture, PixelTarget

AnyTarget = Dvae | PixelTarget
_TARGETS: dict[str, tuple[Any, Any]] = {"dvae": (Dvae, DvaeArchitecture), "pixels": (PixelTarget, PixelArchitecture)}


def save_target(path: Path, target: AnyTarget) -> None:
    """Write a target: a trained tokenizer, or the description of a pixel target."""
    save_weights(
        path, target, {"kind": "target", "target": target.kind, "architecture": target.architecture.model_dump()}
    )


def load_target(path: Path) -> AnyTarget:
    """Read a target, in eval mode."""
    state, metadata = read_weights(path, "target")
    module, kind = _TARGETS[metadata["target"]]
    architecture = read_architecture(kind, path, metadata)
    blank = [0.0] * architecture.channels
    target = module(architecture, blank, blank)
    load_into(target, state, path)
    return target.eval()
