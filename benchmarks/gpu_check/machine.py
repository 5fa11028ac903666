"""Part 1: what this is, and what it can do at most."""

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.gpu_check.parts import Check, Context, Figures, Result
from benchmarks.gpu_check.process import ROOT
from benchmarks.training.contest import TERA, matmul_tflops
from benchmarks.training.setting import machine
from benchmarks.training.timing import seconds_per_call
from cae.train.compile import missing_compiler

PACKAGES = (
    "torchvision",
    "timm",
    "transformers",
    "onnx",
    "onnxruntime-gpu",
    "onnxruntime",
    "triton",
    "numpy",
    "pillow",
)
GIB = 2**30
COPY_BYTES, COPY_REPEATS = 4 * GIB, 10


def versions(context: Context) -> Result:
    """Versions, the device and this computer."""
    figures: Figures = {"python": platform.python_version(), "commit": _commit(), **machine(context.device)}
    figures |= {f"{name}_version": version for name in PACKAGES if (version := _version(name))}
    if context.device.type == "cuda":
        properties = torch.cuda.get_device_properties(context.device)
        figures |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_gib": properties.total_memory / GIB,
        }
    figures["compiler"] = missing_compiler(context.device.type) or "works"
    return Result(figures)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    git = shutil.which("git")
    if git is None:
        return "unknown: no git"
    done = subprocess.run([git, "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown: no repository"


def rates(context: Context) -> Result:
    """Rates of large square matrix products, and of copying device memory, read and write counted."""
    device = context.device
    figures: Figures = {
        "bf16_tflops": matmul_tflops(device, torch.bfloat16),
        "fp32_tflops": matmul_tflops(device, torch.float32),
    }
    if device.type == "cuda":
        with tf32(True):
            figures["tf32_tflops"] = matmul_tflops(device, torch.float32)
    figures["copy_tb_per_s"] = copy_rate(context)
    return Result(figures)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let matrix products and convolutions of float32 tensors round their inputs to ten bits, or not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def copy_rate(context: Context) -> float:
    """TB/s of a copy within the device's memory, what is read and written counted."""
    source = torch.ones(context.size(COPY_BYTES, COPY_BYTES // 64), dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / seconds_per_call(lambda: target.copy_(source), COPY_REPEATS, context.device) / TERA


CHECKS = (Check("versions", versions), Check("rates", rates))
