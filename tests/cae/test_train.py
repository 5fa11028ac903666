"""Training: a run that was stopped goes on as if it had not been; checkpoints, log, schedule, optimizer, device."""

import itertools
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cae.architecture import Architecture
from cae.config import OptimizationConfig, parse_params
from cae.data.loader import Batch
from cae.errors import Diverged, Interrupted, UserError
from cae.heads import Classifier
from cae.model import ContextAutoencoder, Encoder
from cae.targets.dvae import Dvae, DvaeArchitecture
from cae.train.checkpoint import CheckpointStore, load_checkpoint
from cae.train.device import Hardware, set_reproducible
from cae.train.log import TrainLog
from cae.train.loop import RunFolder, StepFunction, Training
from cae.train.optimizer import adamw, cosine_schedule
from cae.train.skipping import SkippedSteps
from tests.tiny import shipped_params

MakeArchitecture = Callable[..., Architecture]
TOTAL_STEPS = 12
STEPS_PER_EPOCH = 4
CPU = Hardware(torch.device("cpu"), bf16=False)
TIMINGS = ("images_per_s", "data_wait_fraction", "peak_memory_mb")


def optimization(**changes: float) -> OptimizationConfig:
    values = {
        "epochs": TOTAL_STEPS // STEPS_PER_EPOCH,
        "batch_size": 6,
        "lr": 0.01,
        "min_lr": 0.001,
        "warmup_epochs": 1,
        "weight_decay": 0.05,
    }
    return OptimizationConfig.model_validate({**values, **changes})


def batches(start: int) -> Iterable[Batch]:
    """Batches that depend on the step alone."""
    for step in range(start, TOTAL_STEPS):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(6, 5, generator=generator)
        yield {"images": images, "labels": torch.arange(6) % 3, "positions": torch.arange(6) + 6 * step}


