"""What arithmetic promised, held against what was measured."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_check.parts import Outcome

TOLERANCE = 0.25  # a measurement this far from its prediction refutes it
NEAR_ZERO = 0.05  # and this far from a prediction of nothing


@dataclass(frozen=True)
class Prediction:
    """One line: what is promised, and the figure of part `fast` that confirms or refutes it."""

    name: str
    value: float
    unit: str
    check: str
    figure: str

    def verdict(self, measured: float | None) -> str:
        """Confirmed where it is within TOLERANCE, else refuted."""
        if measured is None:
            return "not yet measured"
        allowed = max(TOLERANCE * abs(self.value), NEAR_ZERO)
        return "confirmed" if abs(measured - self.value) <= allowed else "refuted"


def held_against(predictions: Sequence[Prediction], found: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Rows of what was promised, what was measured, and the verdict."""
    figures = {outcome.check: outcome.figures for outcome in found if outcome.part == "fast"}
    rows = []
    for line in predictions:
        measured = figures.get(line.check, {}).get(line.figure)
        rows.append(
            {
                "line": line.name,
                "predicted": line.value,
                "measured": "" if measured is None else measured,
                "unit": line.unit,
                "verdict": line.verdict(measured),
            }
        )
    return rows
