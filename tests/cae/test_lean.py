"""The functions that keep less for the backward pass give the values and the gradients of what they stand for."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from cae import lean
from cae.lean import attention, gained_linear, gained_mlp, gather_rows, linear_cross_entropy


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    return F.linear(x, weight, bias) * gain


def plain_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, gain: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2) * gain


def plain_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias).flatten(0, 1).float(), classes.flatten())


def plain_attention(*projected: Tensor) -> Tensor:
    parts = projected if len(projected) == 3 else projected[0].chunk(3, dim=-1)
    query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in parts)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def plain_gather(x: Tensor) -> Tensor:
    return x.gather(1, ROWS.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


ROWS = torch.tensor([[0, 2, 3], [1, 3, 4], [4, 0, 1]])
CLASSES = torch.tensor([[1, 0, 6, 6, 3], [2, 5, 0, 4, 6], [6, 1, 1, 2, 3]])
SHAPES = {
    "linear": [(3, 5, 4), (6, 4), (6,), (6,)],
    "mlp": [(3, 5, 4), (8, 4), (8,), (4, 8), (4,), (4,)],
    "cross_entropy": [(3, 5, 4), (7, 4), (7,)],
    "self-attention": [(3, 5, 18)],
    "cross-attention": [(3, 4, 6), (3, 5, 6), (3, 5, 6)],
    "gather": [(3, 5, 4)],
}
LEAN: dict[str, Callable[..., Tensor]] = {
    "linear": gained_linear,
    "mlp": gained_mlp,
    "cross_entropy": lambda *inputs: linear_cross_entropy(*inputs, CLASSES)[0],
    "self-attention": partial(attention, 2),
    "cross-attention": partial(attention, 2),
    "gather": lambda x: gather_rows(x, ROWS),
}
PLAIN: dict[str, Callable[..., Tensor]] = {
    "linear": plain_linear,
    "mlp": plain_mlp,
    "cross_entropy": lambda *inputs: plain_cross_entropy(*inputs, CLASSES),
    "self-attention": plain_attention,
    "cross-attention": plain_attention,
    "gather": plain_gather,
}


def inputs_of(kind: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(s, dtype=torch.float64, generator=rng).to(dtype).requires_grad_() for s in SHAPES[kind]]


@pytest.fixture(params=[2**21, 14], ids=["one chunk", "chunks of two rows"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "CPU_CHUNK", request.param)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.usefixtures("chunk")
def test_gradients_are_those_of_the_function(kind: str) -> None:
    assert torch.autograd.gradcheck(LEAN[kind], inputs_of(kind))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "bf16", "tolerance"),
    [(torch.float64, False, 1e-6), (torch.float32, False, 1e-5), (torch.float32, True, 3e-2)],
)
@pytest.mark.usefixtures("chunk")
def test_values_and_gradients_are_those_of_autograd(
    kind: str, dtype: torch.dtype, bf16: bool, tolerance: float
) -> None:
    results = []
    for functions in (LEAN, PLAIN):
        inputs = inputs_of(kind, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = functions[kind](*inputs)
        value.float().square().sum().backward()
        results.append([value, *(tensor.grad for tensor in inputs)])
        assert all(tensor.grad is not None and tensor.grad.dtype == dtype for tensor in inputs)
    for ours, expected in zip(*results, strict=True):
        difference = (ours.double() - expected.double()).norm() / expected.double().norm()
        assert difference < tolerance


@pytest.mark.usefixtures("chunk")
def test_the_share_of_right_classes_comes_with_the_loss() -> None:
    x, weight, bias = inputs_of("cross_entropy")
    _, share = linear_cross_entropy(x, weight, bias, CLASSES)
    assert not share.requires_grad
    assert 0 < share == (F.linear(x, weight, bias).argmax(-1) == CLASSES).double().mean()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_under_autocast_they_compute_in_its_type(kind: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert LEAN[kind](*inputs_of(kind, torch.float32)).dtype == torch.bfloat16
        assert LEAN["cross_entropy"](*inputs_of("cross_entropy", torch.float32)).dtype == torch.float32


def kept_values(function: Callable[..., Tensor], inputs: list[Tensor]) -> int:
    """How many values autograd keeps that are no inputs."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = function(*inputs)  # held, or its memory would be used again
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    assert result is not None
    return sum(size for pointer, size in kept.items() if pointer not in own)


def test_no_logits_and_no_gelu_are_kept() -> None:
    x, classes = torch.randn(1, 1000, 8, requires_grad=True), torch.zeros(1, 1000, dtype=torch.int64)
    weight, bias = torch.randn(50, 8, requires_grad=True), torch.zeros(50, requires_grad=True)
    assert kept_values(lambda *i: linear_cross_entropy(*i, classes), [x, weight, bias]) == x.numel() + 50 * 8 + 50
    wide, narrow = torch.randn(32, 8, requires_grad=True), torch.randn(8, 32, requires_grad=True)
    given = [x, wide, torch.zeros(32, requires_grad=True), narrow, bias[:8].detach(), torch.ones(8, requires_grad=True)]
    inner = 1000 * 32
    assert kept_values(gained_mlp, given) == inner + narrow.numel()
    assert kept_values(plain_mlp, given) >= 2 * inner


def test_a_compiler_may_take_them_apart() -> None:
    for kind in SHAPES:
        inputs = inputs_of(kind)
        graph = torch.compile(LEAN[kind], backend="aot_eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(graph(*inputs), LEAN[kind](*inputs))


def test_the_gradient_of_gathered_rows_places_no_single_elements() -> None:
    x = torch.randn(3, 5, 4, requires_grad=True)
    gathered = gather_rows(x, ROWS)
    with OperatorNames() as names:
        gathered.sum().backward()
    assert not [name for name in names.seen if "scatter" in name]
    assert x.grad is not None
    assert x.grad.sum(2).bool().int().tolist() == [[1, 0, 1, 1, 0], [0, 1, 0, 1, 1], [1, 1, 0, 0, 1]]


class OperatorNames(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **kwargs or {})
