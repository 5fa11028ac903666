"""One training on many processes: starts the ranks of this machine, stops them together, and says which one failed.

The ranks run under torch's own elastic agent, as `torchrun` starts them, and find RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT in their environment. The agent restarts nothing: the next start goes on from the last
checkpoint.
"""

import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cae.config import RuntimeConfig
from cae.errors import UserError, signal_name
from cae.train.signals import STOP_SIGNALS
from pipeline.exit_codes import ExitCode
from serving.machine import available_cpus

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

logger = logging.getLogger(__name__)

# From the signal until a rank is killed: it finishes its step and saves.
GRACE_S = 30
# Machines of one training start at different times: queues, pulls of an image.
MACHINES_TIMEOUT_S = 900
DEFAULT_PORT = 29500  # torchrun's
# Ranks that lose a peer fail within moments; one that ends later was ended by the agent.
FALLOUT_S = 5
TAIL_LINES = 30


@dataclass(frozen=True)
class Machines:
    """How the processes of one training lie on machines, as this machine sees it; machine 0 holds rank 0."""

    num_machines: int
    machine: int
    num_processes: int  # here
    address: str  # of machine 0
    port: int

    @classmethod
    def here(cls, runtime: RuntimeConfig) -> Self:
        """By `runtime.num_processes` and torchrun's variables PET_..., which go first.

        Raises UserError for values that are no numbers, do not fit each other, or ask for more GPUs than there are.
        """
        num_machines = _number("PET_NNODES", 1, least=1)
        machine = _number("PET_NODE_RANK", 0, least=0)
        address = os.environ.get("PET_MASTER_ADDR", "")
        if machine >= num_machines:
            raise UserError(f"PET_NODE_RANK: {machine} must be below PET_NNODES, which is {num_machines}")
        if num_machines > 1 and not address:
            raise UserError(f"PET_MASTER_ADDR: not set; with PET_NNODES={num_machines} give the name of machine 0")
        return cls(
            num_machines, machine, _processes(runtime), address, _number("PET_MASTER_PORT", DEFAULT_PORT, least=1)
        )

    @property
    def is_one_process(self) -> bool:
        return self.num_machines == 1 and self.num_processes == 1


def is_rank() -> bool:
    """Whether this process is one rank of a training, started by `launch`, `torchrun` or the like."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def this_command() -> list[str]:
    """The `cae-pipe` command under way, for every rank to run."""
    return [sys.executable, "-m", "pipeline.cli", *sys.argv[1:]]


def follow_launcher() -> None:
    """In a rank: stop as after SIGTERM when the launcher is gone, or a rank would go on alone after its `kill -9`."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="follow-launcher", daemon=True).start()


