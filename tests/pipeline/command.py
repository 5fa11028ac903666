"""The real `cae-pipe` in a process of its own, with the code under test."""

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny import ROOT

PROGRAM = str(Path(sys.executable).with_name("cae-pipe"))


def environment(**variables: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CAE_")}
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def cae_pipe(*arguments: str, cwd: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [PROGRAM, *arguments], cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=300
    )


def is_running(process: int) -> bool:
    """Whether it is there and no zombie, which a container without an init keeps."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
