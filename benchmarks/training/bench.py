"""One run of the benchmark: every part that was asked for, the JSON, and the table."""

import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.training import alone, contenders, contest, loading
from benchmarks.training.alone import Contender
from benchmarks.training.setting import Setting, machine
from cae.errors import UserError

logger = logging.getLogger(__name__)

PARTS = ("step", "memory", "loader")
MIB, GIGA, MS = 2**20, 1e9, 1000


def run(setting: Setting, rounds: int, threads: int | None, parts: Sequence[str], out: Path | None) -> dict[str, Any]:
    """Measure, write `out`, print the table; return what was written.

    Raises UserError for a folder that is not there before anything is measured.
    """
    if out and not out.parent.is_dir():
        raise UserError(f"--out: the folder {out.parent} does not exist; make it first, or name another")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        result = measure(setting, rounds, parts)
    finally:
        torch.set_num_threads(before)
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    return result


def measure(setting: Setting, rounds: int, parts: Sequence[str]) -> dict[str, Any]:
    """All figures, as the JSON holds them. Ratios are those of `cae` to each."""
    left_out = contenders.left_out(tuple(contenders.BUILDERS))
    for name, reason in left_out.items():
        logger.warning("%s is left out: %s", name, reason)
    names = [name for name in contenders.BUILDERS if name not in left_out]
    result: dict[str, Any] = {
        "setting": setting.as_dict(),
        "machine": machine(setting.device),
        "precision_of": {name: _precision(name, setting) for name in names},
        "left_out": left_out,
    }
    if "step" in parts or "memory" in parts:
        with ExitStack() as stack:
            running = []
            for name in names:
                logger.info("%s: warming up", name)
                running.append(stack.enter_context(alone.started(name, setting, torch.get_num_threads())))
            if "step" in parts:
                result |= _steps(setting, running, rounds)
            if "memory" in parts:
                result |= _memory(setting, running)
    if "loader" in parts:
        logger.info("loader")
        result["data"] = loading.measure(setting)
    return result


def _steps(setting: Setting, running: Sequence[Contender], rounds: int) -> dict[str, Any]:
    names = [contender.name for contender in running]
    times = contest.interleaved(running, rounds)
    speeds = contest.speeds(times, setting.batch_size)
    flops = {name: contest.flops_per_image(name, setting) for name in names}
    # Plain does what ours does; its second embedding of the patches is no use to anyone.
    flops["plain"] = flops["cae"]
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    rates = {
        precision: contest.matmul_tflops(setting.device, types[precision])
        for precision in sorted({_precision(name, setting) for name in names})
    }
    return {
        "images_per_s": speeds,
        "ratio": {name: speeds["cae"] / speed for name, speed in speeds.items()},
        "step_s": times,
        "gflop_per_image": {name: value / GIGA for name, value in flops.items()},
        "matmul_tflops": rates,
        "share_of_matmul_rate": {
            name: speeds[name] * flops[name] / (contest.TERA * rates[_precision(name, setting)]) for name in names
        },
    }


def _memory(setting: Setting, running: Sequence[Contender]) -> dict[str, Any]:
    counted = (
        "most that torch allocated from before the model was built to the end of the third step"
        if setting.device.type == "cuda"
        else "peak of resident memory to the end of the third step, less what was resident before the model was built"
    )
    peaks = {contender.name: contender.peak_bytes for contender in running}
    return {
        "peak_memory_bytes": peaks,
        "peak_memory_ratio": {name: peaks["cae"] / peak for name, peak in peaks.items()},
        "peak_memory_counts": f"weights, gradients, moments and activations: {counted}",
    }


def _precision(name: str, setting: Setting) -> str:
    return "fp32" if name == "plain" else setting.precision


def show(result: dict[str, Any]) -> None:
    """Print one table, and the loader's figures below it."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "120")))
    setting = result["setting"]
    title = (
        f"{setting['model']}, {setting['image_size_px']} px, batch {setting['batch_size']}, {setting['device']}, "
        f"{result['machine']['threads']} threads"
    )
    table = Table(
        "", "precision", "images/s", "cae is … times", "of the matmul rate", "peak MiB", "cae's / its", title=title
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, precision in result["precision_of"].items():
        table.add_row(
            contenders.MEANINGS[name],
            precision,
            _cell(result, "images_per_s", name, "{:.2f}"),
            _cell(result, "ratio", name, "{:.2f}"),
            _cell(result, "share_of_matmul_rate", name, "{:.0%}"),
            _cell(result, "peak_memory_bytes", name, "{:,.0f}", MIB),
            _cell(result, "peak_memory_ratio", name, "{:.2f}"),
        )
    if "images_per_s" in result or "peak_memory_bytes" in result:
        console.print(table)
    for name, reason in result["left_out"].items():
        console.print(f"{name} is left out: {reason}", markup=False, highlight=False)
    if data := result.get("data"):
        console.print(
            f"Loader alone ({data['workers']} workers, JPEG): {data['loader_alone_images_per_s']:.1f} images/s; our "
            f"step fed by it: {data['step_with_loader_images_per_s']:.2f} images/s, {data['data_wait_fraction']:.1%} "
            "of the time waiting for data.",
            markup=False,
            highlight=False,
        )
        parts = data["one_core_ms_per_image"]
        told = ", ".join(f"{name} {milliseconds:.2f}" for name, milliseconds in parts.items())
        console.print(f"An image on one core, in ms: {told}; {MS / sum(parts.values()):.0f} images/s.", highlight=False)


def _cell(result: dict[str, Any], key: str, name: str, style: str, unit: float = 1) -> str:
    return style.format(result[key][name] / unit) if key in result else "-"
