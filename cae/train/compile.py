"""`torch.compile` where it was asked for and can work; else the function as it is, with a warning."""

import importlib
import logging
import subprocess
from collections.abc import Callable
from functools import cache
from typing import TypeVar, cast

import torch

logger = logging.getLogger(__name__)

Compiled = TypeVar("Compiled", bound=Callable[..., object])
PROBE_TIMEOUT_S = 120


def compiled(function: Compiled, *, wanted: bool, device: torch.device) -> Compiled:
    """`function` compiled for static shapes, at its first call; the same function where not wanted or not possible.

    A new shape compiles it once more. Warns, once a process, with the reason where no compiler works.
    """
    if not wanted:
        return function
    if reason := missing_compiler(device.type):
        _warn(reason)
        return function
    return cast(Compiled, torch.compile(function, dynamic=False))


def missing_compiler(device_type: str) -> str | None:
    """Why nothing can be compiled for a device, or None where it can."""
    return _missing_triton() if device_type == "cuda" else _missing_cpp_compiler()


def _missing_triton() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}); install the triton that belongs to torch {torch.__version__}"
    return None


def _missing_cpp_compiler() -> str | None:
    # Not only whether there is one: without its headers it compiles nothing.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    advice = "install a C++ compiler such as g++, or name one in the variable CXX"
    try:
        command = [get_cpp_compiler(), "-x", "c++", "-fsyntax-only", "-"]
        done = subprocess.run(  # noqa: S603 (the compiler that torch itself would call)
            command,
            input="#include <vector>\n#include <cmath>\nint main() { return std::vector<int>{}.size(); }\n",
            capture_output=True,
            text=True,
            check=False,
            timeout=PROBE_TIMEOUT_S,
        )
    except (InvalidCxxCompiler, OSError, subprocess.TimeoutExpired) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return f"no working C++ compiler was found ({first}); {advice}"
    if done.returncode:
        first = (done.stderr.splitlines() or ["no message"])[0]
        return f"the C++ compiler {command[0]} fails ({first}); {advice}"
    return None


@cache
def _warn(reason: str) -> None:
    logger.warning("runtime.compile: running without compiling: %s", reason)
