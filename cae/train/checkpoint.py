"""Checkpoints of a running training: one file, written whole or not at all, whose name carries its checksum."""

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

logger = logging.getLogger(__name__)

DIGEST_LENGTH = 16  # hex digits of the SHA-256 in a name: as `sha256sum FILE | cut -c1-16` prints them


class CheckpointStore:
    """Checkpoints of one run in one folder: the newest `keep`, and for good those of every `keep_every` steps.

    A file is `step-STEP-DIGEST.pt`. The digest is in the name, so that one rename publishes both.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int | None) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, payload: dict[str, Any]) -> Path:
        """Write to a temporary name, fsync, rename, fsync the folder; then remove what is no longer kept.

        Raises OSError, with the room that is needed, where the file cannot be written: those before are untouched.
        """
        temporary = self.folder / "saving.tmp"  # also what a killed process left behind, which is written over
        path = self.folder / f"step-{step:09d}.pt"
        try:
            digest = _write(temporary, payload)
            path = temporary.replace(self.folder / f"step-{step:09d}-{digest}.pt")
        except (OSError, RuntimeError) as error:  # on a full disk torch raises the latter
            temporary.unlink(missing_ok=True)
            raise OSError(self._explain(path, payload, error)) from error
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(self.folder)
        self._remove_old(path)
        return path

    def newest(self) -> Path | None:
        """The newest checkpoint that is as it was written, or None; a damaged one is passed over with a warning."""
        for path in reversed(self.paths()):
            if path.stem.rpartition("-")[2] == _digest_of(path):
                return path
            logger.warning("%s is damaged: its content does not match its checksum; using the one before", path)
        return None

    def paths(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*-*.pt"))

    def _remove_old(self, written: Path) -> None:
        for path in self.paths():
            if _step_of(path) == _step_of(written) and path != written:
                path.unlink()  # the damaged one that a resumed run has come by again
        for path in self.paths()[: -self.keep]:
            if not (self.keep_every and _step_of(path) % self.keep_every == 0):
                path.unlink()

    def _explain(self, path: Path, payload: dict[str, Any], error: Exception) -> str:
        free = shutil.disk_usage(self.folder).free
        before = self.paths()
        values = sum(leaf.nbytes for leaf in tree_leaves(payload) if isinstance(leaf, Tensor))
        needed = max(values, before[-1].stat().st_size if before else 0)
        safe = f"{before[-1].name} is untouched" if before else "there was none before"
        return (
            f"{path}: the checkpoint could not be written ({error}); it needs {needed / 1e6:.1f} MB and "
            f"{free / 1e6:.1f} MB are free. {safe}: make room, or lower runtime.keep_checkpoints, and run again; it "
            "goes on from there"
        )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and plain values only: a checkpoint never runs code. Mapped, so that the ranks of a machine share it."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state


def _write(path: Path, payload: dict[str, Any]) -> str:
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        torch.save(payload, hashing)  # type: ignore[arg-type]  # needs `write` alone
        file.flush()
        os.fsync(file.fileno())
    return hashing.digest


class _HashingFile:
    """Passes bytes on to a file and hashes them, so that they need not be read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()[:DIGEST_LENGTH]


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_LENGTH]


def _step_of(path: Path) -> int:
    return int(path.stem.split("-")[1])


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
