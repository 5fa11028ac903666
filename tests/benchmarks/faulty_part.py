"""A part of the GPU check whose checks end in every way: run in its own process by test_gpu_check."""

import os
import signal
import subprocess
import sys
import time

from benchmarks.gpu_check.parts import Check, Context, Result, Skip


def fine(context: Context) -> Result:
    return Result({"left_s": context.left_s, "process": os.getpid()})


def missed(_: Context) -> Result:
    return Result({"loss": float("nan")}, ["the loss is no number"])


def raises(_: Context) -> Result:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def dies(_: Context) -> Result:
    sys.stderr.write("its last words\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def skips(_: Context) -> Result:
    raise Skip("there is nothing to see")


def hangs(context: Context) -> Result:
    # What it starts must go with it.
    child = subprocess.Popen(["sleep", "600"])
    (context.folder.parent / "child.pid").write_text(str(child.pid))
    time.sleep(600)
    return Result({})


CHECKS = (
    Check("fine", fine),
    Check("missed", missed),
    Check("raises", raises),
    Check("after a lost GPU", fine),
    Check("dies", dies),
    Check("absent", fine, needs=("no_such_package",)),
    Check("skips", skips),
    Check("hangs", hangs, limit_s=1.0),
    Check("after a hang", fine),
    Check("hangs to the end", hangs),
    Check("never", fine),
)
