"""Tells during a training when a figure falls where it must not be, and what to change."""

import logging
from dataclasses import dataclass

from cae.train.log import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alarm:
    """A floor under one figure of the log, from a step on: what it means to be below it and what to change."""

    key: str
    floor: float
    from_step: int
    meaning: str
    advice: str


class Watch:
    """Checks every row against the alarms; each sounds once when its figure falls and says when it is well again."""

    def __init__(self, name: str, alarms: tuple[Alarm, ...]) -> None:
        self.name, self.alarms = name, alarms
        self._sounding: set[str] = set()

    def check(self, step: int, row: Row) -> None:
        """Warn where the row after `step` steps crosses a floor."""
        for alarm in self.alarms:
            if step < alarm.from_step:
                continue
            value = row.get(alarm.key)
            if value is None:  # of a step that was left out
                continue
            if value < alarm.floor and alarm.key not in self._sounding:
                self._sounding.add(alarm.key)
                logger.warning(
                    "%s: ALARM at step %d: %s is %.3g, below %.3g: %s. %s",
                    self.name,
                    step,
                    alarm.key,
                    value,
                    alarm.floor,
                    alarm.meaning,
                    alarm.advice,
                )
            elif value >= alarm.floor and alarm.key in self._sounding:
                self._sounding.remove(alarm.key)
                logger.warning("%s: %s is %.3g again after %d steps", self.name, alarm.key, value, step)
