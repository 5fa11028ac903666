"""One training on many processes: real launchers with real ranks, which do what tests/pipeline/launched.py says."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cae.config import RuntimeConfig
from cae.errors import UserError
from cae.train.signals import STOP_SIGNALS
from pipeline import launch
from pipeline.launch import Machines
from tests.pipeline.command import environment, is_running
from tests.serving.running_server import free_port
from tests.tiny import ROOT, shipped_params
from tests.waiting import wait_for

# Far more than it takes, and far less than a rank that is never ended.
PATIENCE_S = 60

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a launcher whose two ranks behave as they are told; what is left at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(behaviour: str, **variables: str) -> "subprocess.Popen[str]":
        given = environment(LAUNCHED_FOLDER=str(tmp_path), **variables)
        del given["OMP_NUM_THREADS"]
        command = [sys.executable, str(ROOT / "tests/pipeline/launched.py"), behaviour]
        process = subprocess.Popen(command, env=given, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate(timeout=PATIENCE_S)


def ranks_at_work(folder: Path, number: int = 2) -> list[int]:
    """The process of each rank, once it has heard from the others."""
    files = [folder / f"rank-{rank}" for rank in range(number)]
    wait_for(lambda: all(file.exists() for file in files))
    return [int(file.read_text().split()[0]) for file in files]


def outcome(process: "subprocess.Popen[str]") -> tuple[int, str]:
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in errors
    return process.returncode, errors


def test_ranks_meet_share_the_cores_and_end(start: Start, tmp_path: Path) -> None:
    code, errors = outcome(start("ends"))
    assert (code, errors) == (0, "rank 0 is at work\n")
    threads = max(1, launch.available_cpus() // 2)
    for rank in (0, 1):
        assert (tmp_path / f"rank-{rank}").read_text().split()[1:] == ["3", str(threads)]


def test_a_rank_that_is_killed_stops_the_others_and_is_named(start: Start, tmp_path: Path) -> None:
    launcher = start("adds")
    ranks = ranks_at_work(tmp_path)
    os.kill(ranks[1], signal.SIGKILL)
    code, errors = outcome(launcher)
    assert code == 1
    assert f"rank 1 (process {ranks[1]} on " in errors
    assert "ended by SIGKILL" in errors
    assert "goes on from the last checkpoint" in errors
    # Rank 0 lost it, and that is no fault of the program.
    assert "fault in cae-pipe" not in errors
    assert not any(map(is_running, ranks))


def test_a_rank_that_fails_is_shown_with_its_last_words(start: Start) -> None:
    code, errors = outcome(start("fails"))
    assert code == 1
    assert "RuntimeError: rank 1 is broken" in errors
    assert "failed with code 1" in errors


@pytest.mark.parametrize("behaviour", ["all-refuse", "one-refuses"])
def test_an_error_of_the_user_is_told_once_and_keeps_its_code(start: Start, behaviour: str) -> None:
    code, errors = outcome(start(behaviour))
    assert code == 2
    assert errors.count("error: params.yaml: wrong for") == 1
    assert "checkpoint" not in errors


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_reaches_every_rank_as_it_is_and_all_save(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    launcher = start("waits")
    ranks_at_work(tmp_path)
    launcher.send_signal(number)
    code, errors = outcome(launcher)
    assert (code, errors) == (128 + number, "rank 0 is at work\n")
    for rank in (0, 1):
        assert (tmp_path / f"saved-{rank}").read_text() == str([int(number)])


def test_a_rank_that_does_not_listen_is_killed(start: Start, tmp_path: Path) -> None:
    launcher = start("is-deaf", LAUNCHED_GRACE_S="1")
    ranks = ranks_at_work(tmp_path)
    launcher.send_signal(signal.SIGTERM)
    assert outcome(launcher)[0] == 143
    assert not any(map(is_running, ranks))


def test_ranks_of_a_killed_launcher_save_and_end(start: Start, tmp_path: Path) -> None:
    launcher = start("waits")
    ranks = ranks_at_work(tmp_path)
    launcher.kill()
    wait_for(lambda: not any(map(is_running, ranks)))
    assert (tmp_path / "saved-0").read_text() == (tmp_path / "saved-1").read_text() == "[15]"


def two_machines(port: int) -> list[dict[str, str]]:
    shared = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
    return [{**shared, "PET_NODE_RANK": str(machine)} for machine in (0, 1)]


def test_two_machines_make_one_training_with_rank_0_on_machine_0(start: Start, tmp_path: Path) -> None:
    first, second = (start("adds", **variables) for variables in two_machines(free_port()))
    ranks = ranks_at_work(tmp_path, 4)
    assert (tmp_path / "rank-3").read_text().split()[1] == "10"
    os.kill(ranks[3], signal.SIGKILL)
    (code, errors), (other_code, other_errors) = outcome(first), outcome(second)
    assert (code, other_code) == (1, 1)
    assert "rank 0 is at work" in errors
    assert "rank 2 is at work" in other_errors
    assert f"rank 3 (process {ranks[3]} on " in other_errors
    assert "look at the output of each" in errors


def test_a_machine_that_never_comes_is_missed(start: Start) -> None:
    code, errors = outcome(start("ends", LAUNCHED_TIMEOUT_S="2", **two_machines(free_port())[0]))
    # Not 2, after which the Job of Kubernetes gives up.
    assert code == 1
    assert "machine 0 of 2: the machines did not meet at 127.0.0.1:" in errors


def test_a_port_that_is_taken_is_named(start: Start) -> None:
    with socket.create_server(("", 0)) as taken:
        code, errors = outcome(start("ends", **two_machines(taken.getsockname()[1])[0]))
    assert code == 2
    assert "error: PET_MASTER_PORT: 127.0.0.1:" in errors


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machines]:
    """`Machines.here` under these variables of torchrun, for that number of processes."""

    def make(num_processes: int | str = "auto", **variables: str) -> Machines:
        for name in [name for name in os.environ if name.startswith("PET_")]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        raw = {**shipped_params()["runtime"], "device": "cpu", "num_processes": num_processes}
        return Machines.here(RuntimeConfig(**raw))

    return make


def test_a_laptop_is_one_process(here: Callable[..., Machines]) -> None:
    assert here().is_one_process
    # As an operator of Kubernetes sets them for one pod.
    assert here(PET_NNODES="1", PET_NPROC_PER_NODE="1", PET_NODE_RANK="0").is_one_process


def test_torchruns_variables_go_before_the_parameter(here: Callable[..., Machines]) -> None:
    assert here(2).num_processes == 2
    assert here(2, PET_NPROC_PER_NODE="3").num_processes == 3
    several = here(1, PET_NNODES="4", PET_NODE_RANK="3", PET_MASTER_ADDR="head", PET_MASTER_PORT="1234")
    assert several == Machines(4, 3, 1, "head", 1234)
    assert not several.is_one_process


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"PET_NNODES": "1:4"}, "PET_NNODES: '1:4'"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "head"}, "PET_NODE_RANK: 2 must be below"),
        ({"PET_NNODES": "2"}, "PET_MASTER_ADDR: not set"),
        ({"PET_NPROC_PER_NODE": "0"}, "PET_NPROC_PER_NODE: '0'"),
    ],
)
def test_variables_that_cannot_be_are_named(
    here: Callable[..., Machines], variables: dict[str, str], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        here(**variables)
