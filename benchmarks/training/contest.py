"""Contenders timed in turn, and what else the benchmark measures of a step: its arithmetic and its memory."""

import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training.contenders import Batch, Step, build
from benchmarks.training.setting import Setting
from cae.errors import UserError

logger = logging.getLogger(__name__)

WARMUP_STEPS = 2
TURN_S = 1.0  # a contender's turn lasts at least as long, or one step
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
MATMUL_REPEATS = 5
TERA = 1e12


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Wall time of one call, over `count` of them, the device waited for before and after."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / count


def interleaved(steps: Mapping[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds a step of every contender in every round; in each round the next one begins."""
    counts = {}
    for name, step in steps.items():
        logger.info("%s: warming up", name)
        seconds_per_call(step, WARMUP_STEPS, device)
        counts[name] = max(1, round(TURN_S / seconds_per_call(step, 1, device)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds):
        logger.info("round %d of %d", number + 1, rounds)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(seconds_per_call(steps[name], counts[name], device))
    return times


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of a large square matrix product, the best of some: what the device reaches, not what it promises."""
    size = MATMUL_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds_per_call(lambda: left @ right, 2, device)
    best = min(seconds_per_call(lambda: left @ right, 2, device) for _ in range(MATMUL_REPEATS))
    return 2 * size**3 / best / TERA


def flops_per_image(name: str, setting: Setting) -> float:
    """FLOP of one step's matrix products and convolutions for one image, forward and backward, attention included."""
    # Without autocast and compiling, which change no arithmetic; attention in parts, which the counter knows.
    plain = replace(setting, precision="fp32", compile=False, batch_size=1)
    step = build(name, Batch.draw(plain))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def peak_memory(name: str, setting: Setting, threads: int) -> int:
    """Bytes that weights, gradients, moments and a step need at most, measured in a fresh process."""
    fields = {**asdict(setting), "device": setting.device.type}
    command = [sys.executable, "-m", "benchmarks.training.memory", name, str(threads), json.dumps(fields)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"--only memory: the process that measures {name} ended with {done.returncode}; expected a figure. "
            f"Its last words: {done.stderr.strip().splitlines()[-1:]}"
        )
    return int(done.stdout.split()[-1])


def speeds(times: Mapping[str, list[float]], batch_size: int) -> dict[str, float]:
    """Images a second, by the median of the rounds."""
    return {name: batch_size / statistics.median(values) for name, values in times.items()}
