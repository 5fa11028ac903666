"""Packages that are missing here, from a folder of wheels, put where the processes of the check find them."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path


def add(wheels: Path, folder: Path) -> list[str]:
    """Unpack into `folder` the wheels of what is not installed, and put it before all else; return their names.

    Nothing is installed: what is there stays as it is. Raises ValueError where `wheels` holds none, or where one of
    them is for another Python or machine.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise ValueError(f"WHEELS={wheels}: there are no wheels (*.whl); `make gpu-wheels` fills .wheels with them")
    missing = {name_of(file): file for file in files if not _installed(name_of(file))}
    if not missing:
        return []
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-compile", "--target", str(folder), *map(str, missing.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"WHEELS={wheels}: pip cannot unpack them here: {done.stderr.strip()}")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return sorted(missing)


def name_of(wheel: Path) -> str:
    """The distribution's name, normalised."""
    return re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