class Run:
    """A small classifier with dropout, so that the generator's state matters, and all of its training."""

    def __init__(self, seed: int = 0, log_every_steps: int = 2) -> None:
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
        self.stop_at: int | None = None
        self.fail_at: int | None = None
        self.nan_at: set[int] = set()
        self.seen: list[tuple[int, dict[str, float]]] = []
        self.steps: list[int] = []
        self.log_every_steps = log_every_steps

    def step(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.steps.append(step)
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == self.fail_at:
            raise OSError("the power is gone")
        logits = self.module(batch["images"])
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        if step in self.nan_at:
            loss = loss * math.nan
        return loss, {"logit_norm": logits.norm()}

    def training(self, step: StepFunction | None = None) -> Training:
        optimizer = adamw(self.module, optimization())
        return Training(
            name="toy",
            module=self.module,
            step=step or self.step,
            optimizer=optimizer,
            schedule=cosine_schedule(optimizer, optimization(), STEPS_PER_EPOCH * optimization().batch_size),
            total_steps=TOTAL_STEPS,
            batches=batches,
            hardware=CPU,
            seed=7,
            clip_grad=1.0,
            log_every_steps=self.log_every_steps,
            keys_of=lambda positions: [f"image {position}" for position in positions.tolist()],
            sink=lambda step, row: self.seen.append((step, row)),
        )

    def go(self, path: Path, checkpoint_every_steps: int = 5) -> dict[str, float]:
        return self.training().run(RunFolder(path, checkpoint_every_steps, {"stamp": "here"}))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of the log without how long they took."""
    rows = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def names(folder: Path) -> list[str]:
    """Files of a folder, checkpoints without the checksum in their names."""
    return sorted(re.sub("-[0-9a-f]{16}[.]pt$", ".pt", file.name) for file in folder.iterdir())


def checkpoints(path: Path) -> list[str]:
    return names(path / "checkpoints")


def newest(store: CheckpointStore) -> dict[str, Any] | None:
    path = store.newest()
    return load_checkpoint(path) if path else None


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    other = second.state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(value, other[name]), name


@pytest.fixture
def whole(tmp_path: Path) -> Run:
    """A run that nothing interrupted, in the folder `whole`."""
    run = Run()
    run.go(tmp_path / "whole")
    return run


@pytest.mark.parametrize("stop_at", [0, 4, 6, 10])
def test_a_run_stopped_by_sigterm_and_resumed_equals_one_that_was_not(tmp_path: Path, whole: Run, stop_at: int) -> None:
    first = Run()
    first.stop_at = stop_at
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=f"stopped by SIGTERM after step {stop_at + 1}, which is saved") as caught:
        first.go(tmp_path / "cut")
    assert caught.value.exit_code == 143
    assert first.steps == list(range(stop_at + 1))
    assert signal.getsignal(signal.SIGTERM) == handler

    # A new process has other weights and another generator to begin with.
    second = Run(seed=1)
    second.go(tmp_path / "cut")
    assert second.steps == list(range(stop_at + 1, TOTAL_STEPS))
    assert_same_weights(whole.module, second.module)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert checkpoints(tmp_path / "cut")[-1] == checkpoints(tmp_path / "whole")[-1]


def test_a_run_that_died_goes_on_from_its_last_checkpoint(tmp_path: Path, whole: Run) -> None:
    first = Run()
    first.fail_at = 8
    with pytest.raises(OSError, match="power"):
        first.go(tmp_path / "cut")
    assert [row["step"] for row in rows_of(tmp_path / "cut")] == [2, 4, 6, 8]
    second = Run(seed=1)
    second.go(tmp_path / "cut")
    assert second.steps == list(range(5, TOTAL_STEPS))
    assert_same_weights(whole.module, second.module)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path, whole: Run) -> None:
    again = Run(seed=1)
    again.go(tmp_path / "whole")
    assert again.steps == []
    assert_same_weights(whole.module, again.module)


def test_a_run_without_a_folder_trains_as_one_with_a_folder(whole: Run) -> None:
    alone = Run()
    alone.training().run()
    assert_same_weights(whole.module, alone.module)


def test_a_run_without_a_folder_does_not_claim_to_be_saved() -> None:
    run = Run()
    run.stop_at = 2
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 3, and starts anew"):
        run.training().run()


def test_a_run_trains_in_train_mode_whatever_the_mode_before(tmp_path: Path, whole: Run) -> None:
    other = Run()
    other.module.eval()
    other.go(tmp_path / "other")
    assert_same_weights(whole.module, other.module)
    assert whole.module[1].num_batches_tracked == TOTAL_STEPS


def test_another_seed_trains_other_weights(tmp_path: Path, whole: Run) -> None:
    other = Run(seed=1)
    other.go(tmp_path / "other")
    assert not torch.equal(other.module[0].weight, whole.module[0].weight)


def test_checkpoints_appear_as_often_as_asked_and_at_the_end_and_two_are_kept(tmp_path: Path) -> None:
    run = Run()
    run.go(tmp_path, checkpoint_every_steps=5)
    assert checkpoints(tmp_path) == ["step-000000010.pt", "step-000000012.pt"]
    state = newest(CheckpointStore(tmp_path / "checkpoints", 2, None))
    assert state is not None
    assert state["step"] == TOTAL_STEPS
    assert state["stamp"] == "here"
    assert state.keys() >= {"module", "optimizer", "seed"}


def test_the_log_has_losses_rate_and_speed_in_the_steps_asked_for(tmp_path: Path) -> None:
    run = Run(log_every_steps=5)
    efficiency = run.go(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert all(
        line.keys() == {"step", "loss", "logit_norm", "grad_norm", "lr", "skipped_steps", *TIMINGS} for line in lines
    )
    assert all(line["images_per_s"] > 0 and 0 <= line["data_wait_fraction"] <= 1 for line in lines)
    assert [(line.pop("step"), line) for line in lines] == run.seen
    assert efficiency.keys() == {*TIMINGS, "wall_s"}
    assert efficiency["wall_s"] > 0


def test_gradients_are_clipped_by_their_norm() -> None:
    run = Run()
    norms: list[float] = []

    def step(batch: Batch, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = run.step(batch, number)
        return 1000 * loss, parts

    training = run.training(step)
    training.optimizer.register_step_pre_hook(
        lambda *_: norms.append(nn.utils.get_total_norm(p.grad for p in run.module.parameters()).item())  # type: ignore[misc]
    )
    training.run()
    assert norms == pytest.approx([1.0] * TOTAL_STEPS, abs=1e-3)


def test_the_schedule_sets_the_rate_of_every_step() -> None:
    run = Run()
    rates: list[float] = []
    training = run.training()
    training.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])  # type: ignore[arg-type]
    )
    training.run()
    assert rates[:5] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01])
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)


@pytest.mark.parametrize("fused", [True, False])
def test_steps_that_are_no_number_are_left_out_and_their_images_written_down(tmp_path: Path, fused: bool) -> None:
    run = Run()
    run.nan_at = {4, 5}
    training = run.training()
    if not fused:
        training.optimizer = torch.optim.SGD(run.module.parameters(), lr=0.01)
        training.schedule = cosine_schedule(
            training.optimizer, optimization(), STEPS_PER_EPOCH * optimization().batch_size
        )
    weights: list[Tensor] = []
    training.before_step = lambda _step: weights.append(run.module[0].weight.detach().clone())
    training.run(RunFolder(tmp_path, 100, {}))
    changed = [not torch.equal(before, after) for before, after in itertools.pairwise(weights)]
    # The rate of step 0 is 0.
    assert changed == [step not in {4, 5} and (step > 0) for step in range(TOTAL_STEPS - 1)]
    assert not any(torch.isnan(value).any() for value in run.module.state_dict().values())
    written = [json.loads(line) for line in (tmp_path / "skipped-0.jsonl").read_text().splitlines()]
    assert written == [{"step": step, "keys": [f"image {6 * (step - 1) + i}" for i in range(6)]} for step in (5, 6)]
    rows = rows_of(tmp_path)
    assert [row["skipped_steps"] for row in rows] == [0, 0, 2, 2, 2, 2]
    assert "loss" not in rows[2], "a row has numbers only"


def test_too_many_bad_steps_in_a_row_end_the_run_with_advice_and_lose_nothing(tmp_path: Path) -> None:
    run = Run(log_every_steps=4)
    run.nan_at = {5, 6, 7, 8, 9, 10, 11}
    training = run.training()
    training.max_skipped_steps = 2
    with pytest.raises(Diverged, match=r"toy: .* 3 steps in a row.*max_skipped_steps 2.*skipped-0.jsonl.*precision"):
        training.run(RunFolder(tmp_path, 3, {}))
    assert run.steps[-1] == 7
    assert checkpoints(tmp_path) == ["step-000000003.pt", "step-000000006.pt"]
    # The images are mended: it goes on from the last checkpoint, in the middle of the bad steps.
    again = Run(seed=0)
    again.go(tmp_path)
    assert again.steps[0] == 6


def test_the_device_stops_updating_by_itself_after_too_many_bad_steps() -> None:
    # On a GPU the host comes to know some steps later.
    skipped = SkippedSteps("toy", torch.device("cpu"), 1, None, None)
    bad, good = torch.tensor(1.0), torch.tensor(0.0)
    assert [bool(skipped.update(flag)) for flag in (bad, good, bad, bad, good, good)] == [True, False, True] + [
        True
    ] * 3


def test_bad_steps_that_are_not_in_a_row_never_end_a_run(tmp_path: Path) -> None:
    run = Run()
    run.nan_at = {1, 3, 5, 7, 9}
    training = run.training()
    training.max_skipped_steps = 1
    training.run(RunFolder(tmp_path, 100, {}))
    assert run.steps[-1] == TOTAL_STEPS - 1


def test_a_count_of_bad_steps_survives_a_restart(tmp_path: Path) -> None:
    first = Run()
    first.nan_at, first.stop_at = {2, 3}, 3
    with pytest.raises(Interrupted):
        first.go(tmp_path)
    second = Run()
    second.nan_at = {4}
    training = second.training()
    training.max_skipped_steps = 2
    with pytest.raises(Diverged):
        training.run(RunFolder(tmp_path, 100, {"stamp": "here"}))


def test_the_store_keeps_the_newest_two(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "made" / "here", 2, None)
    for step in (5, 9, 10, 100):
        store.save(step, {"step": step})
    assert names(store.folder) == ["step-000000010.pt", "step-000000100.pt"]
    state = newest(store)
    assert state is not None
    assert state["step"] == 100


def test_an_empty_store_has_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path, 2, None).newest() is None


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "zeros": lambda whole: bytes(len(whole)),
    "cut": lambda whole: whole[: len(whole) // 2],
    "head lost": lambda whole: bytes(200) + whole[200:],
    "tail lost": lambda whole: whole[:-200] + bytes(200),
    "text": lambda whole: b"hello world\n",
    "page": lambda whole: b"<html>502 Bad Gateway</html>",
    "braces": lambda whole: b"}]\n",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    store = CheckpointStore(tmp_path, 2, None)
    for step in (1, 2):
        store.save(step, {"step": step, "weights": torch.ones(1000)})
    damaged = store.paths()[-1]
    damaged.write_bytes(DAMAGE[kind](damaged.read_bytes()))
    with caplog.at_level(logging.WARNING):
        state = newest(store)
    assert state is not None
    assert state["step"] == 1
    assert damaged.name in caplog.text


class Gadget:
    """Pickles by reference; a checkpoint must not bring it to life."""


def test_a_checkpoint_never_runs_code(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2, None)
    path = store.save(1, {"step": 1, "gadget": Gadget()})
    with pytest.raises(Exception, match="Gadget"):
        load_checkpoint(path)


class Witness:
    """Notes which files there are while it is being saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[str] = []

    def __reduce__(self) -> tuple[type[dict[str, int]], tuple[()]]:
        self.seen = [path.name[:14] for path in self.folder.glob("step-*.pt")]
        return dict, ()


def test_a_checkpoint_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    store, witness = CheckpointStore(tmp_path, 2, None), Witness(tmp_path)
    store.save(1, {"step": 1})
    store.save(2, {"step": 2, "witness": witness})
    assert witness.seen == ["step-000000001"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_payload_that_cannot_be_saved_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2, None)
    store.save(1, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        store.save(2, {"step": 2, "function": lambda: None})
    assert names(tmp_path) == ["step-000000001.pt"]


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from cae.train.checkpoint import CheckpointStore

store = CheckpointStore(Path(sys.argv[1]), 2, None)
store.save(1, {"step": 1, "weights": torch.zeros(10)})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    store.save(2, {"step": 2, "weights": torch.zeros(100_000)})
except OSError as error:
    sys.exit(f"refused: {error}")
"""


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    # A limit on the size of files stands for the disk; it holds for a whole process, so it gets one of its own.
    child = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=False)
    assert child.returncode == 1, child.stderr
    state = newest(CheckpointStore(tmp_path, 2, None))
    assert state is not None
    assert state["step"] == 1
    assert "refused" in child.stderr
    assert "step-000000002.pt: the checkpoint could not be written" in child.stderr
    assert names(tmp_path) == ["step-000000001.pt"]


def test_no_temporary_file_is_left_by_a_save(tmp_path: Path) -> None:
    CheckpointStore(tmp_path, 2, None).save(1, {"step": 1})
    assert names(tmp_path) == ["step-000000001.pt"]


def write_log(path: Path, steps: Iterable[int], start_step: int = 0) -> list[tuple[int, dict[str, float]]]:
    """Open a log at `start_step`, write a row a step, and return what its sink was given."""
    seen: list[tuple[int, dict[str, float]]] = []
    log = TrainLog("toy", path, 100, start_step, lambda step, row: seen.append((step, row)), shows=True)
    for step in steps:
        log.advance()
        log.row(step, {"loss": 1 / step})
    log.close()
    return seen


def test_a_resumed_log_drops_the_rows_after_the_checkpoint_and_replays_the_others(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_log(path, [1, 2, 3, 4])
    seen = write_log(path, [3, 4, 5], start_step=2)
    assert seen == [(step, {"loss": 1 / step}) for step in (1, 2, 3, 4, 5)]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": step, "loss": 1 / step} for step in (1, 2, 3, 4, 5)
    ]


@pytest.mark.parametrize("rest", ['{"st', '{"step": 3, "lo', "{"])
def test_a_half_written_last_line_is_dropped(tmp_path: Path, rest: str) -> None:
    path = tmp_path / "log.jsonl"
    write_log(path, [1, 2])
    with path.open("a") as file:
        file.write(rest)
    assert [step for step, _ in write_log(path, [4], start_step=3)] == [1, 2, 4]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 4]


def test_a_log_that_starts_over_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_log(path, [1, 2])
    assert write_log(path, []) == []
    assert path.read_text() == ""


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = TrainLog("toy", tmp_path / "log.jsonl", 10, 0, None, shows=True)
    log.row(1, {"loss": 2.5})
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 1, "loss": 2.5}
    log.close()


def rates(config: OptimizationConfig, steps_per_epoch: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule = cosine_schedule(optimizer, config, steps_per_epoch * config.batch_size)
    values = []
    for step in range(int(config.epochs) * steps_per_epoch + 1):
        schedule.step_update(step)
        values.append(optimizer.param_groups[0]["lr"])
    return values


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine_to_its_minimum() -> None:
    values = rates(optimization(epochs=10, warmup_epochs=2, lr=1.0, min_lr=0.1), 5)
    assert values[:11] == pytest.approx([step / 10 for step in range(11)])
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)]
    assert values[10:50] == pytest.approx(expected)
    assert values[50] == pytest.approx(0.1)


def test_a_fraction_of_an_epoch_can_be_warm_up_and_none_as_well() -> None:
    assert rates(optimization(epochs=2, warmup_epochs=0.5, lr=1.0), 8)[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert rates(optimization(epochs=2, warmup_epochs=0, lr=1.0), 8)[0] == 1.0


def decayed(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, float]:
    """Weight decay of every parameter by name."""
    by_id = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(p)] for name, p in module.named_parameters()}


def test_matrices_decay_and_biases_norms_gains_and_tokens_do_not(make_architecture: MakeArchitecture) -> None:
    model = ContextAutoencoder(make_architecture(predictor_width=8))
    optimizer = adamw(model, optimization(weight_decay=0.05))
    for name, decay in decayed(optimizer, model).items():
        token = name in {"encoder.cls_token", "regressor.mask_query"}
        matrix = name.endswith("weight") and "norm" not in name and name != "projection.1.weight"
        assert decay == (0.05 if matrix and not token else 0), name
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.999), 1e-8)}
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


def test_biases_do_not_decay_in_a_module_without_tokens() -> None:
    architecture = DvaeArchitecture(
        channels=1, patch_size=2, grid=(2, 2), vocab_size=4, code_width=4, hidden_width=4, num_res_blocks=1
    )
    dvae = Dvae(architecture, [0.5], [0.5])
    for name, decay in decayed(adamw(dvae, optimization(weight_decay=0.05)), dvae).items():
        assert decay == (0 if name.endswith("bias") else 0.05), name


def test_layers_learn_slower_the_deeper_they_lie(make_architecture: MakeArchitecture) -> None:
    classifier = Classifier(Encoder(make_architecture(depth=3, final_norm="pooled")), 16, 10)
    optimizer = adamw(classifier, optimization(weight_decay=0.05), layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}

    def layer(name: str) -> int:
        if name.startswith(("encoder.cls_token", "encoder.patch_embed")):
            return 0
        return int(name.split(".")[2]) + 1 if name.startswith("encoder.blocks.") else 4

    for name, parameter in classifier.named_parameters():
        assert scales[id(parameter)] == 0.5 ** (4 - layer(name)), name
    assert decayed(optimizer, classifier)["encoder.cls_token"] == 0
    assert decayed(optimizer, classifier)["head.weight"] == 0.05
    assert decayed(optimizer, classifier)["head.bias"] == 0


def test_the_schedule_multiplies_the_scale_of_a_layer_in(make_architecture: MakeArchitecture) -> None:
    classifier = Classifier(Encoder(make_architecture(depth=3, final_norm="pooled")), 16, 10)
    config = optimization(epochs=3, warmup_epochs=1, lr=1.0, min_lr=0.1)
    optimizer = adamw(classifier, config, layer_decay=0.5)
    schedule = cosine_schedule(optimizer, config, 4 * config.batch_size)
    for step, rate in ((2, 0.5), (4, 1.0)):
        schedule.step_update(step)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(rate * group["lr_scale"])


def hardware(device: str, precision: str) -> Hardware:
    runtime = parse_params(shipped_params()).runtime
    return Hardware.choose(runtime.model_copy(update={"device": device, "precision": precision}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_asking_for_cuda_where_there_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"runtime\.device: cuda is not available here; .* set cpu or auto"):
        hardware("cuda", "auto")
    assert hardware("auto", "fp32").device == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_auto_takes_the_gpu_that_is_there() -> None:
    assert hardware("auto", "auto").device.type == hardware("cuda", "fp32").device.type == "cuda"


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_asked_for_is_the_one_of_matrix_products(precision: str, dtype: torch.dtype) -> None:
    chosen = hardware("cpu", precision)
    assert chosen.device == torch.device("cpu")
    assert chosen.precision == precision
    with chosen.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_automatic_precision_is_one_of_the_two() -> None:
    capabilities = torch.cpu.get_capabilities()
    fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    assert hardware("cpu", "auto").bf16 == fast


def test_training_under_bf16_keeps_weights_in_float32() -> None:
    run = Run()
    training = run.training()
    training.hardware = Hardware(torch.device("cpu"), bf16=True)
    dtypes: list[torch.dtype] = []
    run.module[0].register_forward_hook(lambda _module, _inputs, output: dtypes.append(output.dtype))
    training.run()
    assert set(dtypes) == {torch.bfloat16}
    assert {p.dtype for p in run.module.parameters()} == {torch.float32}


def test_set_reproducible_seeds_torch_and_asks_for_deterministic_operations() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    try:
        draws = []
        for seed in (3, 3, 4):
            set_reproducible(seed)
            draws.append(torch.rand(1).item())
        assert draws[0] == draws[1] != draws[2]
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(before)
