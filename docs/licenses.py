"""Write docs/licenses.md: what is installed in the images, and under which licence (`make licenses`).

    .venv-tools/bin/python docs/licenses.py

Licences are those that the locked wheels for Linux state in their metadata; nothing is installed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
IMAGES = ("pipeline-cuda", "serving-cpu", "serving-cuda")
INTRODUCTION = """# Licences of what the images hold

Written by `make licenses` from the metadata of the locked wheels (Linux, x86-64). Change `docs/licenses.py`, not this.

cae-pipe itself is under the Apache License 2.0. It imports these packages and changes no file of them. What follows is
for who passes an image on, be it to a customer or in a public registry; it is a reading by engineers and no legal
advice. The texts that count lie beside each package in `/opt/venv` (`*.dist-info`), and once more, one a package,
in `/opt/licenses.txt`; a few wheels come without. Libraries that a wheel has inside (OpenSSL in pygit2, libjpeg in
Pillow, the Fortran runtime in NumPy) are covered by the texts of that wheel. The base image has licences of its own,
under `/usr/share/doc`.
"""


@dataclass(frozen=True)
class Family:
    """Licences that ask for more than to be passed on with the software."""

    title: str
    pattern: str
    meaning: str


NVIDIA = """Not free software, and who uses it accepts the terms, too. The agreements for CUDA and for cuDNN
(`License.txt` in each wheel) let the runtime libraries be passed on unchanged, as part of an application that adds
something of its own and is all that uses them, under terms consistent with NVIDIA's. They may not be passed on by
themselves, nor be taken apart, nor come under a licence that asks for their source. Read which files may be
distributed (Attachment A of CUDA's agreement, the supplement of cuDNN's) before a CUDA image is passed on. The base
`nvidia/cuda` has an agreement of its own. The image `serving-cpu` holds nothing of NVIDIA's."""
GPL = """Of the Python packages, in the pipeline's image alone, where DVC brings them; the server has none. (Every base
image has programs under the GPL, and the pipeline's adds Git.) pygit2 (libgit2 is inside) is
under version 2 of the GPL with an exception for programs that link to it. grandalf and asyncssh leave the choice of
the Eclipse Public License. Who passes the image on passes these texts on with it, and offers the source of exactly
these versions: keep their source distributions."""
MPL = """Copyleft by file: who passes the image on says where the source of these packages is to be had (PyPI,
unchanged), and publishes what they change in those files. Nothing is asked of the programs that use them."""
NONE = """The metadata names no licence. `cuda-toolkit` holds no files: it only names the packages of NVIDIA that
belong together."""
TEXT_ALONG = """MIT, BSD, Apache, ISC, PSF, Zope and their like, and packages that leave the choice of one of them:
notice and text go along with the software, as they do in the images."""
FAMILIES = (
    Family("NVIDIA", r"NVIDIA", NVIDIA),
    Family("GPL and EPL", r"GPL|EPL", GPL),
    Family("MPL", r"MPL|Mozilla", MPL),
    Family("None stated", r"^not stated$", NONE),
)
PERMISSIVE = Family("Permissive", "", TEXT_ALONG)


@dataclass
class Package:
    licence: str
    versions: set[str] = field(default_factory=set)
    images: set[str] = field(default_factory=set)


def licence_of(metadata: dict[str, Any]) -> str:
    """SPDX expression, or else classifiers where there are several, or else the short form of what is written."""
    written = metadata.get("license", "").strip()
    classifiers = [text.split(" :: ")[-1] for text in metadata.get("classifier", []) if text.startswith("License ::")]
    stated: str = metadata.get("license_expression", "")
    # A field of many lines is the text of the licence.
    is_name = written and "\n" not in written and len(written) < 60
    if not stated and is_name and len(classifiers) < 2:
        stated = written
    return (stated or "; ".join(classifiers) or "not stated").replace(" | ", " OR ")


def family_of(licence: str) -> Family:
    """The family with duties, unless a choice without any is given."""
    choices = [licence] if " AND " in licence else licence.split(" OR ")
    found = [
        next((family for family in FAMILIES if re.search(family.pattern, choice)), PERMISSIVE) for choice in choices
    ]
    return PERMISSIVE if PERMISSIVE in found else found[0]


def metadata_of(lock: Path) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = [
            "--dry-run",
            "--ignore-installed",
            "--no-deps",
            "--require-hashes",
            "--quiet",
            "--report",
            str(report),
        ]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, "-r", str(lock)], check=True)
        return [item["metadata"] for item in json.loads(report.read_text())["install"]]


def table(packages: dict[str, Package]) -> str:
    rows = [f"| package | version | licence | {' | '.join(IMAGES)} |", "|---" * (3 + len(IMAGES)) + "|"]
    for name, package in sorted(packages.items()):
        marks = " | ".join("yes" if image in package.images else "" for image in IMAGES)
        rows.append(f"| {name} | {', '.join(sorted(package.versions))} | {package.licence} | {marks} |")
    return "\n".join(rows)


def main() -> None:
    packages: dict[str, Package] = {}
    for image in IMAGES:
        lock = ROOT / "docker" / f"{image}.lock"
        versions = defaultdict(set)
        for name, version in re.findall(r"^([\w.-]+)==([^\s;\\]+)", lock.read_text(), re.MULTILINE):
            versions[name].add(version)
        for metadata in metadata_of(lock):
            name = canonicalize_name(metadata["name"])
            package = packages.setdefault(name, Package(licence_of(metadata)))
            package.versions |= versions[name]
            package.images.add(image)

    parts = [INTRODUCTION]
    for family in (*FAMILIES, PERMISSIVE):
        members = {name: package for name, package in packages.items() if family_of(package.licence) == family}
        if members:
            parts.append(f"## {family.title}\n\n{family.meaning}\n\n{table(members)}\n")
    (ROOT / "docs/licenses.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
