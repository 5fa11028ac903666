"""Which device and which precision a run uses."""

import contextlib
import ctypes
import os
import sys
from dataclasses import dataclass
from typing import Literal

import torch

from cae.config import RuntimeConfig
from cae.errors import UserError
from cae.train.parallel import Ranks

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Hardware:
    """The device, and whether autocast to bf16 is on."""

    device: torch.device
    bf16: bool

    @classmethod
    def choose(cls, config: RuntimeConfig) -> "Hardware":
        """Resolve `auto`; raise UserError when `cuda` is asked for and not there."""
        device = choose_device(config.device)
        bf16 = _gains_by_bf16(device) if config.precision == "auto" else config.precision == "bf16"
        return cls(device, bf16)

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        return "bf16" if self.bf16 else "fp32"

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that `runtime.device` names; UserError when `cuda` is asked for and not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device: cuda is not available here; expected a CUDA device, or set cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # One GPU for each process of this machine, in the order that the launcher numbers them.
    device = torch.device("cuda", Ranks.from_environment().local_rank)
    torch.cuda.set_device(device)
    return device


def _gains_by_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without these instructions a CPU emulates bf16 and is slower than in float32.
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def keep_freed_memory() -> None:
    """Have malloc keep what a step frees for the next one; where the C library is not glibc nothing happens.

    It otherwise gives most of it back to the system, which clears every page again before its next use. It holds for
    the whole process and those forked from it: a loader worker keeps the memory of its largest image.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)


def set_reproducible(seed: int) -> None:
    """Seed torch, and prefer operations whose result is the same in every run; the few that have none warn."""
    # cuBLAS reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would also fill all memory before its first use, to show code that reads it too early.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
