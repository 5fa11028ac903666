"""The process of one part: `python -m benchmarks.gpu_check.worker MODULE RECORDS ARGUMENTS`, started by `process`.

It writes a JSON line for its plan, for the beginning and for the outcome of every check.
"""

import importlib
import json
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.parts import Check, Context, Outcome, Result, Skip
from benchmarks.gpu_check.process import ROOT, is_there, without

FIRST_LINES, LAST_LINES = 2, 3
# After such an error nothing more runs on the GPU in this process; another one takes over.
LOST_GPU = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "device-side assert")
EXIT_LOST_GPU = 70


def main(module: str, records: str, arguments: str) -> None:
    given = json.loads(arguments)
    context = Context(
        device_type=given["device"],
        dry=given["dry"],
        folder=Path(given["folder"]),
        data=Path(given["data"]) if given["data"] else None,
        ends_at=given["ends_at"],
    )
    checks: Sequence[Check] = importlib.import_module(module).CHECKS
    checks = [check for check in checks if check.name not in given["done"]]
    with Path(records).open("a", buffering=1) as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")

        write({"plan": [(check.name, check.limit_s) for check in checks]})
        for check in checks:
            write({"begins": check.name, "at": time.time()})
            outcome = attempt(module.rpartition(".")[2], check, context)
            write(asdict(outcome))
            if outcome.status == "failed" and any(words in outcome.said for words in LOST_GPU):
                sys.exit(EXIT_LOST_GPU)


def attempt(part: str, check: Check, context: Context) -> Outcome:
    """Run one check, whatever it raises."""
    started = time.perf_counter()

    def outcome(**values: Any) -> Outcome:
        return Outcome(part, check.name, seconds=time.perf_counter() - started, **values)

    if absent := [package for package in check.needs if not is_there(package)]:
        return outcome(status="skipped", said=without(absent))
    try:
        result: Result = check.run(context)
    except Skip as reason:
        return outcome(status="skipped", said=str(reason))
    except Exception as error:
        traceback.print_exc()  # for the log of this process
        return outcome(status="failed", said=shortened(f"{type(error).__name__}: {error}"), place=place_of(error))
    said = "; ".join(result.missed)
    return outcome(status="missed" if result.missed else "ok", figures=result.figures, said=said)


def shortened(text: str) -> str:
    """The first and the last lines of a long text."""
    lines = text.splitlines()
    if len(lines) <= FIRST_LINES + LAST_LINES:
        return text
    return "\n".join([*lines[:FIRST_LINES], "[...]", *lines[-LAST_LINES:]])


def place_of(error: BaseException) -> str:
    """file:line of the innermost call that is the project's own."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
    return f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else ""


if __name__ == "__main__":
    main(*sys.argv[1:])
