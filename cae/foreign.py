"""Weights that other software wrote, read as tensors only: no code of such a file ever runs.

PyTorch's checkpoints are pickles, which may call any function when they are read. `torch.load(weights_only=True)` knows
a short list of harmless types; every other name in the file is an error here.
"""

import argparse
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from cae.errors import UserError

# Training scripts keep their options in one; it holds values and runs nothing.
HARMLESS: tuple[Any, ...] = (argparse.Namespace,)
# Under these keys training scripts keep the weights beside the state of the training.
WRAPPERS = ("model", "state_dict", "module")


class Shell:
    """Stands for a class of a pickled module: holds what the class held, has none of its code."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def shell(name: str) -> tuple[Any, str]:
    """A Shell for the class `name` (with its module), as `read_file` takes it."""
    # A type of its own for each name, for torch finds the name by the type.
    return type(name.rpartition(".")[2], (Shell,), {}), name


def read_file(path: Path, shells: Sequence[tuple[Any, str]] = ()) -> Any:
    """What a checkpoint holds: a safetensors file or a PyTorch pickle, on the CPU. Names in `shells` are let through.

    Raises UserError for a file that is missing, no checkpoint, or carries code.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; expected a checkpoint (.safetensors, or a PyTorch .pth, .pt or .pkl)")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path}: not a safetensors file ({error})") from None
    try:
        with torch.serialization.safe_globals([*HARMLESS, *shells]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|type|Class|class) ([\w.]+)", str(error))
        if found:
            raise UserError(
                f"{path}: carries code or objects beside tensors ({found[1]}), and such a file is not opened. "
                "Ask its author for the state dict alone, best as safetensors"
            ) from None
        if "persistent_load of storage" in str(error):
            raise UserError(
                f"{path}: a whole module in the format of PyTorch before 1.6, which only its own code can read; save "
                "its state dict with that code (torch.save(module.state_dict(), ...)) and give that file"
            ) from None
        raise UserError(f"{path}: a pickle, but none that torch.save wrote; expected a checkpoint") from None
    except (MemoryError, OSError):
        raise
    except Exception:
        # Messages of torch about bytes that are no checkpoint say nothing to the reader.
        raise UserError(f"{path}: not a checkpoint, or damaged; copy or download it again") from None


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, taken out of the wrapper of a training script where there is one.

    Raises UserError as `read_file`, and where there is no state dict.
    """
    return state_in(read_file(path), path)


def state_in(content: Any, path: Path) -> dict[str, Tensor]:
    """As `read_state`, of what `read_file` read at `path`."""
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds a {type(content).__name__}; expected a dictionary of named tensors")
    wrong = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if wrong:
        raise UserError(
            f"{path}: expected named tensors, or such a dictionary under {', '.join(WRAPPERS)}; {wrong[0]!r} is a "
            f"{type(content[wrong[0]]).__name__}"
        )
    # Distributed wrappers leave their mark on every name.
    state = {str(key).removeprefix("module."): value for key, value in content.items()}
    if len(state) < len(content):
        raise UserError(f"{path}: holds the same names with and without `module.` before them; expected one of the two")
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise UserError(f"{path}: {key} is a {value.dtype} {value.layout} tensor; expected plain real numbers")
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path}: {key} holds values that are not finite; the checkpoint is damaged")
    return state
