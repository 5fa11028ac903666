"""The one training loop: tokenizer, pretraining, fine-tuning and probe heads all run through it."""

import json
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from cae.data.loader import Batch
from cae.data.watch import named_deaths
from cae.errors import Interrupted, UserError
from cae.train.alarm import Alarm, Watch
from cae.train.checkpoint import CheckpointStore, load_checkpoint
from cae.train.device import Hardware
from cae.train.log import Row, TrainLog
from cae.train.meter import Meter, peak_memory_mb
from cae.train.parallel import Agreement, Ranks, from_leader, mean_over_ranks
from cae.train.signals import caught_signals
from cae.train.skipping import KeysOf, SkippedSteps
from cae.train.step import StepFunction, StepResult, TrainStep

logger = logging.getLogger(__name__)

BatchSource = Callable[[int], Iterable[Batch]]
"""Micro-batches of this process from a step on, to the end of the training."""

Sink = Callable[[int, Row], None]
FORMAT = 2
CHECKPOINTS = "checkpoints"  # folder of a run's checkpoints


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it needs to go on, and how often it saves."""

    path: Path
    checkpoint_every_steps: int
    stamp: dict[str, Any]  # parameters, data hash and code version, kept in every checkpoint
    keep: int = 2  # the newest checkpoints
    keep_every_steps: int | None = None  # and for good those of every so many steps
    force: bool = False  # go on from a checkpoint of another stamp


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
    seed: int
    accumulate_steps: int = 1  # micro-batches of a step on this process
    max_skipped_steps: int = 5  # in a row, for a loss or gradient that is no number
    clip_grad: float | None = None
    log_every_steps: int = 10
    sink: Sink | None = None
    alarms: tuple[Alarm, ...] = ()
    keys_of: KeysOf | None = None
    before_step: Callable[[int], None] | None = None  # once a step, before its micro-batches

    def run(self, folder: RunFolder | None = None) -> Row:
        """Train to the end, going on from the newest checkpoint in `folder`; return the efficiency figures of this run.

        Raises Interrupted after a signal (state saved where there is a folder), Diverged when too many steps in a row
        had to be left out, UserError where the checkpoint there was made with other parameters, data or code.
        """
        ranks = Ranks.from_environment()
        store = CheckpointStore(folder.path / CHECKPOINTS, folder.keep, folder.keep_every_steps) if folder else None
        skipped = SkippedSteps(
            self.name,
            self.hardware.device,
            self.max_skipped_steps,
            folder.path / f"skipped-{ranks.rank}.jsonl" if folder else None,
            self.keys_of,
        )
        start = self._restore(store, folder, skipped)
        update = self.train_step(skipped)
        log_path = folder.path / "log.jsonl" if folder and ranks.leads else None
        log = TrainLog(self.name, log_path, self.total_steps, start, self.sink if ranks.leads else None, ranks.leads)
        self.module.train()
        try:
            return _Run(self, update, skipped, log, store, folder).go(start)
        finally:
            log.close()

    def train_step(self, skipped: SkippedSteps) -> TrainStep:
        """The update that `run` does in every step."""
        return TrainStep(
            self.module,
            self.step,
            self.optimizer,
            self.schedule,
            self.hardware,
            clip_grad=self.clip_grad,
            accumulate=self.accumulate_steps,
            seed=self.seed,
            skipped=skipped,
        )

    def state(self, step: int, skipped: SkippedSteps, stamp: dict[str, Any]) -> dict[str, Any]:
        """All that a run needs to go on after `step` steps, by parameter names, so for any number of processes.

        Learning rate, order of the samples and all randomness are functions of (seed, step), so they need no state.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        module, optimizer = get_state_dict(self.module, self.optimizer, options=options)
        return {
            "format": FORMAT,
            "step": step,
            "total_steps": self.total_steps,
            "seed": self.seed,
            "module": module,
            "optimizer": optimizer,
            "skipped_steps": int(skipped.total),
            "skipped_in_a_row": int(skipped.in_a_row),
            **stamp,
        }

    def _restore(self, store: CheckpointStore | None, folder: RunFolder | None, skipped: SkippedSteps) -> int:
        # One process looks, or a file that is damaged just then would send them different ways.
        path = from_leader(store.newest) if store else None
        if path is None or folder is None:
            return 0
        state = load_checkpoint(path)
        if not folder.force:
            check_stamp(state, folder.stamp, path)
        if state["step"] > self.total_steps:
            raise UserError(
                f"{path}: was made after {state['step']} steps, and this run has {self.total_steps}; raise the stage's "
                "epochs in params.yaml, or run without --force"
            )
        set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=state["module"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        skipped.total += state["skipped_steps"]
        skipped.in_a_row += state["skipped_in_a_row"]
        logger.info("%s: going on from step %d of %d", self.name, state["step"], self.total_steps)
        return state["step"]


def check_stamp(state: dict[str, Any], stamp: dict[str, Any], path: Path) -> None:
    """Raise UserError where a checkpoint was made by a run of another stamp; it names all that differs."""
    if differences := compare_stamps(state, stamp):
        raise UserError(
            f"{path}: was made with other {'; '.join(differences)}. Expected this run's own; delete the folder to "
            "start anew, or run the stage with --force to go on from it all the same"
        )


def compare_stamps(made: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two stamps, in words: parameters with both values, data, code."""
    before, after = (_flat(stamp.get("params", {})) for stamp in (made, now))
    names = sorted(before.keys() | after.keys())
    changed = [
        f"{name} ({json.dumps(before.get(name))}, now {json.dumps(after.get(name))})"
        for name in names
        if before.get(name) != after.get(name)
    ]
    differences = [f"parameters: {', '.join(changed)}"] if changed else []
    for key, word in (("data_hash", "data"), ("code_version", "code")):
        if made.get(key) != now.get(key):
            differences.append(word)
    return differences


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


class _Run:
    """The steps of one `Training.run`."""

    def __init__(
        self,
        training: Training,
        update: TrainStep,
        skipped: SkippedSteps,
        log: TrainLog,
        store: CheckpointStore | None,
        folder: RunFolder | None,
    ) -> None:
        self.training, self.update, self.skipped, self.log = training, update, skipped, log
        self.store, self.folder = store, folder
        self.meter = Meter(training.log_every_steps)
        self.watch = Watch(training.name, training.alarms)
        self.agreement = Agreement()
        self.ranks = Ranks.from_environment()
        # On a GPU reading a value waits for all that was asked of it; on a CPU it is there already.
        self.check_every = 1 if training.hardware.device.type == "cpu" else training.log_every_steps

    def go(self, start: int) -> Row:
        training = self.training
        micro_batches = self.meter.timed(training.batches(start))
        with caught_signals() as caught, named_deaths():
            for step in range(start, training.total_steps):
                if training.before_step:
                    training.before_step(step)
                batch = list(islice(micro_batches, training.accumulate_steps))
                self._after(step + 1, self.update(batch, step), sum(len(part["labels"]) for part in batch))
                stop = self.agreement.signal(caught)
                if stop or self._saves_after(step + 1):
                    self._save(step + 1)
                if stop:
                    self.agreement.wait_for_all()
                    raise Interrupted(stop, step + 1, saved=self.store is not None)
            self.agreement.wait_for_all()
        return {**self.meter.summary(), "peak_memory_mb": peak_memory_mb(training.hardware.device)}

    def _after(self, done: int, result: StepResult, images: int) -> None:
        self.meter.add(images * self.ranks.count)
        self.skipped.note(done, result.bad, result.positions)
        self.log.advance()
        logs = done % self.training.log_every_steps == 0 or done == self.training.total_steps
        if logs or done % self.check_every == 0 or self._saves_after(done):
            self.skipped.check()
        if logs:
            self._log(done, result)

    def _log(self, done: int, result: StepResult) -> None:
        # Here, and where steps are checked, values are read back from the device, and nowhere else.
        means = mean_over_ranks(torch.stack([value.double() for value in result.values.values()]))
        read = dict(zip(result.values, means.tolist(), strict=True))
        values = {key: value for key, value in read.items() if math.isfinite(value)}
        values["lr"] = max(group["lr"] for group in self.training.optimizer.param_groups)
        values["skipped_steps"] = float(self.skipped.total)
        speed = {**self.meter.recent(), "peak_memory_mb": peak_memory_mb(self.training.hardware.device)}
        self.log.row(done, values | speed)
        self.watch.check(done, values)

    def _saves_after(self, done: int) -> bool:
        if self.folder is None:
            return False
        every, for_good = self.folder.checkpoint_every_steps, self.folder.keep_every_steps
        due = done % every == 0 or done == self.training.total_steps
        return due or (for_good is not None and done % for_good == 0)

    def _save(self, done: int) -> None:
        if self.store is None or self.folder is None:
            return
        state = self.training.state(done, self.skipped, self.folder.stamp)
        if self.ranks.leads:
            self.store.save(done, state)
