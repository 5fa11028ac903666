"""Compiling gives the same values, and where nothing can compile, a warning and the blocks as they are."""

import logging
import sys
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config

from cae.blocks import Block
from cae.train import compile as compiling
from cae.train.compile import compile_blocks, missing_compiler

CPU = torch.device("cpu")


def blocks() -> list[Block]:
    torch.manual_seed(0)
    return [Block(16, 2, layer_scale=0.5, drop_path=rate) for rate in (0.1, 0.2, 0.3)]


@pytest.fixture(autouse=True)
def nothing_warned_of_yet() -> Iterator[None]:
    compiling._warn.cache_clear()
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.skipif(missing_compiler("cpu") is not None, reason=f"{missing_compiler('cpu')}")
def test_compiled_blocks_give_values_and_gradients_of_eager_ones_and_share_their_code() -> None:
    counters.clear()
    eager, compiled = blocks(), blocks()
    compile_blocks(compiled, CPU)
    x, y = (torch.linspace(-1, 1, 2 * 3 * 16).view(2, 3, 16).requires_grad_() for _ in range(2))
    results = []
    for start, several in ((x, eager), (y, compiled)):
        value = start
        for block in several:
            # As the training step gives them.
            block.drop_path.factors = torch.tensor([0.0, 1 / (1 - block.drop_path.rate)])
            value = block(value)
        value.square().sum().backward()
        results.append([value, start.grad, *(p.grad for block in several for p in block.parameters())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["/nothing/here", "false"])
def test_without_a_working_compiler_it_warns_once_and_runs(name: str, caplog: pytest.LogCaptureFixture) -> None:
    # CXX is read when the module is first imported.
    with config.patch({"cpp.cxx": (None, name)}), caplog.at_level(logging.WARNING):
        for _ in range(2):
            several = blocks()
            compile_blocks(several, CPU)
            assert all("forward" not in vars(block) for block in several)
    (warning,) = caplog.messages
    assert "runtime.compile" in warning
    assert "CXX" in warning


def test_cuda_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton" in (missing_compiler("cuda") or "")


@pytest.mark.parametrize(
    ("compiler", "says"), [("", "none was found"), ("false", "false fails"), ("/nothing/here", "cannot be run")]
)
def test_triton_needs_a_c_compiler(compiler: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr("shutil.which", lambda name: None)
    reason = missing_compiler("cuda") or ""
    assert says in reason
    assert "python3-dev" in reason
