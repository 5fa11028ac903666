"""The exit codes of `cae-pipe`: the one list that the code, `--help` and docs/operations.md are held against."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ended. A signal that ended it is 128 + its number, as shells have it."""

    DONE = 0
    UNEXPECTED = 1
    USER_ERROR = 2
    PARTIAL = 3
    DIVERGED = 4
    NOT_READY = 5
    DOCTOR = 6


MEANINGS = {
    ExitCode.DONE: "done",
    ExitCode.UNEXPECTED: "a fault in the program; the traceback is in a file",
    ExitCode.USER_ERROR: "something to mend: call, params.yaml, data, bundle, disk, memory",
    ExitCode.PARTIAL: "embed: some images were left out; serve: the port is taken",
    ExitCode.DIVERGED: "a training diverged or collapsed",
    ExitCode.NOT_READY: "something that an earlier command makes is not there yet",
    ExitCode.DOCTOR: "doctor found a problem",
}
# 141 is SIGPIPE: `cae-pipe results | head -1`.
SIGNALS = "128 + signal: stopped (130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1, 141 closed pipe)"


def epilog() -> str:
    """The table for `--help`; the backspace keeps typer from filling its lines."""
    lines = [f"  {code.value}  {text}" for code, text in MEANINGS.items()]
    return "\n".join(["\b", "Exit codes:", *lines, f"  {SIGNALS}"])
