"""Weights on disk: safetensors files that say themselves what they are, byte-identical for identical weights."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import safetensors
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from cae.config import Architecture, Section
from cae.errors import UserError
from cae.model import ContextAutoencoder, Encoder
from cae.targets.dvae import Dvae, DvaeArchitecture
from cae.targets.pixels import PixelArchitecture, PixelTarget
from cae.train.checkpoint import sync_folder

A = TypeVar("A", bound=Section)
AnyTarget = Dvae | PixelTarget
_TARGETS: dict[str, tuple[Any, Any]] = {"dvae": (Dvae, DvaeArchitecture), "pixels": (PixelTarget, PixelArchitecture)}

# One key, for safetensors does not keep the order of several.
METADATA_KEY = "cae_pipe"


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel, pixels in 0-1."""

    mean: list[float]
    std: list[float]


def save_weights(path: Path, module: nn.Module, metadata: dict[str, Any]) -> None:
    """Write the state dict and `metadata` (plain JSON, with `kind`) under a temporary name, fsync and rename."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    temporary = path.with_suffix(".tmp")
    save_file(state, temporary, {METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def read_weights(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and metadata of a file that `save_weights` wrote; UserError when it is no such file of this kind."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected {kind} weights, which `dvc repro` makes")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping, only keys())
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error}); expected {kind} weights") from None
    if metadata.get("kind") != kind:
        raise UserError(f"{path}: holds {metadata.get('kind', 'foreign')!r} weights; expected {kind!r}")
    return state, metadata


class LoadedCae(NamedTuple):
    """A pretrained model in eval mode and what its images must look like."""

    model: ContextAutoencoder
    normalization: Normalization
    metadata: dict[str, Any]


def save_cae(
    path: Path, model: ContextAutoencoder, architecture: Architecture, normalization: Normalization, params: dict[str, Any]
) -> None:
    """Write a pretrained CAE."""
    metadata = {
        "kind": "cae",
        "architecture": architecture.model_dump(),
        "normalization": normalization._asdict(),
        "params": params,
    }
    save_weights(path, model, metadata)


def load_cae(path: Path) -> LoadedCae:
    """Read a pretrained CAE."""
    state, metadata = read_weights(path, "cae")
    model = ContextAutoencoder(_architecture(Architecture, path, metadata))
    model.load_state_dict(state)
    return LoadedCae(model.eval(), Normalization(**metadata["normalization"]), metadata)


def random_encoder(loaded: LoadedCae, seed: int) -> Encoder:
    """An encoder of the same shape with random weights: the baseline of every figure."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(_architecture(Architecture, Path("memory"), loaded.metadata)).eval()


def save_target(path: Path, target: AnyTarget) -> None:
    """Write a target: a trained tokenizer, or the description of a pixel target."""
    kind = next(name for name, (module, _) in _TARGETS.items() if isinstance(target, module))
    save_weights(path, target, {"kind": "target", "target": kind, "architecture": target.architecture.model_dump()})


def load_target(path: Path) -> AnyTarget:
    """Read a target, in eval mode."""
    state, metadata = read_weights(path, "target")
    module, kind = _TARGETS[metadata["target"]]
    architecture = _architecture(kind, path, metadata)
    blank = [0.0] * architecture.channels
    target = module(architecture, blank, blank)
    target.load_state_dict(state)
    return target.eval()


def _architecture(kind: type[A], path: Path, metadata: dict[str, Any]) -> A:
    raw = metadata.get("architecture", {})
    try:
        return kind.model_validate({key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()})
    except ValidationError as error:
        raise UserError(f"{path}: written by another version of cae-pipe: {error}") from None
