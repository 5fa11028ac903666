"""What this process may use of the machine: CPUs, and whether there is an NVIDIA device."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
# The driver's control device on Linux, and the paravirtual GPU of WSL.
_NVIDIA_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))


def available_cpus(cgroup: Path = _CGROUP) -> int:
    """CPUs this process may use, at least 1: its affinity, capped by the quota of the control group (whole CPUs).

    A container with two CPUs of a 64-core machine sees all 64, and a thread pool of that size would be throttled.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota_v2(cgroup / "cpu.max") or _quota_v1(cgroup / "cpu")
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def has_nvidia_device() -> bool:
    """Whether the operating system shows this process an NVIDIA device."""
    return any(path.exists() for path in _NVIDIA_DEVICES)


def _quota_v2(path: Path) -> float | None:
    """`cpu.max` holds "QUOTA PERIOD" in microseconds, or "max PERIOD" without a limit."""
    try:
        quota, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    """Two files in microseconds; a quota of -1 is no limit."""
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 else None
