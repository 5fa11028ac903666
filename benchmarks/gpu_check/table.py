"""What was found, for people: a table of all outcomes, the largest kernels, and the predictions."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.gpu_check.parts import Outcome
from benchmarks.gpu_check.verdicts import Prediction, held_against

WIDTH = 150  # where the output is no terminal
COLOURS = {"ok": "green", "skipped": "yellow", "missed": "red", "failed": "red", "out of time": "red"}


def console() -> Console:
    """One on stdout that does not break its tables in a log."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH)


def outcomes(found: Iterable[Outcome]) -> Table:
    """A row for each check: what became of it, how long it took, its figures and why it is not as it must be."""
    table = Table("part", "check", "", "s", "figures", title="GPU check")
    table.columns[3].justify = "right"
    for outcome in found:
        colour = COLOURS.get(outcome.status, "default")
        said = "\n".join(filter(None, [outcome.place, outcome.said]))
        cell = "\n".join(filter(None, [escape(words(outcome.figures)), escape(said)]))
        table.add_row(outcome.part, outcome.check, f"[{colour}]{outcome.status}[/]", f"{outcome.seconds:.1f}", cell)
    return table


def lists(found: Sequence[Outcome]) -> list[Table]:
    """A table for each figure that is a list of rows; predictions with what was measured."""
    tables = []
    for outcome in found:
        for name, rows in outcome.figures.items():
            if not is_rows(rows):
                continue
            if name == "predictions":
                rows = held_against([Prediction(**row) for row in rows], found)
            table = Table(*rows[0], title=f"{outcome.part}, {outcome.check}: {name}")
            for row in rows:
                table.add_row(*(escape(_value(value)) for value in row.values()))
            tables.append(table)
    return tables


def words(figures: dict[str, Any]) -> str:
    """Figures that are no lists, on one line."""
    return ", ".join(f"{name} {_value(value)}" for name, value in figures.items() if not is_rows(value))


def is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def summary(found: Sequence[Outcome], seconds: float) -> str:
    """How many of each, and the first that is not as it must be."""
    counts = Counter(outcome.status for outcome in found)
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    bad = next((outcome for outcome in found if not outcome.is_good), None)
    first = f"; first: {bad.part}, {bad.check or 'all of it'}: {bad.said} {bad.place}".rstrip() if bad else ""
    return f"{told} in {seconds:.0f} s{first}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
