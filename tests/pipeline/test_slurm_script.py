"""docker/examples/slurm-pretrain.sh as it is; SLURM, DVC and the trainer around it are small scripts."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.tiny import ROOT

PATIENCE_S = 30

# As srun: the command once on every machine, signals handed on, the highest code of all.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
tasks=()
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
    SLURM_NODEID=$node "$@" &
    tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
trap 'kill -TERM "${tasks[@]}"' TERM
highest=0
for task in "${tasks[@]}"; do
    while :; do
        code=0
        wait "$task" || code=$?
        kill -0 "$task" 2>/dev/null || break
    done
    wait "$task" || code=$?
    (( code > highest )) && highest=$code
done
exit $highest
"""

# A trainer that ends at once with $CODE, or works until a signal, and then takes a moment to save.
TRAINER = """#!/usr/bin/env bash
echo "$* $PET_NODE_RANK of $PET_NNODES at $PET_MASTER_ADDR:$PET_MASTER_PORT" > "$FOLDER/trainer-$PET_NODE_RANK"
[ -z "$CODE" ] || exit "$CODE"
trap 'sleep 0.3; touch "$FOLDER/saved-$PET_NODE_RANK"; exit 138' USR1
trap 'sleep 0.3; touch "$FOLDER/saved-$PET_NODE_RANK"; exit 143' TERM
for _ in $(seq 300); do sleep 0.1; done
"""

SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then
    printf 'node7\\nnode8\\n'
else
    echo "scontrol $* with $(ls "$FOLDER" | grep -c saved) saved" >> "$FOLDER/calls"
fi
"""

DVC = """#!/usr/bin/env bash
echo "dvc $*" >> "$FOLDER/calls"
"""


def submit(folder: Path, code: str) -> "subprocess.Popen[str]":
    """The batch script on two machines, with a trainer that ends with `code`, or with none works until a signal."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "cae-pipe": TRAINER, "scontrol": SCONTROL, "dvc": DVC}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    environment = {**os.environ, **slurm, "PATH": f"{programs}:{os.environ['PATH']}", "FOLDER": str(folder)}
    return subprocess.Popen(
        ["bash", str(ROOT / "docker/examples/slurm-pretrain.sh")],
        env={**environment, "CODE": code},
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(job: "subprocess.Popen[str]", folder: Path) -> tuple[int, list[str]]:
    """The job's exit code, and what it asked of SLURM and DVC."""
    _, errors = job.communicate(timeout=PATIENCE_S)
    assert errors == ""
    calls = folder / "calls"
    return job.returncode, calls.read_text().splitlines() if calls.exists() else []


def test_every_machine_knows_its_place_and_dvc_learns_of_the_end(tmp_path: Path) -> None:
    assert outcome(submit(tmp_path, "0"), tmp_path) == (0, ["dvc commit --force pretrain"])
    for machine in (0, 1):
        written = (tmp_path / f"trainer-{machine}").read_text()
        assert written == f"pretrain {machine} of 2 at node7:34567\n"


@pytest.mark.parametrize("code", [1, 2, 4])
def test_a_training_that_failed_is_not_queued_again(tmp_path: Path, code: int) -> None:
    assert outcome(submit(tmp_path, str(code)), tmp_path) == (code, [])


@pytest.mark.parametrize(
    ("number", "code", "calls"),
    [
        (signal.SIGUSR1, 138, ["scontrol requeue 1234567 with 2 saved"]),
        # Preemption, after which SLURM itself puts the job back, or `scancel`, after which nobody wants it back.
        (signal.SIGTERM, 143, []),
    ],
)
def test_before_the_time_is_up_it_saves_and_is_queued_again(
    tmp_path: Path, number: signal.Signals, code: int, calls: list[str]
) -> None:
    job = submit(tmp_path, "")
    deadline = time.monotonic() + PATIENCE_S
    while not all((tmp_path / f"trainer-{machine}").exists() for machine in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # The trainers set their traps after they have written their files.
    time.sleep(0.3)
    job.send_signal(number)
    assert outcome(job, tmp_path) == (code, calls)
    assert all((tmp_path / f"saved-{machine}").exists() for machine in (0, 1))
