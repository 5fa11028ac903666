"""Steps whose loss or gradient is no number: left out, counted, and at most so many in a row."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cae.errors import Diverged

logger = logging.getLogger(__name__)

KeysOf = Callable[[Tensor], list[str]]
"""Positions [b] of images to the keys that say where they came from."""


class SkippedSteps:
    """Decides on the device which updates are left out; the host reads it when it reads the losses.

    After more than `limit` bad steps in a row nothing is updated any more, so that the weights are still those of the
    last good step when the host comes to know.
    """

    def __init__(
        self, name: str, device: torch.device, limit: int, record: Path | None, keys_of: KeysOf | None
    ) -> None:
        self.name, self.limit, self.record, self.keys_of = name, limit, record, keys_of
        self.in_a_row = torch.zeros((), device=device)
        self.total = torch.zeros((), device=device)
        self.stopped = torch.zeros((), device=device)
        self._unread: list[tuple[int, Tensor, Tensor | None]] = []

    def update(self, bad: Tensor) -> Tensor:
        """Count a step that is bad (1) or good (0); 1 where its update is to be left out."""
        self.in_a_row = (self.in_a_row + bad) * bad
        self.stopped = torch.maximum(self.stopped, (self.in_a_row > self.limit).float())
        skip = torch.maximum(bad, self.stopped)
        self.total = self.total + skip
        return skip

    def note(self, step: int, bad: Tensor, positions: Tensor | None) -> None:
        """Keep for `check` what step number `step` (from 1) was made of."""
        self._unread.append((step, bad, positions))

    def check(self) -> None:
        """Read the steps since the last call: warn of each that was left out, and write down its images.

        Raises Diverged when there were too many in a row.
        """
        if not self._unread:
            return
        flags = torch.stack([bad for _, bad, _ in self._unread]).tolist()
        for (step, _, positions), flag in zip(self._unread, flags, strict=True):
            if flag:
                self._tell(step, positions)
        self._unread.clear()
        if bool(self.stopped):
            where = f"; {self.record} names the images" if self.record and self.record.exists() else ""
            raise Diverged(
                f"{self.name}: the loss or the gradient was no number in {self.limit + 1} steps in a row, more than "
                f"runtime.max_skipped_steps {self.limit}{where}. The last checkpoint is from before them. "
                "Take the images out, lower the learning rate, lengthen the warm-up, or set runtime.precision to fp32, "
                "then run again (with --force it goes on from that checkpoint)"
            )

    def _tell(self, step: int, positions: Tensor | None) -> None:
        logger.warning("%s: step %d is left out: its loss or gradient is no number", self.name, step)
        if self.record and self.keys_of and positions is not None:
            with self.record.open("a") as file:
                file.write(json.dumps({"step": step, "keys": self.keys_of(positions)}) + "\n")
