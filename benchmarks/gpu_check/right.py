"""Part 2: what the device computes is what a CPU computes, and a training there is safe."""

import copy
import itertools
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_check import resume, workspaces
from benchmarks.gpu_check.machine import tf32
from benchmarks.gpu_check.noise import NoiseFromCpu
from benchmarks.gpu_check.parts import Check, Context, Figures, Result, missed_above, relative_difference
from benchmarks.gpu_check.process import ROOT
from benchmarks.gpu_check.stage_steps import BUILDERS
from cae.data.loader import Batch
from cae.errors import Diverged
from cae.targets.dalle import PUBLISHED_SIZES, DalleSizes, DalleTarget
from cae.targets.files import load_target
from cae.train.device import Hardware, set_reproducible
from cae.train.skipping import SkippedSteps
from cae.train.step import TrainStep
from pipeline import check_machine, dalle, finetune, pretrain, probe, report, tokenizer
from pipeline.workspace import Workspace

NUM_STEPS = 20
FIRST_STEP, LAST_STEP = 1e-4, 0.02  # relative differences to the CPU at most
SMALL_DALLE = DalleSizes(vocab_size=32, hidden_width=8, code_width=4, num_res_blocks=1)
CPU = torch.device("cpu")
RESUME_TIMEOUT_S = 60


def first_steps(stage: str, values: dict[str, Any], context: Context) -> Result:
    """Loss and gradient norm of a stage's first step, and the loss after NUM_STEPS, beside the CPU's.

    The same weights, batches and noise; the device with TF32 off, then as it is shipped, then in bf16.
    """
    workspace = _tiny(context, **values)
    with tf32(False):
        expected = _steps(stage, workspace, Hardware(CPU, False), NUM_STEPS)
        got = _steps(stage, workspace, Hardware(context.device, False), NUM_STEPS)
    (shipped,), (bf16,) = (_steps(stage, workspace, Hardware(context.device, bf16), 1) for bf16 in (False, True))
    first = {name: relative_difference(got[0][name], expected[0][name]) for name in ("loss", "grad_norm")}
    last = {"loss": relative_difference(got[-1]["loss"], expected[-1]["loss"])}
    figures: Figures = {
        "loss": got[0]["loss"],
        "loss_difference": first["loss"],
        "grad_norm_difference": first["grad_norm"],
        f"loss_difference_after_{NUM_STEPS}_steps": last["loss"],
        "as_shipped_loss_difference": relative_difference(shipped["loss"], expected[0]["loss"]),
        "bf16_loss_difference": relative_difference(bf16["loss"], expected[0]["loss"]),
    }
    missed = missed_above(FIRST_STEP, first, "first step differs from the CPU's by")
    return Result(figures, missed + missed_above(LAST_STEP, last, f"after {NUM_STEPS} steps it differs by"))


def _steps(stage: str, workspace: Workspace, hardware: Hardware, count: int) -> list[dict[str, float]]:
    """Loss and gradient norm of the first steps; the noise is a CPU's."""
    found = []
    set_reproducible(workspace.params.seed)
    with NoiseFromCpu():
        training = BUILDERS[stage](workspace, hardware)
        step = training.train_step(SkippedSteps(stage, hardware.device, 1, None, None))
        training.module.train()
        for number, batch in enumerate(itertools.islice(training.batches(0), count)):
            values = step([batch], number).values
            found.append({name: float(values[name]) for name in ("loss", "grad_norm")})
    return found


def _tiny(context: Context, **values: Any) -> Workspace:
    """A tiny workspace with these parameters, and a target and weights at random."""
    workspace = _prepared(context, **values)
    workspaces.put_target(workspace, SMALL_DALLE)
    workspaces.put_weights(workspace)
    return workspace


def _prepared(context: Context, **values: Any) -> Workspace:
    """A tiny workspace with prepared images alone; all of a process share them."""
    before = context.kept.setdefault("workspaces", [])
    folder = context.folder / f"workspace-{len(before)}"
    before.append(workspaces.tiny(folder, before[0].root / "data" if before else None, **values))
    workspace: Workspace = before[-1]
    return workspace


def conformance(context: Context) -> Result:
    """The forward pass beside the official code's numbers, as the tests do it on a CPU."""
    from tests import dalle_files, official

    with tf32(False):
        found = {
            f"{name} {key}": value
            for name, case in official.CASES.items()
            for key, value in official.differences(case, context.device).items()
        }
        found |= {f"dalle {key}": value for key, value in dalle_files.official_differences(context.device).items()}
    missed = missed_above(official.TOLERANCE, found, "differs from the official code by")
    return Result({"largest_difference": max(found.values()), "num_compared": len(found)}, missed)


def resumed(context: Context) -> Result:
    """A pretraining killed by SIGKILL goes on from its checkpoint and ends with the weights of one that was not."""
    workspace = _tiny(context)
    command = [sys.executable, "-m", "benchmarks.gpu_check.resume", str(workspace.root), context.device.type]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RESUME_TIMEOUT_S, check=False)
    if killed.returncode != -9:
        raise RuntimeError(f"the training to be killed ended with {killed.returncode}: {killed.stderr[-500:]}")
    folder = workspace.root / resume.KILLED
    start = resume.steps_saved(folder)
    resumed_weights = resume.train(workspace, context.device, folder)
    expected = resume.train(workspace, context.device, workspace.root / "whole")
    difference = max(float((resumed_weights[name] - expected[name]).abs().max()) for name in expected)
    missed = [f"after a resume the weights differ by {difference:.2e}; expected the same bits"] if difference else []
    if not 0 < start < resume.KILL_AT:
        missed.append(f"it went on from step {start}; expected a checkpoint before step {resume.KILL_AT}")
    return Result({"resumed_from_step": start, "largest_weight_difference": difference}, missed)


