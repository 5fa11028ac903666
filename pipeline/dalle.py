"""The DALL-E tokenizer in the stage `tokenizer`: found, read, and the fastest way to compute its tokens measured."""

import copy
import itertools
import logging
import time
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cae.errors import UserError
from cae.targets.dalle import DalleArchitecture, DalleTarget, DtypeName
from cae.targets.dalle_files import ADDRESSES, read_dalle
from pipeline.batches import first_images, resized, second_view_px, unit_range
from pipeline.workspace import Workspace

logger = logging.getLogger(__name__)

# Tokens of a faster dtype must equal those of float32 on this share of the patches.
MIN_AGREEMENT = 0.999
# 25,088 patches at 14 × 14, so 25 may differ.
TRIAL_IMAGES, TRIAL_BATCH = 128, 32


class Trial(NamedTuple):
    """One way to compute tokens: how fast, and on which share of the patches they are those of float32."""

    dtype: DtypeName
    channels_last: bool
    images_per_s: float
    agreement: float

    def precision(self) -> dict[str, str | bool]:
        """As in DalleArchitecture."""
        return {"dtype": self.dtype, "channels_last": self.channels_last}


def files(workspace: Workspace) -> tuple[Path, Path]:
    """Where encoder and decoder lie. Raises UserError, with their addresses, where one is absent."""
    config = workspace.params.tokenizer
    encoder, decoder = (workspace.root / place for place in (config.dalle_encoder, config.dalle_decoder))
    absent = [
        f"{path} (published at {ADDRESSES[part]}; tokenizer.dalle_{part})"
        for part, path in (("encoder", encoder), ("decoder", decoder))
        if not path.is_file()
    ]
    if absent:
        raise UserError(
            f"tokenizer.kind: dalle reads weights that are not there: {' and '.join(absent)}. Download them to these "
            "places, or name their places in the keys given in brackets"
        )
    return encoder, decoder


def read(workspace: Workspace, encoder: Path, decoder: Path) -> DalleTarget:
    """The target for the prepared images, tokens in float32 so far. Raises UserError as `read_dalle`."""
    channels, model = workspace.index.channels, workspace.params.model
    if channels not in (1, 3):
        raise UserError(
            f"tokenizer.kind: dalle reads images of 1 or 3 channels, and {workspace.prepared} has {channels}; "
            "set tokenizer.kind to dvae or pixels"
        )
    return build(encoder, decoder, 1 if channels == 1 else 3, model.patch_size, model.grid)


def build(encoder: Path, decoder: Path, channels: Literal[1, 3], patch_size: int, grid: tuple[int, int]) -> DalleTarget:
    """The target for a grid of patches, tokens in float32. Raises UserError as `read_dalle`."""
    modules = read_dalle(encoder, decoder)
    architecture = DalleArchitecture(
        **modules.sizes.model_dump(),
        channels=channels,
        patch_size=patch_size,
        grid=grid,
        dtype="float32",
        channels_last=False,
    )
    return modules.target(architecture)


@torch.inference_mode()
def trials(workspace: Workspace, target: DalleTarget) -> list[Trial]:
    """Every way to compute tokens of the first validation images, on the target's device; the first is float32.

    With `runtime.precision: fp32` it is the only one, and then nothing depends on what was fast.
    """
    device = next(target.parameters()).device
    preprocessing = workspace.preprocessing()
    if size_px := second_view_px(workspace.params.model, target.patch_px):
        preprocessing = resized(preprocessing, size_px)
    images = unit_range(first_images(workspace, "val", preprocessing, TRIAL_IMAGES)).to(device)
    dtypes: list[DtypeName] = ["float32"]
    layouts = [False]
    if workspace.params.runtime.precision != "fp32":
        dtypes += ["bfloat16", "float16"] if device.type == "cuda" else ["bfloat16"]
        layouts.append(True)
    measured = []
    for dtype, channels_last in itertools.product(dtypes, layouts):
        trial = copy.deepcopy(target)
        trial.architecture = target.architecture.model_copy(update={"dtype": dtype, "channels_last": channels_last})
        trial.speed_up()
        measured.append((dtype, channels_last, *_timed(trial, images)))
    truth = measured[0][2]
    return [
        Trial(dtype, channels_last, len(images) / seconds, float((tokens == truth).double().mean()))
        for dtype, channels_last, tokens, seconds in measured
    ]


def _timed(target: DalleTarget, images: Tensor) -> tuple[Tensor, float]:
    chunks = images.split(TRIAL_BATCH)
    target.encode(chunks[0]).cpu()
    started = time.perf_counter()
    # On the CPU at the end, so that the clock waits for a GPU.
    tokens = torch.cat([target.encode(chunk) for chunk in chunks]).cpu()
    return tokens, time.perf_counter() - started


def choose(tried: list[Trial]) -> Trial:
    """The fastest whose tokens agree; float32 as it is always does."""
    return max((trial for trial in tried if trial.agreement >= MIN_AGREEMENT), key=lambda trial: trial.images_per_s)


def images_per_s(tried: list[Trial]) -> dict[str, float]:
    """Of each dtype by its faster order in memory, as metrics."""
    names = dict.fromkeys(trial.dtype for trial in tried)
    return {f"{name}_images_per_s": max(t.images_per_s for t in tried if t.dtype == name) for name in names}


def agreements(tried: list[Trial]) -> dict[str, float]:
    """Of each dtype by its worse order in memory, which is the same in every run, as metrics."""
    names = dict.fromkeys(trial.dtype for trial in tried)
    return {f"{name}_agreement": min(t.agreement for t in tried if t.dtype == name) for name in names}


def tell(tried: list[Trial], chosen: Trial) -> None:
    """Log the measurement as a table."""
    lines = [
        f"  {trial.dtype:<9} {'channels last' if trial.channels_last else 'channels first':<14} "
        f"{trial.images_per_s:>9.1f} images/s, tokens as float32 on {trial.agreement:.3%}"
        f"{'  (chosen)' if trial is chosen else ''}"
        for trial in tried
    ]
    logger.info("DALL-E tokens, %.1f %% must be those of float32:\n%s", 100 * MIN_AGREEMENT, "\n".join(lines))
