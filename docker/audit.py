"""Ask the advisory services about every version in every lock (`make audit`).

    .venv-tools/bin/python docker/audit.py [--strict]

pip-audit by itself finds "no known vulnerabilities" where a service knows none of the packages, leaves out what is
locked for another Python than its own, and takes one version of a package at a time: so it is asked from here.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXPLAINED = ROOT / "docker/audit-ignore.txt"
SERVICES = ("pypi", "osv")
Package = tuple[str, str]


@dataclass(frozen=True)
class Finding:
    package: Package
    ids: tuple[str, ...]
    fixed_in: tuple[str, ...]


@dataclass
class Answers:
    """What services said of the packages they know; of the others nothing is known."""

    findings: list[Finding]
    unknown: set[Package]


def locked(locks: list[Path]) -> dict[Package, list[str]]:
    """Each (name, version), and the locks that hold it."""
    holders: dict[Package, list[str]] = defaultdict(list)
    for lock in locks:
        for name, version in re.findall(r"^([\w.-]+)==([^\s;\\]+)", lock.read_text(), re.MULTILINE):
            # The advisories of a version are those of its builds, such as 2.0+cpu.
            holders[name, version.split("+")[0]].append(str(lock.relative_to(ROOT)))
    return dict(holders)


def explanations(text: str) -> dict[str, str]:
    """Id to reason; an id without a reason is an error."""
    reasons = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            advisory, _, reason = line.partition(" ")
            if not reason.strip():
                sys.exit(f"error: {EXPLAINED.name}: {advisory}: expected a reason after the id; add one")
            reasons[advisory] = reason.strip()
    return reasons


def rounds(packages: set[Package]) -> list[list[Package]]:
    """Lists in which every name is once, for pip-audit refuses two versions of one package."""
    by_name: dict[str, list[Package]] = defaultdict(list)
    for package in sorted(packages):
        by_name[package[0]].append(package)
    most = max(map(len, by_name.values()), default=0)
    return [[versions[i] for versions in by_name.values() if i < len(versions)] for i in range(most)]


def ask(service: str, packages: set[Package]) -> Answers:
    answers = Answers([], set())
    for asked in rounds(packages):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
            requirements.write("".join(f"{name}=={version}\n" for name, version in asked))
            requirements.flush()
            options = ["--disable-pip", "--no-deps", "--progress-spinner", "off", "--format", "json", "--desc", "off"]
            command = [sys.executable, "-m", "pip_audit", *options, "-s", service, "-r", requirements.name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.stdout.startswith("{"):
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:160]
            say(f"{service}: no answer: {reason}")
            answers.unknown |= set(asked)
            continue
        versions = dict(asked)
        for entry in json.loads(done.stdout)["dependencies"]:
            package = entry["name"], versions[entry["name"]]
            if "skip_reason" in entry:
                answers.unknown.add(package)
            for found in entry.get("vulns", []):
                ids = (found["id"], *found["aliases"])
                answers.findings.append(Finding(package, ids, tuple(found["fix_versions"])))
    say(f"{service}: knows {len(packages) - len(answers.unknown)} of {len(packages)} versions")
    return answers


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def main(strict: bool) -> int:
    holders = locked([ROOT / "requirements.lock", *sorted((ROOT / "docker").glob("*.lock"))])
    reasons = explanations(EXPLAINED.read_text())
    findings: list[Finding] = []
    unknown = set(holders)
    for service in SERVICES:
        if unknown:
            answers = ask(service, unknown)
            findings += answers.findings
            unknown = answers.unknown

    failed = False
    for finding in findings:
        name, version = finding.package
        reason = next((reasons[advisory] for advisory in finding.ids if advisory in reasons), None)
        failed |= reason is None
        mend = f"fixed in {', '.join(finding.fixed_in)}" if finding.fixed_in else "no fixed version"
        say(f"{name} {version} ({', '.join(holders[finding.package])}): {' '.join(finding.ids)}: {mend}")
        say(f"    explained: {reason}" if reason else f"    renew it, or explain it in {EXPLAINED.name}")
    if unknown:
        say(f"NOT AUDITED: {len(unknown)} of {len(holders)} versions, for no service answered about them")
    found = {advisory for finding in findings for advisory in finding.ids}
    if not unknown:
        for advisory in sorted(reasons.keys() - found):
            say(f"{advisory} is explained in {EXPLAINED.name} and found no more: delete its line")
    if not findings and not unknown:
        say(f"{len(holders)} versions audited: no known vulnerability")
    return int(failed or (strict and bool(unknown)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--strict", action="store_true", help="fail where a version could not be audited")
    sys.exit(main(parser.parse_args().strict))
