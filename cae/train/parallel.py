"""Several processes that train one model: who is who, how they share the model, and how they agree to stop."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from cae.config import RuntimeConfig
from cae.train.compile import compile_blocks

T = TypeVar("T")

# A process that hangs ends the run after this long; one that dies ends it at once.
TIMEOUT = timedelta(minutes=10)
# Transformer blocks of ours and of timm's, by their place in the module.
BLOCK_NAME = re.compile(r"(^|\.)blocks\.\d+$")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a training; alone unless `torchrun` or its like started it."""

    rank: int
    count: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> "Ranks":
        """As torchrun sets RANK, WORLD_SIZE and LOCAL_RANK."""
        rank = int(os.environ.get("RANK", 0))
        return cls(rank, int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", rank)))

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """In the group of this training's processes; nothing where there is one."""
    if Ranks.from_environment().count == 1:
        yield
        return
    # Tensors on the CPU go by gloo even where those of the GPU go by NCCL: the agreement to stop waits for no GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def in_group() -> bool:
    """Whether this process shares a training with others, right now."""
    return dist.is_available() and dist.is_initialized()


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a module, in order."""
    return [child for name, child in module.named_modules() if BLOCK_NAME.search(name)]


def checkpoint_activations(module: nn.Module) -> None:
    """Keep of every block its input alone and compute the rest again in the backward pass."""
    for block in blocks_of(module):
        # In place of a wrapper, which would change the names of the parameters.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def shard(module: nn.Module) -> None:
    """FSDP2: each process holds a part of the parameters, gradients and moments; before the optimizer is made."""
    for block in blocks_of(module):
        fully_shard(block)
    fully_shard(module)


def share_out(module: nn.Module, runtime: RuntimeConfig) -> None:
    """What `runtime` says of compiling and of memory, done to a module on its device before its optimizer is made.

    For `parallel: ddp` nothing is done here: the training step wraps the module.
    """
    if runtime.compile:
        compile_blocks(blocks_of(module), next(module.parameters()).device)
    if runtime.activation_checkpointing:
        checkpoint_activations(module)
    if runtime.parallel == "fsdp" and in_group():
        shard(module)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, whole on rank 0; where the module is sharded every process must call it."""
    return cast(
        dict[str, Tensor],
        get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)),
    )


def from_leader(look: Callable[[], T]) -> T:
    """What `look` gives on rank 0, on every process; every process must call it."""
    if not in_group():
        return look()
    found: list[Any] = [look() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return cast(T, found[0])


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of the processes' values; every process must call it."""
    if in_group():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def largest_over_ranks(value: Tensor) -> Tensor:
    """The largest of the processes' values, on the device and without waiting for it."""
    if in_group():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


class Agreement:
    """All processes stop after the same step, whichever was asked to; known a step later, so that nobody waits."""

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo") if in_group() else None
        self._asked: tuple[Any, Tensor] | None = None

    def signal(self, caught: list[int]) -> int:
        """The signal to stop by, 0 for none; every process calls it once a step."""
        own = caught[0] if caught else 0
        if self._group is None:
            return own
        before = self._asked
        asked = torch.tensor([own])
        self._asked = dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group, async_op=True), asked
        if before is None:
            return 0
        before[0].wait()
        return int(before[1])

    def wait_for_all(self) -> None:
        """Until every process is here: none may end while another still saves."""
        if self._group is not None:
            if self._asked:
                self._asked[0].wait()
            dist.barrier(group=self._group)
