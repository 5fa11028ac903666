"""Clones of this repository as it stands, uncommitted changes included."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tiny import ROOT


def clone_repository(folder: Path) -> Path:
    """Clone into `folder`, without a dvc.lock."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a Git checkout, so there is nothing to clone")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    changed = subprocess.run(
        ["git", "ls-files", "--modified", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in changed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        else:
            (folder / name).unlink()
    (folder / "dvc.lock").unlink(missing_ok=True)
    return folder
