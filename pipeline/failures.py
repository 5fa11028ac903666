"""What `cae-pipe` says and which code it ends with when a command fails.

Nothing heavy is imported here: libraries are only looked at where the failing command has loaded them already.
"""

import errno
import os
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from cae.errors import Diverged, Interrupted, NotReady, UserError
from pipeline.exit_codes import ExitCode

DEBUG_VARIABLE = "CAE_PIPE_DEBUG"
SIGPIPE = 13
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# What libraries write that turn the system's error into one of their own.
FULL_TEXTS = ("No space left on device", "Disk quota exceeded")
MEMORY_TEXTS = (
    "can't allocate memory",
    "Cannot allocate memory",
    "Failed to allocate memory",
    "killed by signal: Killed",
)
# gloo's. Those of NCCL and of the store have a class of their own.
LOST_RANK_TEXTS = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting")
SHARED_MEMORY_TEXTS = ("killed by signal: Bus error", "out of shared memory", "unable to allocate shared memory")


def run(command: Callable[[], None]) -> None:
    """Call `command`; where it fails, say so and end with the code of that kind of failure."""
    stdout = _second_stdout()
    try:
        try:
            command()
        finally:
            # Here, and not when the interpreter ends, where a full disk or a closed pipe is a message without remedy.
            if sys.stdout is not None:
                sys.stdout.flush()
    except (Exception, SystemExit) as error:
        # Typer and rich turn a broken pipe into an exit, whichever pipe it was.
        cause = error.__context__ if isinstance(error.__context__, BrokenPipeError) else error
        if _reader_is_gone(cause, stdout):
            # Nothing more can be written; the interpreter's own flush at the end must not complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(128 + SIGPIPE)
        if isinstance(cause, SystemExit):
            raise
        sys.exit(report(cause))


def report(error: BaseException) -> int:
    """Write to stderr what went wrong and what to do; the exit code.

    Errors that the user can mend have no traceback unless CAE_PIPE_DEBUG is set. The traceback of any other error goes
    to a file, which the message names.
    """
    if "RANK" in os.environ:
        # The launcher ends all ranks when one fails; one that fails by itself keeps its own code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    debug = debugging()
    if debug:
        traceback.print_exception(error)
    if isinstance(error, Interrupted):
        _write(str(error))
        return error.exit_code
    if isinstance(error, UserError):
        _write(f"error: {error}")
        return _code(error)
    if _has_lost_a_rank(error):
        # No file for the traceback: the rank that failed first may have written one.
        _write(f"lost the connection to another rank, which says why it ended: {str(error).splitlines()[0]}")
        return ExitCode.UNEXPECTED
    if remedy := explain(error):
        _write(f"error: {remedy}")
        if not debug:
            _write(f"(the library's own words: {keep_traceback(error)})")
        return ExitCode.USER_ERROR
    _write(f"unexpected error: {type(error).__name__}: {error}")
    if not debug:
        _write(
            f"This is a fault in cae-pipe. The traceback: {keep_traceback(error)}; `cae-pipe --debug COMMAND` or "
            f"{DEBUG_VARIABLE}=1 shows it at once. Please open an issue in the project's tracker with it and the "
            "output of `cae-pipe doctor --json`"
        )
    return ExitCode.UNEXPECTED


def debugging() -> bool:
    """Whether tracebacks are wanted; a variable, so that it also reaches stages that DVC starts."""
    return os.environ.get(DEBUG_VARIABLE, "").lower() in ("1", "true", "yes", "on")


def explain(error: BaseException) -> str | None:
    """Message and remedy for errors of the machine that a user can mend; None for any other."""
    text = str(error)
    if _is_cuda_out_of_memory(error):
        return (
            f"the GPU is out of memory ({text.splitlines()[0]}); lower the batch_size of the stage in params.yaml "
            "(or --batch-size), or free the GPU (`nvidia-smi` shows who uses it)"
        )
    if any(part in text for part in SHARED_MEMORY_TEXTS):
        return (
            f"a loader process ran out of shared memory ({text}); lower runtime.num_workers in params.yaml, or give "
            "the container more (docker run --shm-size=2g)"
        )
    if isinstance(error, MemoryError) or any(part in text for part in MEMORY_TEXTS):
        return (
            f"the machine is out of memory ({text or type(error).__name__}); lower the batch_size of the stage or "
            "runtime.num_workers in params.yaml, or stop other programs"
        )
    number = error.errno if isinstance(error, OSError) else None
    name = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    if number in FULL or any(part in text for part in FULL_TEXTS):
        return (
            f"{name}the disk is full ({text}); free some space (`cae-pipe doctor` shows how much there is; scratch/ "
            "may be deleted, `dvc gc --workspace` empties the cache), then run the same command again"
        )
    if number in FORBIDDEN and name:
        return f"{name}permission denied; expected a file that this user may open: change its rights, or name another"
    return None


def _second_stdout() -> int:
    """Another handle of standard output, for rich turns the first one away when the pipe breaks; -1 if it is closed."""
    try:
        return os.dup(1)
    except OSError:
        return -1


def _reader_is_gone(error: BaseException | None, stdout: int) -> bool:
    """Whether a command ended because nobody reads its output any more (`cae-pipe results | head -1`).

    The pipe to a loader process that died breaks just so, and that is an error to be told.
    """
    if not isinstance(error, BrokenPipeError):
        return False
    try:
        watch = select.poll()
        watch.register(stdout, select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on this system, or stdout is closed
        return True


def keep_traceback(error: BaseException) -> str:
    """Write the traceback to a file and return its name, or the traceback itself where no file can be written."""
    text = "".join(traceback.format_exception(error))
    command = " ".join(sys.argv)
    # A checkout has a place for such things; any other folder is the user's own.
    in_checkout = Path("dvc.yaml").is_file()
    scratch = Path("scratch/last-error.txt")
    fallback = Path(tempfile.gettempdir()) / f"cae-pipe-last-error-{os.getuid()}.txt"
    for path in [scratch, fallback] if in_checkout else [fallback]:
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{command}\n\n{text}")
        except OSError:
            continue
        return str(path)
    return f"no file could be written, so here it is:\n{text}"


def _code(error: UserError) -> ExitCode:
    if isinstance(error, Diverged):
        return ExitCode.DIVERGED
    return ExitCode.NOT_READY if isinstance(error, NotReady) else ExitCode.USER_ERROR


def _is_cuda_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _has_lost_a_rank(error: BaseException) -> bool:
    """Whether a rank of a training failed only because another one did."""
    if "RANK" not in os.environ or not isinstance(error, RuntimeError):
        return False
    distributed = sys.modules.get("torch.distributed")
    has_class = distributed is not None and isinstance(error, distributed.DistError)
    return has_class or any(part in str(error) for part in LOST_RANK_TEXTS)


def _write(text: str) -> None:
    sys.stderr.write(f"{text}\n")
