"""`cae-pipe doctor`: everything that a run needs, looked at before it is missed."""

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import check_machine, check_project
from pipeline.findings import Finding, Status, problem
from pipeline.workspace import Workspace

Check = Callable[[Workspace], Iterable[Finding]]

ANYWHERE: tuple[Check, ...] = (
    check_machine.versions,
    check_machine.torch_pair,
    check_machine.processor,
    check_machine.gpu,
    check_machine.disk,
    check_machine.port,
    check_project.checkout,
    check_project.bundle,
)
IN_A_CHECKOUT: tuple[Check, ...] = (
    check_project.parameters,
    check_machine.shared_memory,
    check_project.source,
    check_project.prepared,
    check_project.dvc,
)
STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.PROBLEM: "bold red"}


def run(*, as_json: bool) -> bool:
    """Make every check in the current folder and print what was found; whether there is a problem."""
    workspace = Workspace(Path.cwd(), Path("params.yaml"))
    # What a check calls may log; the findings say it.
    logging.disable(logging.WARNING)
    checks = (*ANYWHERE, *IN_A_CHECKOUT) if check_project.in_checkout(workspace) else ANYWHERE
    with Console(stderr=True).status("looking …"):
        findings = [finding for check in checks for finding in examine(check, workspace)]
    if as_json:
        sys.stdout.write(json.dumps(_as_json(findings), indent=2) + "\n")
    else:
        _print(findings)
    return any(finding.status is Status.PROBLEM for finding in findings)


def examine(check: Check, workspace: Workspace) -> Iterator[Finding]:
    """What a check finds; a check that fails is a problem of its own and ends no other."""
    name = getattr(check, "__name__", "check").replace("_", " ")
    try:
        yield from check(workspace)
    except Exception as error:
        yield problem(
            name, f"the check failed: {type(error).__name__}: {error}", "report this line with the command's output"
        )


def _print(findings: list[Finding]) -> None:
    console = Console()
    table = Table("check", "", "found", title="cae-pipe doctor")
    for finding in findings:
        remedy = f"\n→ {finding.remedy}" if finding.remedy else ""
        style = STYLES[finding.status]
        table.add_row(finding.check, f"[{style}]{finding.status}[/]", Text(finding.text + remedy))
    console.print(table)
    counts = {status: sum(finding.status is status for finding in findings) for status in Status}
    console.print(f"{counts[Status.PROBLEM]} problems, {counts[Status.WARNING]} warnings, {counts[Status.OK]} ok")


def _as_json(findings: list[Finding]) -> dict[str, object]:
    return {
        "version": version("cae-pipe"),
        "problems": sum(finding.status is Status.PROBLEM for finding in findings),
        "warnings": sum(finding.status is Status.WARNING for finding in findings),
        "checks": [{"check": f.check, "status": f.status.value, "found": f.text, "remedy": f.remedy} for f in findings],
    }