def launch(command: Sequence[str], machines: Machines, logs: Path) -> int:
    """Run `command` once for each process of this machine and wait for all; the exit code of the whole.

    Rank 0 has the terminal; what the others write goes to files in `logs`, and is shown where one of them fails.
    SIGTERM, SIGINT and SIGUSR1 reach every rank as they are; after GRACE_S seconds those left are killed, and the code
    is 128 + signal. When a rank fails the others are ended in the same way, and the code is that of the first one to
    fail, or 1 where a signal ended it. It is also 1 when the other machines do not come.

    Raises UserError when the port that they are to meet at is taken.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    # Machines may share the folder.
    logs = logs / f"machine-{machines.machine}"
    shutil.rmtree(logs, ignore_errors=True)
    # For the ranks. Each would otherwise start a thread for every core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cpus() // machines.num_processes)))
    try:
        with _own_signals(), _silent_agent():
            elastic_launch(_agent_config(machines, logs), command[0])(*command[1:])
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        return _report(failed.failures, machines, logs)
    except DistError as error:
        return _report_missing(machines, str(error))
    return ExitCode.DONE


def _agent_config(machines: Machines, logs: Path) -> "LaunchConfig":
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    to_files = dict.fromkeys(range(1, machines.num_processes), Std.ALL)
    alone = machines.num_machines == 1
    # Some versions of torch do not take it, and wait as long.
    known = "shutdown_timeout" in LaunchConfig.__dataclass_fields__
    grace: dict[str, Any] = {"shutdown_timeout": GRACE_S} if known else {}
    return LaunchConfig(
        min_nodes=machines.num_machines,
        max_nodes=machines.num_machines,
        nproc_per_node=machines.num_processes,
        run_id="cae-pipe",
        rdzv_configs={"rank": machines.machine, "timeout": MACHINES_TIMEOUT_S},
        logs_specs=DefaultLogsSpecs(str(logs), redirects=to_files),
        max_restarts=0,
        # Without SIGHUP, which `nohup` ignores and the agent would not.
        signals_to_handle=",".join(number.name for number in STOP_SIGNALS),
        **grace,
        rdzv_backend="c10d" if alone else "static",
        # Port 0: the agent takes a free one and holds it from then on.
        rdzv_endpoint="localhost:0" if alone else f"{machines.address}:{machines.port}",
        local_addr="localhost" if alone else None,
    )


@contextmanager
def _own_signals() -> Iterator[None]:
    """Until there are ranks a signal ends the launcher at once, also in its wait for others; then the agent's count."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _silent_agent() -> Iterator[None]:
    """The agent tells of every process that it ends; `_report` says the one thing that matters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _report(failures: "Mapping[int, ProcessFailure]", machines: Machines, logs: Path) -> int:
    """Log which rank failed and how, once; the exit code."""
    first_s = min(failure.timestamp for failure in failures.values())
    early = {rank: failure for rank, failure in failures.items() if failure.timestamp <= first_s + FALLOUT_S}
    rank, cause = min(early.items(), key=lambda item: (_innocence(item[1].exitcode), item[0]))
    # Local rank 0 has written to the terminal.
    if cause.local_rank and (tail := _tail(logs, cause.local_rank)):
        logger.error("%s", tail)
    if cause.exitcode > ExitCode.UNEXPECTED:
        # The rank itself has said what was wrong, or that it was asked to stop.
        return cause.exitcode
    how = f"was ended by {signal_name(-cause.exitcode)}" if cause.exitcode < 0 else f"failed with code {cause.exitcode}"
    if cause.exitcode == -signal.SIGKILL:
        how += " (by somebody, or by the system for want of memory)"
    others = "" if machines.num_machines == 1 else " Machines that only lost it say so; look at the output of each."
    logger.error(
        "rank %d (process %d on %s) %s, and the other ranks were stopped. `dvc repro`, or the same command again, goes "
        "on from the last checkpoint.%s",
        rank,
        cause.pid,
        socket.gethostname(),
        how,
        others,
    )
    return ExitCode.UNEXPECTED


def _innocence(exitcode: int) -> int:
    """Order of blame among ranks that failed together; 0 is the cause rather than 1, which may come of a lost peer."""
    if exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM):  # what the agent sends to the rest
        return 3
    if exitcode < 0:
        return 0
    return 2 if exitcode == ExitCode.UNEXPECTED else 1


def _tail(logs: Path, local_rank: int) -> str:
    """The last lines that a rank wrote to stderr; the agent makes a folder for each start, and there is one."""
    written = [file.read_text(errors="replace") for file in logs.glob(f"*/*/{local_rank}/stderr.log")]
    return "\n".join("".join(written).rstrip().splitlines()[-TAIL_LINES:])


def _report_missing(machines: Machines, reason: str) -> int:
    """Log that the machines did not meet; the exit code, which is none of the user's: the next start may find them."""
    place = f"{machines.address}:{machines.port}"
    if "address already in use" in reason.lower():
        raise UserError(f"PET_MASTER_PORT: {place} is taken by another program; set another port on every machine")
    logger.error(
        "machine %d of %d: the machines did not meet at %s within %d s; expected the same command on each, with the "
        "same PET_NNODES, PET_MASTER_ADDR and PET_MASTER_PORT, and PET_NODE_RANK 0 to %d (%s)",
        machines.machine,
        machines.num_machines,
        place,
        MACHINES_TIMEOUT_S,
        machines.num_machines - 1,
        reason.splitlines()[0],
    )
    return ExitCode.UNEXPECTED


def _processes(runtime: RuntimeConfig) -> int:
    """Of this machine."""
    asked = os.environ.get("PET_NPROC_PER_NODE", "")
    if asked in ("", "auto", "gpu"):
        key, number = "runtime.num_processes", runtime.num_processes
        if asked:
            key, number = "PET_NPROC_PER_NODE", "auto"
    else:
        key, number = "PET_NPROC_PER_NODE", _number("PET_NPROC_PER_NODE", 1, least=1)
    if number == 1 or runtime.device == "cpu":
        return 1 if number == "auto" else number
    import torch

    num_gpus = torch.cuda.device_count()
    if number == "auto":
        return max(1, num_gpus)
    if num_gpus and number > num_gpus:
        raise UserError(
            f"{key}: {number} processes need a GPU each and there are {num_gpus}; lower it, or set runtime.device: cpu"
        )
    return number


def _number(variable: str, default: int, *, least: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{variable}: {text!r} must be a whole number, {least} or more")
    return int(text)
