"""`torch.compile` where it can work, else a warning.

Block by block: the whole pass as one graph takes minutes to compile and is no faster.
"""

import importlib
import logging
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 120
# A block has some variants: another number of tokens, no gradient, no drop path.
MOST_VARIANTS = 64


def compile_blocks(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Have every transformer block compiled for static shapes at its first call; alike ones share what was compiled.

    Their `forward` is replaced. Warns, once a process, with the reason where no compiler works, and leaves them alone.
    """
    if reason := missing_compiler(device.type):
        _warn(reason)
        return
    torch._dynamo.config.recompile_limit = MOST_VARIANTS
    # A block already is the unit in which DDP exchanges while others compute; it need not be cut further.
    torch._dynamo.config.optimize_ddp = False
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)


def missing_compiler(device_type: str) -> str | None:
    """Why nothing can be compiled for a device, or None where it can."""
    return _missing_triton() if device_type == "cuda" else _missing_cpp_compiler()


def _missing_triton() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}); install the triton that belongs to torch {torch.__version__}"
    # It builds its launchers in C, for this Python, and looks for a compiler in this order.
    advice = "install gcc and Python's headers (python3-dev), or name a C compiler in the variable CC"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return f"triton needs a C compiler and none was found; {advice}"
    command = [compiler, "-x", "c", "-I", sysconfig.get_path("include"), "-fsyntax-only", "-"]
    return _failure(command, "#include <Python.h>\nint main(void) { return 0; }\n", advice)


def _missing_cpp_compiler() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    advice = "install a C++ compiler such as g++, or name one in the variable CXX"
    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return f"no working C++ compiler was found ({_first_line(str(error))}); {advice}"
    source = "#include <vector>\n#include <cmath>\nint main() { return std::vector<int>{}.size(); }\n"
    return _failure([compiler, "-x", "c++", "-fsyntax-only", "-"], source, advice)


def _failure(command: Sequence[str], source: str, advice: str) -> str | None:
    """Why `command` does not compile a source that needs headers, which a compiler may lack; None where it does."""
    try:
        done = subprocess.run(  # noqa: S603 (the compiler that torch or triton itself would call)
            command, input=source, capture_output=True, text=True, check=False, timeout=PROBE_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the compiler {command[0]} cannot be run ({_first_line(str(error))}); {advice}"
    return f"the compiler {command[0]} fails ({_first_line(done.stderr)}); {advice}" if done.returncode else None


def _first_line(text: str) -> str:
    return (text.splitlines() or ["no message"])[0]


@cache
def _warn(reason: str) -> None:
    logger.warning("runtime.compile: running without compiling: %s", reason)
