"""Targets on disk: a tokenizer, or the description of a pixel target, in the same kind of file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cae.storage import load_into, read_architecture, read_weights, save_weights
from cae.targets.dalle import DalleArchitecture, DalleTarget
from cae.targets.dvae import Dvae, DvaeArchitecture
from cae.targets.pixels import PixelArchitecture, PixelTarget

AnyTarget = Dvae | PixelTarget | DalleTarget


def _blank(module: Callable[..., AnyTarget]) -> Callable[[Any], AnyTarget]:
    """Builds a target with a mean and a standard deviation that its file replaces."""
    return lambda architecture: module(architecture, *2 * [[0.0] * architecture.channels])


_TARGETS: dict[str, tuple[Callable[[Any], AnyTarget], Any]] = {
    "dvae": (_blank(Dvae), DvaeArchitecture),
    "pixels": (_blank(PixelTarget), PixelArchitecture),
    "dalle": (DalleTarget, DalleArchitecture),
}


def save_target(path: Path, target: AnyTarget, origin: dict[str, str]) -> None:
    """Write a target; `origin` names the files that it was read from by their SHA-256, none for one of our own."""
    described = {"target": target.kind, "architecture": target.architecture.model_dump(), "origin": origin}
    save_weights(path, target, {"kind": "target", **described})


def load_target(path: Path) -> AnyTarget:
    """Read a target, in eval mode."""
    state, metadata = read_weights(path, "target")
    build, kind = _TARGETS[metadata["target"]]
    target = build(read_architecture(kind, path, metadata))
    load_into(target, state, path)
    return target.eval()