def skipped_step(context: Context) -> Result:
    """The fused AdamW leaves weights and moments as they are where the gradient is no number, and goes on after."""
    torch.manual_seed(0)
    module = nn.Linear(8, 8).to(context.device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)

    def loss(batch: Batch, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return module(batch["images"]).square().mean(), {}

    limit = 1
    skipped = SkippedSteps("gpu_check", context.device, limit, None, None)
    hardware = Hardware(context.device, False)
    step = TrainStep(
        module, loss, optimizer, _NoSchedule(), hardware, clip_grad=1.0, accumulate=1, seed=0, skipped=skipped
    )
    good: Batch = {"images": torch.ones(4, 8), "labels": torch.zeros(4)}
    poisoned: Batch = {**good, "images": torch.full((4, 8), torch.inf)}
    states = [_state(module, optimizer)]
    for number, batch in enumerate((good, poisoned, good, poisoned, poisoned, good)):
        result = step([batch], number)
        skipped.note(number + 1, result.bad, None)
        states.append(_state(module, optimizer))
    changes = [_changed(before, after) for before, after in itertools.pairwise(states)]
    # After more than `limit` in a row nothing is updated any more, however good the step.
    expected = [True, False, True, False, False, False]
    try:
        skipped.check()
        stopped = False
    except Diverged:
        stopped = True
    missed = [] if changes == expected else [f"steps that changed something: {changes}; expected {expected}"]
    missed += [] if stopped else ["two bad steps in a row did not stop the training, which allows one"]
    return Result({"skipped_steps": float(skipped.total), "stopped": stopped}, missed)


class _NoSchedule:
    def step_update(self, step: int) -> None: ...


def _state(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return copy.deepcopy([*(p.detach() for p in module.parameters()), *moments])


def _changed(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) != len(after) or any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def pinned_loader(context: Context) -> Result:
    """Batches of loader processes are pinned for a GPU, and arrive there as they are."""
    workspace = _tiny(context, runtime__num_workers=2)
    training = BUILDERS["pretrain"](workspace, Hardware(context.device, False))
    on_cpu = BUILDERS["pretrain"](workspace, Hardware(CPU, False))
    num_batches, wrong, pinned = 0, 0, True
    for batch, expected in itertools.islice(zip(training.batches(0), on_cpu.batches(0), strict=True), 4):
        moved = {key: value.to(context.device, non_blocking=True) for key, value in batch.items()}
        wrong += sum(not torch.equal(moved[key].cpu(), expected[key]) for key in expected)
        pinned &= all(value.is_pinned() for value in batch.values())
        num_batches += 1
    missed = [f"{wrong} tensors differ from those of a CPU's loader"] if wrong else []
    if context.device.type == "cuda" and not pinned:
        missed.append("the loader's batches are not pinned")
    return Result({"num_batches": num_batches, "pinned": pinned and context.device.type == "cuda"}, missed)


def dalle_tokens(context: Context) -> Result:
    """DALL-E's tokenizer (weights at random, full size) in float32, bf16 and fp16: speed, and tokens as in float32."""
    workspace = _prepared(
        context,
        tokenizer__kind="dalle",
        model__image_size=context.size(224, 32),
        model__patch_size=16,
        runtime__precision="auto",
    )
    workspaces.put_target(workspace, context.size(PUBLISHED_SIZES, SMALL_DALLE))
    target = load_target(workspace.target).to(context.device)
    assert isinstance(target, DalleTarget)
    trials = dalle.trials(workspace, target)
    chosen = dalle.choose(trials)
    rows = [trial._asdict() for trial in trials]
    return Result({"chosen": f"{chosen.dtype}, {'last' if chosen.channels_last else 'first'}", "trials": rows})


STAGES: dict[str, Callable[[Workspace], None]] = {
    "tokenizer": tokenizer.run,
    "pretrain": pretrain.run,
    "finetune": finetune.run,
    "probe_linear": partial(probe.run, name="linear"),
    "probe_attentive": partial(probe.run, name="attentive"),
    "probe_knn": partial(probe.run, name="knn"),
    "report": report.run,
}


def stages(context: Context) -> Result:
    """Every stage but `export` (part 5 has it), whole, one after the other, in the shipped precision."""
    values = {"runtime__precision": "auto", "probe__cache_features": True}
    workspace = _prepared(context, runtime__device=context.device.type, **values)
    for run in STAGES.values():
        run(workspace)
    metrics = {name: workspace.read_metrics(name) or {} for name in STAGES}
    figures = {
        "token_loss": metrics["pretrain"]["decoding_loss"],
        "finetune_top1": metrics["finetune"]["top1"],
        "linear_top1": metrics["probe_linear"]["top1"],
        "knn_top1": metrics["probe_knn"]["top1"],
        "doctor": "; ".join(finding.text for finding in check_machine.gpu(workspace)),
    }
    return Result(figures)


CHECKS = (
    Check("tokenizer", partial(first_steps, "tokenizer", {})),
    Check("pretrain, d-VAE", partial(first_steps, "pretrain", {})),
    Check("pretrain, pixels", partial(first_steps, "pretrain", {"tokenizer__kind": "pixels"})),
    Check("pretrain, DALL-E", partial(first_steps, "pretrain", {"tokenizer__kind": "dalle"})),
    Check("finetune", partial(first_steps, "finetune", {})),
    Check("linear probe", partial(first_steps, "probe_linear", {})),
    Check("attentive probe", partial(first_steps, "probe_attentive", {})),
    Check("official numbers", conformance),
    Check("non-finite step", skipped_step),
    Check("pinned loader", pinned_loader),
    Check("DALL-E tokens", dalle_tokens),
    Check("resume after a kill", resumed),
    Check("every stage", stages),
)
