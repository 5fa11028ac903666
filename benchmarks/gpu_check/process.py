"""A part of the check in a process of its own: a fault, or the end of the time, costs only what comes after it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.parts import Outcome, Part

ROOT = Path(__file__).parents[2]
POLL_S = 0.05
# Below this no process is started: it would end while it imports.
LEAST_S = 3.0
LAST_LINES, LAST_CHARACTERS = 12, 1500


@dataclass(frozen=True)
class Options:
    """What every part is told."""

    device: str
    dry: bool
    folder: Path
    data: Path | None


def run_part(part: Part, options: Options, limit_s: float, tell: Callable[[Outcome], None]) -> list[Outcome]:
    """The outcome of every check, each also given to `tell` at once.

    A process that dies is started again for the checks after the one that it died in.
    """
    if absent := [name for name in part.needs if not is_there(name)]:
        outcome = Outcome(part.name, "", "skipped", said=without(absent))
        tell(outcome)
        return [outcome]
    outcomes: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        tell(outcome)

    ends_at = time.time() + limit_s
    pending: Sequence[str] | None = None
    while pending is None or pending:
        if ends_at - time.time() < LEAST_S:
            for name in pending or [""]:
                note(Outcome(part.name, name, "not reached", said=f"the {limit_s:.0f} s of this part were over"))
            break
        attempt = _Attempt(part, options, ends_at, [outcome.check for outcome in outcomes])
        pending = attempt.run(note)
    return outcomes


def is_there(package: str) -> bool:
    """Whether a package can be imported, as far as its files tell."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def without(packages: Sequence[str]) -> str:
    """Words for packages that are not there."""
    names = ", ".join(packages)
    return f"not installed: {names}; install it, or name a folder of wheels by WHEELS=DIR (`make gpu-wheels`)"


class _Attempt:
    """One process for the checks of a part that have no outcome yet."""

    def __init__(self, part: Part, options: Options, ends_at: float, done: Sequence[str]) -> None:
        self.part, self.options, self.ends_at, self.done = part, options, ends_at, done
        folder = Path(tempfile.mkdtemp(prefix=f"{part.name}-", dir=options.folder))
        self.records, self.log = folder / "records.jsonl", folder / "log.txt"
        self.records.touch()
        self.folder = folder
        self.plan: list[tuple[str, float | None]] | None = None
        self.running: tuple[str, float] | None = None  # a check, and when it began
        self.told: list[str] = []

    @property
    def environment(self) -> dict[str, str]:
        """Small tensors only lose by threads, above all beside other work."""
        return os.environ | ({"OMP_NUM_THREADS": "1"} if self.options.dry or self.part.is_small else {})

    def run(self, note: Callable[[Outcome], None]) -> list[str]:
        """Note outcomes as they come; the names of the checks that are left, for another process."""
        arguments = json.dumps(
            {
                "device": self.options.device,
                "dry": self.options.dry,
                "folder": str(self.folder),
                "data": str(self.options.data) if self.options.data else None,
                "ends_at": self.ends_at,
                "done": list(self.done),
            }
        )
        command = [sys.executable, "-m", "benchmarks.gpu_check.worker", self.part.module, str(self.records), arguments]
        with self.log.open("wb") as log, self.records.open() as records:
            # A session of its own: at the end of its time it goes with all that it started.
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                cut = self._watch(process, records, note)
            finally:
                _end(process)
            self._read(records, note)
        left = [name for name, _ in self.plan or [] if name not in self.told]
        if self.plan is None:
            said = f"it ended with {process.returncode} before its first check" if cut is None else cut
            note(Outcome(self.part.name, "", "failed", said=f"{said}: {self._last_words()}"))
            return []
        if self.running:
            name, began = self.running
            left = [other for other in left if other != name]
            seconds = time.time() - began
            if cut is None:
                said = f"the process ended with {_how(process.returncode)}: {self._last_words()}"
                note(Outcome(self.part.name, name, "failed", seconds, said=said))
            else:
                note(Outcome(self.part.name, name, "out of time", seconds, said=cut))
        return left

    def _watch(self, process: "subprocess.Popen[bytes]", records: Any, note: Callable[[Outcome], None]) -> str | None:
        """Read records until the process ends (None) or its time, or that of a check, does (words for it)."""
        while process.poll() is None:
            self._read(records, note)
            now = time.time()
            if now > self.ends_at:
                return "the time of this part was over"
            if self.running:
                limit_s = dict(self.plan or []).get(self.running[0])
                if limit_s is not None and now - self.running[1] > limit_s:
                    return f"it took more than its {limit_s:.0f} s"
            time.sleep(POLL_S)
        return None

    def _read(self, records: Any, note: Callable[[Outcome], None]) -> None:
        while True:
            where = records.tell()
            line = records.readline()
            if not line.endswith("\n"):  # nothing, or not yet all of it
                records.seek(where)
                return
            record = json.loads(line)
            if "plan" in record:
                self.plan = [(name, limit_s) for name, limit_s in record["plan"]]
            elif "begins" in record:
                self.running = (record["begins"], record["at"])
            else:
                outcome = Outcome(**record)
                self.running = None
                self.told.append(outcome.check)
                note(outcome)

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return "\n".join(lines[-LAST_LINES:])[-LAST_CHARACTERS:]


def _how(returncode: int) -> str:
    return signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill it and all of its session: also a server or a loader that it left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
