"""What a check of `cae-pipe doctor` says."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """A warning may be as it should be, a problem stops a command."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """`check` what was looked at, `text` what was found, `remedy` what to do about it (empty where all is well)."""

    check: str
    status: Status
    text: str
    remedy: str = ""


def ok(check: str, text: str) -> Finding:
    return Finding(check, Status.OK, text)


def warning(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, Status.WARNING, text, remedy)


def problem(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, Status.PROBLEM, text, remedy)
