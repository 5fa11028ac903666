"""Contenders timed in turn, and their arithmetic beside what the device can do."""

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training.alone import Contender
from benchmarks.training.contenders import Batch, build
from benchmarks.training.setting import Setting
from benchmarks.training.timing import seconds_per_call

logger = logging.getLogger(__name__)

TURN_S = 1.0  # a contender's turn lasts at least as long, or one step
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
MATMUL_REPEATS = 5
TERA = 1e12


def interleaved(contenders: Sequence[Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds a step of every contender in every round; in each round the next one begins."""
    counts = [max(1, round(TURN_S / contender.seconds_per_step(1))) for contender in contenders]
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    turns = list(zip(contenders, counts, strict=True))
    for number in range(rounds):
        logger.info("round %d of %d", number + 1, rounds)
        first = number % len(turns)
        for contender, count in turns[first:] + turns[:first]:
            times[contender.name].append(contender.seconds_per_step(count))
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
    return flops(build(name, Batch.draw(plain)))


def flops(step: Callable[[], object]) -> float:
    """FLOP of the matrix products and convolutions of a step, forward and backward, attention included."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def speeds(times: Mapping[str, list[float]], batch_size: int) -> dict[str, float]:
    """Images a second, by the median of the rounds."""
    return {name: batch_size / statistics.median(values) for name, values in times.items()}
