"""Checkpoints of other software are read as tensors; what carries code is refused and never runs."""

import argparse
import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cae.errors import UserError
from cae.foreign import read_file, read_state, shell

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"model": STATE, "optimizer": {"state": {}, "lr": 0.1}, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        {"state_dict": STATE},
        {"model": {f"module.{key}": value for key, value in STATE.items()}},
        {key: nn.Parameter(value) for key, value in STATE.items()},
    ],
)
def test_the_state_dict_is_found_in_every_wrapper(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    state = read_state(tmp_path / "x.pth")
    assert list(state) == list(STATE)
    assert all(torch.equal(state[key], value) for key, value in STATE.items())


def test_safetensors_is_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    assert torch.equal(read_state(tmp_path / "x.safetensors")["weight"], STATE["weight"])


@pytest.mark.parametrize("zipped", [True, False])
def test_planted_code_is_refused_by_name_and_does_not_run(zipped: bool, tmp_path: Path) -> None:
    content = {"model": STATE, "extra": Planted(tmp_path / "proof")}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"x\.pth: carries code .*system"):
        read_state(tmp_path / "x.pth")
    assert not (tmp_path / "proof").exists()
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert (tmp_path / "proof").exists(), "the plant itself must work"


def test_a_whole_module_is_read_only_through_shells(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 3)), tmp_path / "x.pkl")
    with pytest.raises(UserError, match=r"Sequential"):
        read_file(tmp_path / "x.pkl")
    shells = [shell("torch.nn.modules.container.Sequential"), shell("torch.nn.modules.linear.Linear")]
    module = read_file(tmp_path / "x.pkl", shells)
    assert not isinstance(module, nn.Module)
    assert module._modules["0"]._parameters["weight"].shape == (3, 2)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.pth", b"", "not a checkpoint, or damaged"),
        ("x.pth", b"hello, this is no checkpoint", "not a checkpoint"),
        ("x.pth", pickle.dumps({"a": 1}), "none that torch.save wrote"),
        ("x.safetensors", b"hello", "not a safetensors file"),
    ],
)
def test_what_is_no_checkpoint_is_refused(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=said):
        read_state(tmp_path / name)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": torch.tensor([1.0, float("nan")])}, "a holds values that are not finite"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "expected plain real numbers"),
        ({"a": torch.eye(2).to_sparse()}, "expected plain real numbers"),
        ({"a": torch.ones(2), "module.a": torch.ones(2)}, "the same names with and without"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(state: dict[str, Any], said: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=rf"x\.pth: .*{said}"):
        read_state(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_damage_anywhere_is_a_clear_refusal(zipped: bool, tmp_path: Path) -> None:
    torch.save({"model": STATE, "epoch": 3}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "x.pth").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for position in rng.integers(len(whole), size=3):
            damaged[position] = rng.integers(256)
        (tmp_path / "x.pth").write_bytes(damaged)
        with contextlib.suppress(UserError):
            read_state(tmp_path / "x.pth")


def test_a_missing_file_and_one_without_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.pth: no such file"):
        read_state(tmp_path / "gone.pth")
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"'epoch' is a int"):
        read_state(tmp_path / "x.pth")
