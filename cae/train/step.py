"""One update of the weights: forward, backward, clipping, optimizer; nothing in it waits for the device."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from cae.data.loader import Batch
from cae.drop_path import DropPath, keep_factors
from cae.train.device import Hardware, keep_freed_memory
from cae.train.parallel import Ranks, in_group, largest_over_ranks
from cae.train.skipping import SkippedSteps

StepFunction = Callable[[Batch, int], tuple[Tensor, dict[str, Tensor]]]
"""(batch on the device, step) to the loss and the parts of it worth logging, all still on the device."""


class StepResult(NamedTuple):
    """What a step gives; tensors are on the device and nobody has waited for them."""

    values: dict[str, Tensor]  # the loss, its parts and the gradient's norm
    bad: Tensor  # 1 where the loss or the gradient was no number
    positions: Tensor | None  # of the images, on the CPU


class TrainStep:
    """Updates `module` by `function` on `accumulate` micro-batches a step."""

    def __init__(
        self,
        module: nn.Module,
        function: StepFunction,
        optimizer: Optimizer,
        schedule: Scheduler,
        hardware: Hardware,
        *,
        clip_grad: float | None,
        accumulate: int,
        seed: int,
        skipped: SkippedSteps,
    ) -> None:
        self.optimizer, self.schedule, self.hardware = optimizer, schedule, hardware
        self.clip_grad, self.accumulate, self.seed, self.skipped = clip_grad, accumulate, seed, skipped
        self.parameters = list(module.parameters())
        self.drop_paths = [child for child in module.modules() if isinstance(child, DropPath) and child.drops]
        self.drop_rates = torch.tensor([[drop_path.rate] for drop_path in self.drop_paths])
        self.ranks = Ranks.from_environment()
        if hardware.device.type == "cpu":
            keep_freed_memory()
        self.forward: nn.Module = _Forward(module, function)
        if in_group() and not isinstance(module, FSDPModule):
            self.forward = _data_parallel(self.forward)

    def __call__(self, micro_batches: list[Batch], step: int) -> StepResult:
        """The micro-batches of this process, on the CPU."""
        # From the step alone, so a resumed run needs no state of the schedule.
        self.schedule.step_update(step)
        # Before the forward pass, or the old gradients would lie beside its activations.
        self.optimizer.zero_grad(set_to_none=True)
        values: dict[str, Tensor] = {}
        for number, batch in enumerate(micro_batches):
            for name, value in self._backward(batch, step, number).items():
                values[name] = values[name] + value if name in values else value
        norm, bad = self.update(values["loss"])
        positions = [batch["positions"] for batch in micro_batches if "positions" in batch]
        return StepResult({**values, "grad_norm": norm}, bad, torch.cat(positions) if positions else None)

    def _backward(self, batch: Batch, step: int, number: int) -> dict[str, Tensor]:
        with self._without_exchange(number):
            loss, parts = self.loss(batch, step, number)
            (loss / self.accumulate).backward()
        return {name: value.detach() / self.accumulate for name, value in {"loss": loss, **parts}.items()}

    def loss(self, batch: Batch, step: int, number: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of micro-batch `number`, given on the CPU, and the parts of it worth logging."""
        batch = {
            key: value.to(self.hardware.device, non_blocking=True) for key, value in batch.items() if key != "positions"
        }
        self._draw(batch["labels"].shape[0], step, number)
        with self.hardware.autocast():
            return self.forward(batch, step)

    def update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradients and update by them unless they, or the loss, are no number; the norm, and 1 where so."""
        norm = self._clip()
        bad = largest_over_ranks((~(norm.isfinite() & loss.isfinite())).float())
        self._update(self.skipped.update(bad))
        return norm, bad

    def _draw(self, size: int, step: int, number: int) -> None:
        """All randomness of a micro-batch by (seed, step, part): a resumed run needs no state of any generator."""
        num_parts = self.accumulate * self.ranks.count
        part = number * self.ranks.count + self.ranks.rank
        torch.manual_seed(int(np.random.SeedSequence([self.seed, step, part]).generate_state(1, np.uint64)[0] >> 1))
        if not self.drop_paths:
            return
        rng = np.random.default_rng([self.seed, step])
        drawn = torch.from_numpy(rng.random((len(self.drop_paths), size * num_parts), dtype=np.float32))
        factors = keep_factors(drawn[:, part * size : (part + 1) * size], self.drop_rates)
        factors = factors.to(self.hardware.device, non_blocking=True)
        for drop_path, row in zip(self.drop_paths, factors, strict=True):
            drop_path.factors = row

    def _without_exchange(self, number: int) -> "nullcontext[None]":
        """Under DDP gradients are exchanged once a step. FSDP keeps parts of them and exchanges every micro-batch."""
        if isinstance(self.forward, DistributedDataParallel) and number < self.accumulate - 1:
            return self.forward.no_sync()  # type: ignore[return-value]
        return nullcontext()

    def _clip(self) -> Tensor:
        if self.clip_grad:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)
        else:
            norm = nn.utils.get_total_norm(p.grad for p in self.parameters if p.grad is not None)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _update(self, skip: Tensor) -> None:
        if self.optimizer.defaults.get("fused"):
            # The fused kernels read it on the device and leave weights and moments as they are where it is 1.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, skip  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bool(skip):
            self.optimizer.step()


def _data_parallel(module: nn.Module) -> DistributedDataParallel:
    with warnings.catch_warnings():
        # The name that torch 2.15 wants is unknown to those before it.
        warnings.simplefilter("ignore", FutureWarning)
        # Buffers are constants: positions, means, deviations.
        return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


class _Forward(nn.Module):
    """A step function as a module, which is what DistributedDataParallel can wrap."""

    def __init__(self, module: nn.Module, function: StepFunction) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.function(batch, step)
