"""Compiling gives the same values, and where nothing can compile, a warning and the function as it is."""

import logging
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._inductor import config

from cae.train import compile as compiling
from cae.train.compile import compiled, missing_compiler

CPU = torch.device("cpu")


def wave(x: Tensor) -> Tensor:
    return (x.sin() * 2).sum()


@pytest.fixture(autouse=True)
def nothing_warned_of_yet() -> Iterator[None]:
    compiling._warn.cache_clear()
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.skipif(missing_compiler("cpu") is not None, reason=f"{missing_compiler('cpu')}")
def test_a_compiled_function_gives_values_and_gradients_of_the_eager_one() -> None:
    function = compiled(wave, wanted=True, device=CPU)
    assert function is not wave
    x, y = (torch.linspace(0, 1, 9, dtype=torch.float64).requires_grad_() for _ in range(2))
    torch.testing.assert_close(function(x), wave(y))
    function(x).backward()
    wave(y).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_not_wanted_is_not_compiled() -> None:
    assert compiled(wave, wanted=False, device=CPU) is wave


@pytest.mark.parametrize("name", ["/nothing/here", "false"])
def test_without_a_working_compiler_it_warns_once_and_runs(name: str, caplog: pytest.LogCaptureFixture) -> None:
    # CXX is read when the module is first imported.
    with config.patch({"cpp.cxx": (None, name)}), caplog.at_level(logging.WARNING):
        functions = [compiled(wave, wanted=True, device=CPU) for _ in range(2)]
    assert all(function is wave for function in functions)
    (warning,) = caplog.messages
    assert "runtime.compile" in warning
    assert "CXX" in warning


def test_cuda_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton" in (missing_compiler("cuda") or "")
