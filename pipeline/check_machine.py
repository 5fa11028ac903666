"""Checks of `cae-pipe doctor` on the machine: versions, devices, disk, shared memory, the port."""

import importlib.metadata as metadata
import os
import platform
import re
import shutil
import socket
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from cae.config import Params
from pipeline.findings import Finding, ok, problem, warning
from pipeline.workspace import Workspace
from serving.machine import available_cpus, has_nvidia_device

SHOWN = ("torch", "torchvision", "timm", "onnxruntime", "onnxruntime-gpu", "dvc")
SHOWN_DIFFERENCES = 5
GB = 1e9
# A default run fits into this much memory; a paper-scale one names its own needs.
MEMORY_BYTES = 2 * GB
DISK_BYTES = 5 * GB
DISK_FULL_BYTES = 0.2 * GB
CGROUP_MEMORY = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where torch puts the batches of loader processes)
# Batches that each loader process works ahead: torch's default.
PREFETCH = 2
PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)\s*(?:;([^\\]*))?", re.MULTILINE)


def versions(workspace: Workspace) -> Iterator[Finding]:
    """Python and every package that the project asks for; the lock, where there is one."""
    shown = [f"{name} {_version(name)}" for name in SHOWN if _version(name)]
    yield ok("versions", f"cae-pipe {_version('cae-pipe')}, Python {platform.python_version()}, {', '.join(shown)}")
    python, needs = _needs(workspace.root)
    running = platform.python_version()
    if not Requirement(f"python{python}").specifier.contains(running, prereleases=True):
        yield problem("Python", f"{running} runs, {python} is needed", "install such a Python, then `make env`")
    unmet = [text for need in needs if (text := _unmet(need))]
    if unmet:
        yield problem("packages", "; ".join(unmet), "renew the environment: `rm -rf .venv && make env`")
    else:
        yield ok("packages", f"all {len(needs)} that the project asks for are there")
    if differing := _differing(workspace.root / "requirements.lock"):
        more = f" and {len(differing) - SHOWN_DIFFERENCES} more" if len(differing) > SHOWN_DIFFERENCES else ""
        yield warning(
            "lock",
            f"not as in requirements.lock: {', '.join(differing[:SHOWN_DIFFERENCES])}{more}",
            "`rm -rf .venv && make env` makes the environment that the tests ran in",
        )


def torch_pair(workspace: Workspace) -> Iterator[Finding]:
    """Whether torchvision's compiled operators fit this torch; a CPU build beside a CUDA build does not."""
    import torch

    try:
        from torchvision.ops import nms

        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except Exception as error:
        yield problem(
            "torchvision",
            f"does not fit torch {torch.__version__}: {str(error).splitlines()[0]}",
            "install the pair from one place: `rm -rf .venv && make env`",
        )
    else:
        yield ok("torchvision", f"its operators run on torch {torch.__version__}")


