"""Checkpoints of a running training: one file, written whole or not at all."""

import logging
import os
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


class CheckpointStore:
    """Checkpoints of one run in one folder, the newest `keep` of them.

    The folder belongs to one fingerprint of parameters, data and code, so whatever lies there may be continued.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, payload: dict[str, Any]) -> None:
        """Write to a temporary name, fsync, rename, fsync the folder; then remove what is older than `keep`."""
        path = self.folder / f"step-{step:09d}.pt"
        write_atomically(path, payload)
        for old in self._paths()[: -self.keep]:
            old.unlink()

    def load_newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, or None; a damaged one is passed over with a warning."""
        for path in reversed(self._paths()):
            try:
                # Tensors and plain values only: a checkpoint never runs code.
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises errors of many types on damaged bytes
                logger.warning("%s cannot be read (%s); trying the one before", path, error)
        return None

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))


def write_atomically(path: Path, payload: dict[str, Any]) -> None:
    """Save with torch so that after a crash either the old file is there or the new one, whole."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # on a full disk torch raises the latter
        raise OSError(f"{path}: the checkpoint could not be written ({error}); the one before is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
