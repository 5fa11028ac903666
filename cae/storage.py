"""Safetensors files that say themselves what they are, byte-identical for identical weights."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import safetensors
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from cae.errors import NotReady, UserError
from cae.section import Section
from cae.train.checkpoint import sync_folder

A = TypeVar("A", bound=Section)

# One key, for safetensors does not keep the order of several.
METADATA_KEY = "cae_pipe"


def save_weights(path: Path, module: nn.Module, metadata: dict[str, Any]) -> None:
    """Write the state dict and `metadata` (plain JSON, with `kind`) under a temporary name, fsync and rename."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    temporary = path.with_suffix(".tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    save_file(state, temporary, {METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    # safetensors makes files that only their owner may read, and another user may have to serve or copy them.
    temporary.chmod(mode)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def read_weights(path: Path, *kinds: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and metadata of a file that `save_weights` wrote; UserError when it is no such file of these kinds."""
    expected = " or ".join(kinds)
    if not path.is_file():
        raise NotReady(f"{path}: no such file; expected {expected} weights, which `dvc repro` makes")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping, only keys())
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path}: not a safetensors file ({error}); expected {expected} weights, and `cae-pipe import` reads those "
            "of other software"
        ) from None
    if metadata.get("kind") not in kinds:
        found = metadata.get("kind", "foreign")
        hint = "; `cae-pipe import` reads those of other software" if found == "foreign" else ""
        raise UserError(f"{path}: holds {found} weights; expected {expected}{hint}")
    return state, metadata


def read_architecture(kind: type[A], path: Path, metadata: dict[str, Any]) -> A:
    """The sizes that a module is built from, out of its file's metadata."""
    raw = metadata.get("architecture", {})
    try:
        return kind.model_validate({key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: written by another version of cae-pipe ({key}: {first['msg'].lower()}); make it again, with "
            "`dvc repro` or `cae-pipe import`"
        ) from None


def load_into(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict strictly; UserError names what does not fit."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{path}: written by another version of cae-pipe; make it again with `dvc repro` ({error})"
        ) from None
