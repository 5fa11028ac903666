"""`torch.compile` where it can work, else a warning.

Block by block: the whole pass as one graph takes minutes to compile and is no faster.
"""

import importlib
import logging
import subprocess
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
