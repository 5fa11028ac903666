"""A disk that is full while a checkpoint is written: the one before stays good, and the error says what is needed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT

# Each checkpoint of tests.cae.shared_training has 390 KB: two fit, and the one being written beside them does not.
SIZE = "1000k"
# The mount is seen by these commands alone and ends with them.
SCRIPT = """
set -e
mount -t tmpfs -o size={size} tmpfs {folder}
{command} && exit 99
ls {folder}/checkpoints
cp -r {folder} {kept}
"""


def run(folder: Path, kept: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    command = f"{sys.executable} -m tests.cae.shared_training {folder} ddp 1 -1"
    script = SCRIPT.format(size=SIZE, folder=folder, kept=kept, command=command)
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
        timeout=120,
    )


@pytest.mark.skipif(not shutil.which("unshare"), reason="no `unshare` here to mount a small tmpfs with")
def test_a_full_disk_stops_the_run_and_the_checkpoint_before_is_good(tmp_path: Path) -> None:
    ended = run(tmp_path / "small", tmp_path / "kept")
    if "mount" in ended.stderr and "Traceback" not in ended.stderr:
        pytest.skip(f"a tmpfs cannot be mounted here: {ended.stderr.strip()}")
    assert ended.returncode == 0, ended.stderr
    assert "No space left on device" in ended.stderr
    message = ended.stderr.strip().splitlines()[-1]
    assert "step-000000030.pt: the checkpoint could not be written" in message
    assert "it needs 0.4 MB and 0.2 MB are free. step-000000020" in message
    assert [name[:14] for name in ended.stdout.split()] == ["step-000000010", "step-000000020"]

    # There is room again, and it goes on.
    again = subprocess.run(
        [sys.executable, "-m", "tests.cae.shared_training", str(tmp_path / "kept"), "ddp", "1", "-1"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
        timeout=120,
    )
    assert (tmp_path / "kept/weights.pt").exists(), again.stderr