def processor(workspace: Workspace) -> Iterator[Finding]:
    """CPUs and memory that this process may use, which in a container is less than the machine has."""
    import torch

    usable, seen = available_cpus(), os.cpu_count() or 1
    names = {"avx2": "AVX2", "avx512_f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
    capabilities = torch.cpu.get_capabilities()
    has = [name for key, name in names.items() if capabilities.get(key)]
    share = f"{usable} of {seen} CPUs" if usable < seen else f"{usable} CPUs"
    fast = any(capabilities.get(key) for key in ("avx512_bf16", "amx_bf16"))
    yield ok(
        "CPU", f"{share}, {', '.join(has) or 'no vector extension known'}; bf16 {'gains' if fast else 'gains nothing'}"
    )
    memory = psutil.virtual_memory()
    limit = _memory_limit()
    total = min(memory.total, limit) if limit else memory.total
    free = min(memory.available, total)
    text = (
        f"{free / GB:.1f} GB of {total / GB:.1f} GB free{' (limit of the container)' if total < memory.total else ''}"
    )
    if free < MEMORY_BYTES:
        yield warning("memory", text, "stop other programs, or lower batch_size and runtime.num_workers in params.yaml")
    else:
        yield ok("memory", text)


def gpu(workspace: Workspace) -> Iterator[Finding]:
    """CUDA as torch has it, tried by a sum on every device, and the providers of onnxruntime."""
    import torch

    from serving.ort import onnxruntime

    wants_cuda = (params := valid_params(workspace)) is not None and params.runtime.device == "cuda"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    remedy = "mend the driver (`nvidia-smi` must work) or give the container the GPU"
    if there:
        for number in range(torch.cuda.device_count()):
            yield _try_device(number)
    elif has_nvidia_device():
        reason = str(said[0].message).splitlines()[0] if said else f"torch is built for CUDA {torch.version.cuda}"
        yield (problem if wants_cuda else warning)(
            "GPU", f"an NVIDIA device, but torch cannot use it: {reason}", remedy
        )
    elif wants_cuda:
        yield problem(
            "GPU",
            "params.yaml asks for runtime.device: cuda, and there is none",
            f"set runtime.device: auto, or {remedy}",
        )
    else:
        yield ok("GPU", "none; everything runs on the CPU")
    providers = onnxruntime.get_available_providers()
    text = ", ".join(name.removesuffix("ExecutionProvider") for name in providers)
    if has_nvidia_device() and "CUDAExecutionProvider" not in providers:
        yield warning("onnxruntime", text, "to serve on the GPU install onnxruntime-gpu in place of onnxruntime")
    else:
        yield ok("onnxruntime", text)


def disk(workspace: Workspace) -> Iterator[Finding]:
    """Free space and the right to write where data, models and scratch lie."""
    for name in ("data", "models", "scratch"):
        place = _existing(workspace.root / name)
        free = shutil.disk_usage(place).free
        text = f"{free / GB:.1f} GB free in {place}"
        if not os.access(place, os.W_OK):
            yield problem(
                f"disk: {name}", f"{place} cannot be written", "change its owner or rights, or work in a copy"
            )
        elif free < DISK_FULL_BYTES:
            yield problem(f"disk: {name}", text, "free some space; scratch/ may be deleted while no stage runs")
        elif free < DISK_BYTES:
            yield warning(f"disk: {name}", text, "enough for small sets only; free some space before a large run")
        else:
            yield ok(f"disk: {name}", text)


def shared_memory(workspace: Workspace) -> Iterator[Finding]:
    """Whether /dev/shm holds the batches that the loader processes work ahead."""
    params = valid_params(workspace)
    if params is None or not SHARED_MEMORY.exists():
        return
    workers = params.runtime.num_workers
    free = shutil.disk_usage(SHARED_MEMORY).free
    height, width = params.model.size_px
    sections = (params.tokenizer, params.pretrain, params.finetune, params.probe.linear, params.probe.attentive)
    batch = max(section.batch_size for section in sections)
    # uint8, three channels at most.
    need = workers * PREFETCH * batch * 3 * height * width
    text = f"{free / GB:.2f} GB free; runtime.num_workers {workers} needs about {need / GB:.2f} GB"
    if need > free:
        remedy = "lower runtime.num_workers or batch_size, or give the container more (docker run --shm-size)"
        yield problem("shared memory", text, remedy)
    else:
        yield ok("shared memory", text)


def port(workspace: Workspace) -> Iterator[Finding]:
    """Whether `cae-pipe serve` could listen."""
    from serving.settings import Settings

    environment: dict[str, Any] = {}
    settings = Settings(**environment)
    with socket.socket() as listener:
        # As the server does it: a port whose last connections are just closing counts as free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            text = f"{settings.host}:{settings.port} cannot be opened ({error.strerror})"
            yield warning("port", text, "is a server running already? Else `cae-pipe serve --port ANOTHER`")
        else:
            yield ok("port", f"{settings.host}:{settings.port} is free")


def valid_params(workspace: Workspace) -> Params | None:
    """The parameters, or None where they are missing or wrong, which a check of its own tells."""
    from cae.errors import UserError

    try:
        return workspace.params
    except UserError:
        return None


def _needs(root: Path) -> tuple[str, list[Requirement]]:
    """Python's range and the packages, from pyproject.toml in a checkout and from the installed package elsewhere."""
    file = root / "pyproject.toml"
    project = tomllib.loads(file.read_text())["project"] if file.is_file() else {}
    if project.get("name") == "cae-pipe":
        lines = [*project["dependencies"], *project["optional-dependencies"]["pipeline"]]
        python = project["requires-python"]
    else:
        lines = metadata.requires("cae-pipe") or []
        python = metadata.metadata("cae-pipe")["Requires-Python"]
    needs = [Requirement(line) for line in lines]
    return python, [need for need in needs if need.marker is None or need.marker.evaluate({"extra": "pipeline"})]


def _unmet(need: Requirement) -> str | None:
    found = _version(need.name)
    if found is None and need.name == "onnxruntime-gpu":
        found = _version("onnxruntime")  # either serves
    if found is None:
        return f"{need.name} is missing"
    fits = need.specifier.contains(found, prereleases=True)
    return None if fits else f"{need.name} is {found}, {need.specifier} is needed"


def _differing(lock: Path) -> list[str]:
    if not lock.is_file():
        return []
    differing = []
    for name, version, marker in PINNED.findall(lock.read_text()):
        needed = not marker.strip() or Requirement(f"{name}; {marker}").marker.evaluate()  # type: ignore[union-attr]
        found = _version(name)
        # Build tags (+cu130) are no part of the lock's version.
        if needed and found is not None and found.partition("+")[0] != version:
            differing.append(f"{name} {found} (lock: {version})")
    return differing


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _memory_limit() -> int | None:
    for path in CGROUP_MEMORY:
        try:
            value = int(path.read_text())
        except (OSError, ValueError):
            continue
        # Version 1 writes a huge number for no limit.
        return value if value < sys.maxsize // 2 else None
    return None


def _try_device(number: int) -> Finding:
    import torch

    name = f"GPU {number}"
    try:
        free, total = torch.cuda.mem_get_info(number)
        float(torch.ones(8, device=f"cuda:{number}").sum())
    except RuntimeError as error:
        remedy = "`nvidia-smi` shows who uses it; set runtime.device: cpu to do without"
        return problem(name, f"does not compute: {str(error).splitlines()[0]}", remedy)
    properties = torch.cuda.get_device_properties(number)
    return ok(name, f"{properties.name}, {free / GB:.1f} GB of {total / GB:.1f} GB free, CUDA {torch.version.cuda}")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
