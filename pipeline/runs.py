"""Running stages: one process for each, and a scratch folder for each combination of parameters, data and code."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ruamel.yaml import YAML

from cae.data.shards import INDEX_NAME, file_sha256
from cae.errors import UserError
from cae.train.checkpoint import CheckpointStore, load_checkpoint
from cae.train.loop import CHECKPOINTS, RunFolder, compare_stamps
from cae.train.parallel import Ranks
from cae.weights import find_weights
from pipeline.workspace import Workspace

logger = logging.getLogger(__name__)

# An orphan of an interrupted `dvc repro` needs this long to finish its step and save.
LOCK_TIMEOUT_S = 30


@contextmanager
def stage_lock(workspace: Workspace, stage: str) -> Iterator[None]:
    """Held over all of a stage, scratch folder and outputs included, whatever its parameters.

    Raises UserError when another process (an orphan of an earlier run, say) still runs the stage.
    """
    with _hold(workspace.scratch / "locks" / stage):
        yield


def run_folder(workspace: Workspace, stage: str, checkpoint_every_steps: int) -> RunFolder:
    """The scratch folder of this stage with these parameters, data and code, under the lock of the stage.

    Where it has no checkpoint of its own and another run of the stage has, that run is named with what differs; with
    the workspace's `force` this one goes on from it.
    """
    stamp = make_stamp(workspace, stage)
    path = _scratch_folder(workspace, stage, stamp)
    path.mkdir(parents=True, exist_ok=True)
    if Ranks.from_environment().leads:
        _look_at_other_runs(workspace, stage, path, stamp)
    runtime = workspace.params.runtime
    return RunFolder(
        path, checkpoint_every_steps, stamp, runtime.keep_checkpoints, runtime.keep_every_steps, workspace.force
    )


def _look_at_other_runs(workspace: Workspace, stage: str, path: Path, stamp: dict[str, Any]) -> None:
    own = _store(path)
    if own.newest():
        return
    stores = [_store(folder.parent) for folder in workspace.scratch.glob(f"{stage}-*/{CHECKPOINTS}")]
    found = [checkpoint for store in stores if (checkpoint := store.newest())]
    newest = max(found, key=lambda checkpoint: checkpoint.stat().st_mtime, default=None)
    if newest is None:
        if workspace.force:
            raise UserError(f"--force: {workspace.scratch} has no checkpoint of {stage} to go on from; run without it")
        return
    state = load_checkpoint(newest)
    told = f"{newest} (step {state['step']} of {state['total_steps']}) was made with other "
    told += "; ".join(compare_stamps(state, stamp))
    if workspace.force:
        logger.warning("%s: %s; --force goes on from it", stage, told)
        # The other run keeps what it has; a link costs no room.
        (own.folder / newest.name).hardlink_to(newest)
        if (log := newest.parents[1] / "log.jsonl").exists():
            shutil.copy(log, path)
    elif state["step"] < state["total_steps"]:
        logger.warning(
            "%s: %s; this run starts anew beside it (`cae-pipe %s --force` goes on from it all the same)",
            stage,
            told,
            stage,
        )


def _store(path: Path) -> CheckpointStore:
    return CheckpointStore(path / CHECKPOINTS, keep=1, keep_every=None)


@contextmanager
def shared_folder(workspace: Workspace, stage: str) -> Iterator[Path]:
    """As `run_folder`, for results that several stages share and only the first computes: it has a lock of its own."""
    path = _scratch_folder(workspace, stage, make_stamp(workspace, stage))
    with _hold(path):
        yield path


def make_stamp(workspace: Workspace, stage: str) -> dict[str, Any]:
    """What a checkpoint was made from, by the stage's own entry in dvc.yaml, so that the two cannot differ."""
    entry = _stage_entry(workspace.root, stage)
    raw = workspace.params.model_dump(mode="json")
    params = {key: _look_up(raw, key) for key in entry["params"]}
    code, data = hashlib.sha256(), hashlib.sha256()
    for dependency in sorted(entry["deps"]):
        path = workspace.dependency(dependency)
        digest = code if path.suffix == ".py" else data
        for file in _files_that_identify(path):
            name = Path(dependency, file.relative_to(path))
            digest.update(f"{name} {file_sha256(file)}\n".encode())
    if stage == "pretrain" and (start := workspace.params.pretrain.start_from):
        data.update(file_sha256(find_weights(workspace.root / start)).encode())
    stamp = {"params": params, "data_hash": data.hexdigest(), "code_version": code.hexdigest()}
    fingerprint = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:16]
    return {**stamp, "fingerprint": fingerprint}


def _scratch_folder(workspace: Workspace, stage: str, stamp: dict[str, Any]) -> Path:
    return workspace.scratch / f"{stage}-{stamp['fingerprint']}"


@contextmanager
def _hold(path: Path) -> Iterator[None]:
    path.mkdir(parents=True, exist_ok=True)
    owner = path / "owner.pid"
    # An operating-system lock: it ends with its process, however that ends.
    lock = FileLock(path / "lock", timeout=LOCK_TIMEOUT_S)
    try:
        lock.acquire()
    except Timeout:
        holder = owner.read_text().strip() if owner.exists() else "unknown"
        raise UserError(
            f"{path}: process {holder} is still running this stage; "
            f"wait for it, or stop it with `kill {holder}` (it saves first), then run again"
        ) from None
    try:
        owner.write_text(f"{os.getpid()}\n")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _stage_entry(root: Path, stage: str) -> dict[str, list[str]]:
    """`deps` and `params` of a stage in dvc.yaml, without what names the item of a matrix."""
    stages = YAML(typ="safe", pure=True).load(root / "dvc.yaml")["stages"]
    entry = stages[stage]
    return {key: [value for value in entry.get(key, []) if "${" not in value] for key in ("deps", "params")}


def _look_up(raw: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        raw = raw[part]
    return raw


def _files_that_identify(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    # Prepared data carries the hash of its shards, and reading gigabytes again would say nothing more.
    return [path / INDEX_NAME] if (path / INDEX_NAME).exists() else sorted(p for p in path.rglob("*") if p.is_file())
