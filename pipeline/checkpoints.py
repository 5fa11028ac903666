"""Trained weights together with the data they are used on and the target that they predict."""

import logging
from pathlib import Path
from typing import Any

from cae.architecture import Architecture, EncoderArchitecture
from cae.data.shards import file_sha256
from cae.errors import UserError
from cae.targets.files import AnyTarget, load_target
from cae.weights import Trained, find_weights, load_trained
from pipeline.workspace import Workspace
from serving.preprocess import Preprocessing

logger = logging.getLogger(__name__)


def load_for_data(workspace: Workspace) -> Trained:
    """The trained weights of the workspace; UserError where they take other images than the prepared ones."""
    trained = load_trained(workspace.pretrained)
    check_channels(trained.architecture, workspace, workspace.pretrained)
    return trained


def check_channels(architecture: EncoderArchitecture, workspace: Workspace, path: Path) -> None:
    """Raise UserError where the encoder of `path` takes another number of channels than the prepared images have."""
    wanted, found = architecture.channels, workspace.index.channels
    if wanted != found:
        raise UserError(
            f"{path}: takes images of {wanted} channels, the prepared ones have {found}; set prepare.channels: "
            f"{wanted} and run `dvc repro prepare`"
        )


def preprocessing_of(trained: Trained) -> Preprocessing:
    """Evaluation preprocessing of the images that the model takes, as the server will do it."""
    height, width = trained.architecture.size_px
    return Preprocessing(
        channels=trained.architecture.channels,
        height=height,
        width=width,
        crop_fraction=trained.eval_crop,
        resample="bicubic",
    )


def find_target(workspace: Workspace, path: Path, trained: Trained) -> AnyTarget | None:
    """What the decoder of `path` predicts, as `find_target_file`."""
    file = find_target_file(workspace, path, trained)
    if file is None:
        return None
    target, architecture = load_target(file), trained.architecture
    assert isinstance(architecture, Architecture)
    check_target(target, str(path), preprocessing_of(trained), architecture.patch_size, architecture.num_outputs)
    return target


def check_target(
    target: AnyTarget, name: str, preprocessing: Preprocessing, patch_size: int, num_outputs: int | None
) -> None:
    """Raise UserError where `target` is not one for the images of the model `name`, or not its decoder's.

    `num_outputs` of the decoder; None where it is not known.
    """
    theirs = target.architecture
    rows, columns = theirs.grid
    found = (theirs.channels, rows * theirs.patch_size, columns * theirs.patch_size, theirs.patch_size)
    wanted = (preprocessing.channels, preprocessing.height, preprocessing.width, patch_size)
    if found != wanted or num_outputs not in (None, target.num_outputs):
        raise UserError(
            f"the target (tokenizer) is for {_words(*found, target.num_outputs)}; {name} takes "
            f"{_words(*wanted, num_outputs)}. Give the one that it was trained with, or none"
        )


def _words(channels: int, height: int, width: int, patch_size: int, num_outputs: int | None) -> str:
    values = f", {num_outputs} codes or values each" if num_outputs else ""
    return f"{channels} x {height} x {width} px in patches of {patch_size}{values}"


def find_target_file(workspace: Workspace, path: Path, trained: Trained) -> Path | None:
    """What the decoder of `path` predicts: `target.safetensors` beside it, or the workspace's own if it is the same.

    None, with the reason in the log, for an encoder alone and where no target can be found.
    """
    if trained.cae is None:
        logger.info("%s: an encoder without a decoder, so there is nothing to reconstruct with", path)
        return None
    beside = find_weights(path).with_name(workspace.target.name)
    found = look_for_target(beside, trained.origin, workspace.target)
    if found is None:
        logger.warning(
            "%s: the target that its decoder predicts is neither %s nor %s, so there is nothing to reconstruct with",
            path,
            beside,
            workspace.target,
        )
    return found


def look_for_target(beside: Path, origin: dict[str, Any], *elsewhere: Path) -> Path | None:
    """`beside` where it is there, else the first of the other files whose hash is the one that `origin` names."""
    if beside.is_file():
        return beside
    wanted = origin.get("target_sha256")
    return next((file for file in elsewhere if wanted and file.is_file() and file_sha256(file) == wanted), None)
