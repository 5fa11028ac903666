"""The same random numbers on every device: drawn on the CPU, then moved."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
IN_PLACE = {aten.exponential_.default, aten.uniform_.default, aten.normal_.default}
NEW = {aten.rand.default, aten.randn.default}


class NoiseFromCpu(TorchDispatchMode):
    """While it is entered, noise on another device is the CPU's, by the CPU's generator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in IN_PLACE and args[0].device.type != "cpu":
            target: Tensor = args[0]
            drawn = torch.empty(target.shape, dtype=target.dtype)
            return target.copy_(func(drawn, *args[1:], **kwargs))
        if func in NEW and (device := kwargs.get("device")) and torch.device(device).type != "cpu":
            return func(*args, **{**kwargs, "device": torch.device("cpu")}).to(device)
        return func(*args, **kwargs)
