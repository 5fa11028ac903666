"""A CUDA device that is only pretended: shapes, dtypes and devices are followed, and nothing is computed on it.

Tensors on the CPU are real. What meets a tensor of the pretended device without having been moved there raises the
error that a real device would.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)


class _PretendedCuda(FakeTensorMode):
    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = tree_leaves((args, kwargs))
        if any(isinstance(value, FakeTensor) or _is_cuda(value) for value in values):
            args, kwargs = tree_map_only(Tensor, self._known, (args, kwargs or {}))
            return super().dispatch(func, types, args, kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs or {})

    def _known(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.from_tensor(tensor)


def _is_cuda(value: object) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """CUDA is there, as far as torch can be made to believe it; random numbers need no generator on it."""
    with pytest.MonkeyPatch.context() as patch, _PretendedCuda():
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(fake_tensor, "init_gpu_context", lambda *_: None, raising=False)
        patch.setattr(Tensor, "pin_memory", lambda tensor, *_: tensor)
        # torch swaps parameters that are fake in place, and cannot where something refers to them weakly.
        patch.setattr(nn.Module, "_apply", _apply)
        yield


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    for child in module.children():
        child._apply(function)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(function(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return module
