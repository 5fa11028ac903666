"""The one training loop: tokenizer, pretraining, fine-tuning and probe heads all run through it."""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from cae.data.loader import Batch
from cae.errors import Diverged, Interrupted
from cae.train.alarm import Alarm, Watch
from cae.train.checkpoint import CheckpointStore
from cae.train.device import Hardware
from cae.train.log import Row, TrainLog

logger = logging.getLogger(__name__)

StepFunction = Callable[[Batch, int], tuple[Tensor, dict[str, Tensor]]]
"""(batch on the device, step) to the loss and the parts of it worth logging, all still on the device."""

BatchSource = Callable[[int], Iterable[Batch]]
"""Batches from a step on, to the end of the training."""


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it needs to go on, and how often it saves."""

    path: Path
    checkpoint_every_steps: int
    stamp: dict[str, Any]  # parameters, data hash and code version, kept in every checkpoint


@dataclass
class Training:
    """One training: what is trained, by which step, for how long."""

    name: str
    module: nn.Module
    step: StepFunction
    optimizer: Optimizer
    schedule: Scheduler
    total_steps: int
    batches: BatchSource
    hardware: Hardware
    clip_grad: float | None = None
    log_every_steps: int = 10
    sink: Callable[[int, Row], None] | None = None
    alarms: tuple[Alarm, ...] = ()

    def run(self, folder: RunFolder | None = None) -> Row:
        """Train to the end, going on from the newest checkpoint in `folder`; return the efficiency figures of this run.

        Raises Interrupted after a signal (state saved where there is a folder), Diverged when the loss is not finite.
        """
        store = CheckpointStore(folder.path / "checkpoints") if folder else None
        start_step = self._restore(store)
        log_path = folder.path / "log.jsonl" if folder else Path("/dev/null")
        log = TrainLog(self.name, log_path, self.total_steps, start_step, self.sink)
        watch = Watch(self.name, self.alarms)
        meter = _Meter(self.log_every_steps)
        self.module.train()
        with _catch_signals() as caught:
            try:
                for step, batch in zip(
                    range(start_step, self.total_steps), meter.timed(self.batches(start_step)), strict=False
                ):
                    parts = self._one_step(batch, step)
                    done = step + 1
                    meter.add(len(batch["labels"]))
                    log.advance()
                    if done % self.log_every_steps == 0 or done == self.total_steps:
                        watch.check(done, self._log(log, meter, done, parts))
                    save_now = folder is not None and done % folder.checkpoint_every_steps == 0
                    if store and folder and (save_now or caught or done == self.total_steps):
                        self._check_finite(parts["loss"], done)
                        store.save(done, self._state(done, folder.stamp))
                    if caught:
                        raise Interrupted(caught[0], done, saved=store is not None)
            finally:
                log.close()
        return meter.summary()

    def _one_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        batch = {key: value.to(self.hardware.device, non_blocking=True) for key, value in batch.items()}
        # Set from the step alone, so a resumed run needs no state of the schedule.
        self.schedule.step_update(step)
        with self.hardware.autocast():
            loss, parts = self.step(batch, step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip_grad:
            parts["grad_norm"] = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_grad)
        self.optimizer.step()
        return {"loss": loss, **parts}

    def _log(self, log: TrainLog, meter: "_Meter", done: int, parts: dict[str, Tensor]) -> Row:
        self._check_finite(parts["loss"], done)
        # Here and where a checkpoint is saved values are read back from the device, and nowhere else.
        values = {key: float(value.detach()) for key, value in parts.items()}
        values["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        log.row(done, values | meter.recent())
        return values

    def _check_finite(self, loss: Tensor, done: int) -> None:
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged(
                f"{self.name}: the loss is {value} after {done} steps; lower the learning rate, lengthen the "
                "warm-up, or set runtime.precision to fp32, and run again"
            )

    def _state(self, step: int, stamp: dict[str, Any]) -> dict[str, Any]:
        rng = {"cpu": torch.get_rng_state()}
        if self.hardware.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        return {
            "format": 1,
            "step": step,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": [rng],  # one entry a rank
            **stamp,
        }

    def _restore(self, store: CheckpointStore | None) -> int:
        state = store.load_newest() if store else None
        if state is None:
            return 0
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"][0]["cpu"])
        if "cuda" in state["rng"][0]:
            torch.cuda.set_rng_state(state["rng"][0]["cuda"])
        logger.info("%s: going on from step %d of %d", self.name, state["step"], self.total_steps)
        return state["step"]


class _Meter:
    """Images per second and the share of time spent waiting for data, lately and over the whole run."""

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.wait_s, self.images, self.steps = 0.0, 0, 0
        self.start = self._mark = time.perf_counter()
        self._mark_wait, self._mark_images = 0.0, 0
        self._total_images, self._total_wait, self._total_start = 0, 0.0, self.start

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(iterator, None)
            self.wait_s += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def add(self, images: int) -> None:
        self.images += images
        self.steps += 1
        if self.steps == self.warmup_steps:
            # Start-up of workers and first allocations say nothing about the run.
            self._total_images, self._total_wait = self.images, self.wait_s
            self._total_start = time.perf_counter()

    def recent(self) -> Row:
        now = time.perf_counter()
        row = _rates(self.images - self._mark_images, self.wait_s - self._mark_wait, now - self._mark)
        self._mark, self._mark_wait, self._mark_images = now, self.wait_s, self.images
        return row

    def summary(self) -> Row:
        now = time.perf_counter()
        rates = _rates(self.images - self._total_images, self.wait_s - self._total_wait, now - self._total_start)
        return {**rates, "wall_s": now - self.start}


def _rates(images: int, wait_s: float, elapsed_s: float) -> Row:
    elapsed_s = max(elapsed_s, 1e-9)
    return {"images_per_s": images / elapsed_s, "data_wait_fraction": wait_s / elapsed_s}


@contextmanager
def _catch_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT append to, so that the step under way can finish and be saved."""
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
