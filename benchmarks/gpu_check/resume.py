"""A small pretraining that kills itself: `python -m benchmarks.gpu_check.resume ROOT DEVICE`."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cae.train.checkpoint import CheckpointStore, load_checkpoint
from cae.train.device import Hardware, set_reproducible
from cae.train.loop import CHECKPOINTS, RunFolder
from pipeline import pretrain
from pipeline.workspace import Workspace

KILLED = "killed"
SAVE_EVERY, KILL_AT = 5, 12


def train(workspace: Workspace, device: torch.device, folder: Path, kill_at: int | None = None) -> dict[str, Tensor]:
    """Pretrain to the end, from a checkpoint in `folder` where there is one; the weights on the CPU."""
    hardware = Hardware(device, bf16=device.type == "cuda")
    set_reproducible(workspace.params.seed)

    def kill(step: int) -> None:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    training = replace(pretrain.build(workspace, hardware).training, before_step=kill)
    training.run(RunFolder(folder, SAVE_EVERY, stamp={}))
    return {name: value.cpu().clone() for name, value in training.module.state_dict().items()}


def steps_saved(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return int(load_checkpoint(CheckpointStore(folder / CHECKPOINTS, 1, None).paths()[-1])["step"])


def main(root: str, device: str) -> None:
    workspace = Workspace(Path(root), Path(root, "params.yaml"))
    train(workspace, torch.device(device), workspace.root / KILLED, KILL_AT)


if __name__ == "__main__":
    main(*sys.argv[1:])
