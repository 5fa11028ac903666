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
# What people see of a row, in this order, where it has it; the file has everything.
SHOWN: dict[str, Callable[[float], str]] = {
    "images_per_s": lambda value: f"{value:.4g} img/s",
    "data_wait_fraction": lambda value: f"wait {value:.0%}",
    "loss": lambda value: f"loss {value:.4g}",
    "decoding_loss": lambda value: f"decoding {value:.4g}",
    "alignment_loss": lambda value: f"alignment {value:.3g}",
    "reconstruction_loss": lambda value: f"reconstruction {value:.4g}",
    "perplexity": lambda value: f"perplexity {value:.3g}",
    "token_accuracy": lambda value: f"accuracy {value:.1%}",
    "grad_norm": lambda value: f"grad {value:.2g}",
    "peak_memory_mb": lambda value: f"mem {value / 1000:.2f} GB",
    "skipped_steps": lambda value: f"skipped {value:.0f}" if value else "",
}


class TrainLog:
    """Progress of one run. Every row goes to `path` as a JSON line and to `sink`.

    Without a terminal the bar is silent and a log line appears every 20 seconds instead; a process that does not lead
    (`shows` false) tells nothing. On resume the rows after the checkpoint are dropped, for those steps are about to be
    run again.
    """

    def __init__(
        self,
        name: str,
        path: Path | None,
        total_steps: int,
        start_step: int,
        sink: Callable[[int, Row], None] | None,
        shows: bool,
    ) -> None:
        self.name, self.total_steps, self.sink, self.shows = name, total_steps, sink, shows
        kept = _rows_before(path, start_step) if path else []
        for row in kept:
            self._to_sink(row)
        self._file = None
        if path:
            path.write_text("".join(json.dumps(row) + "\n" for row in kept))
            self._file = path.open("a", buffering=1)
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            desc=name,
            unit="step",
            disable=None if shows else True,
            dynamic_ncols=True,
        )
        self._started, self._start_step, self._last_quiet = time.perf_counter(), start_step, 0.0

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def row(self, step: int, values: Row) -> None:
        """Record `values` after `step` steps."""
        row = {"step": step, **values}
        if self._file:
            self._file.write(json.dumps(row) + "\n")
        self._to_sink(row)
        text = progress(values)
        self._bar.set_postfix_str(text)
        now = time.perf_counter()
        due = now - self._last_quiet > QUIET_INTERVAL_S or step == self.total_steps
        if self.shows and self._bar.disable and due:
            self._last_quiet = now
            left_s = (now - self._started) / max(1, step - self._start_step) * (self.total_steps - step)
            logger.info("%s %d/%d eta %s, %s", self.name, step, self.total_steps, tqdm.format_interval(left_s), text)

    def close(self) -> None:
        self._bar.close()
        if self._file:
            self._file.close()

    def _to_sink(self, row: dict[str, Any]) -> None:
        if self.sink:
            self.sink(int(row["step"]), {key: value for key, value in row.items() if key != "step"})


def progress(values: Row) -> str:
    """The figures of a row that people look at."""
    return ", ".join(text for key, show in SHOWN.items() if key in values and (text := show(values[key])))


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
