"""Measure and test everything that only a GPU can show, in at most eight minutes (`make gpu-check`).

Needs torch and a checkout; what else is missing is named, or comes from a folder of wheels (WHEELS=DIR, which
`make gpu-wheels` fills).
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import process, wheels
from benchmarks.gpu_check.parts import PARTS, TOTAL_S, Outcome

DEFAULT_OUT = process.ROOT / "scratch/gpu-check.json"
WRONG_USE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where anything is not as it must be, 2 where nothing could be run."""
    given = _parser().parse_args(arguments)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        try:
            _prepare(given, Path(folder))
        except ValueError as error:
            sys.stderr.write(f"gpu_check: {error}\n")
            return WRONG_USE
        options = process.Options("cpu" if given.dry else "cuda", given.dry, Path(folder), given.data)
        found = _run(options, given.only or [part.name for part in PARTS], started, given.out)
    seconds = time.monotonic() - started
    _write(given.out, found, seconds)
    _show(found, seconds)
    sys.stdout.write(f"all figures: {given.out}\n")
    return int(not all(outcome.is_good for outcome in found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="run every part on the CPU, with tiny sizes")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", choices=names, action="append", help="run this part; may be given again")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="Parquet file with `image` and `label` to pretrain on in the last part (default: 5,000 digits)",
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="JSON file for all figures (default: %(default)s)"
    )
    return parser


def _prepare(given: argparse.Namespace, folder: Path) -> None:
    """Wheels, and what would only be found out after minutes. Raises ValueError."""
    given.out = given.out.absolute()
    if given.out == DEFAULT_OUT:
        given.out.parent.mkdir(exist_ok=True)
    if not given.out.parent.is_dir():
        raise ValueError(f"--out: the folder {given.out.parent} does not exist; make it first, or name another")
    if given.data:
        given.data = given.data.absolute()
        if not given.data.is_file():
            raise ValueError(
                f"--data: {given.data} does not exist; expected a Parquet file with the columns image and label"
            )
    if source := os.environ.get("WHEELS"):
        added = wheels.add(Path(source), folder / "wheels")
        sys.stdout.write(f"from {source}: {', '.join(added) or 'nothing, all of it is installed'}\n")
    if not process.is_there("torch"):
        raise ValueError(f"{sys.executable} has no torch; `make env` makes an environment that has, .venv")
    import torch

    if not given.dry and not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} sees no GPU here; --dry runs every part on the CPU, tiny")


def _run(options: process.Options, names: Sequence[str], started: float, out: Path) -> list[Outcome]:
    found: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        found.append(outcome)
        _write(out, found, time.monotonic() - started)
        line = f"[{time.monotonic() - started:4.0f} s] {outcome.part}, {outcome.check or 'all of it'}: {outcome.status}"
        sys.stdout.write(f"{line} {outcome.place} {outcome.said}".rstrip() + "\n")
        sys.stdout.flush()

    for part in PARTS:
        if part.name in names:
            left_s = TOTAL_S - (time.monotonic() - started)
            process.run_part(part, options, min(part.limit_s or left_s, left_s), tell)
    return found


def _write(out: Path, found: Sequence[Outcome], seconds: float) -> None:
    """After every check, so that whatever ends the run leaves what it had found."""
    content = {"seconds": seconds, "outcomes": [_clean(asdict(outcome)) for outcome in found]}
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    partial.replace(out)


def _clean(value: Any) -> Any:
    """As JSON can hold it: numbers that are none as words."""
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _show(found: Sequence[Outcome], seconds: float) -> None:
    try:
        from benchmarks.gpu_check import table
    except ImportError:  # without rich the lines that were told, and the JSON, must do
        return
    console = table.console()
    for item in (table.outcomes(found), *table.lists(found)):
        console.print(item)
    console.print(table.summary(found, seconds), markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
