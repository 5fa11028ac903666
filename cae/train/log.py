"""What a running training tells: a progress line for people, JSON lines for programs."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

Row = dict[str, float]
QUIET_INTERVAL_S = 20.0


class TrainLog:
    """Progress of one run. Every row goes to `path` as a JSON line and to `sink`.

    Without a terminal the bar is silent and a log line appears every 20 seconds instead. On resume the rows after the
    checkpoint are dropped, for those steps are about to be run again.
    """

    def __init__(
        self, name: str, path: Path, total_steps: int, start_step: int, sink: Callable[[int, Row], None] | None
    ) -> None:
        self.name, self.total_steps, self.sink = name, total_steps, sink
        kept = _rows_before(path, start_step)
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        for row in kept:
            self._to_sink(row)
        self._file = path.open("a", buffering=1)
        self._bar = tqdm(
            total=total_steps, initial=start_step, desc=name, unit="step", disable=None, dynamic_ncols=True
        )
        self._started, self._start_step, self._last_quiet = time.perf_counter(), start_step, 0.0

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def row(self, step: int, values: Row) -> None:
        """Record `values` after `step` steps."""
        row = {"step": step, **values}
        self._file.write(json.dumps(row) + "\n")
        self._to_sink(row)
        shown = {key: f"{value:.4g}" for key, value in values.items()}
        self._bar.set_postfix(shown)
        now = time.perf_counter()
        if self._bar.disable and (now - self._last_quiet > QUIET_INTERVAL_S or step == self.total_steps):
            self._last_quiet = now
            left_s = (now - self._started) / max(1, step - self._start_step) * (self.total_steps - step)
            text = " ".join(f"{key}={value}" for key, value in shown.items())
            logger.info("%s %d/%d eta=%.0fs %s", self.name, step, self.total_steps, left_s, text)

    def close(self) -> None:
        self._bar.close()
        self._file.close()

    def _to_sink(self, row: dict[str, Any]) -> None:
        if self.sink:
            self.sink(int(row["step"]), {key: value for key, value in row.items() if key != "step"})


def _rows_before(path: Path, step: int) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            # The process was killed while it wrote its last line.
            break
    return [row for row in rows if row["step"] <= step]
