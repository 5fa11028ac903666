"""The Python API: features, reconstructions and tokens of images, from a bundle, trained weights or a timm model.

    model = load("models/bundle")
    features = model.encode(["a.jpg", "b.png"], pool="mean")

docs/python.md describes it with examples.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool
from tqdm import tqdm

from cae.architecture import Architecture
from cae.errors import NotReady, UserError
from cae.targets.files import AnyTarget, load_target
from cae.train.device import choose_device
from cae.weights import Trained, find_weights, load_trained
from pipeline.api_inputs import Array, Images, checked_codes, checked_mask, listed, read, split_mask
from pipeline.batches import unit_range
from pipeline.checkpoints import check_target, look_for_target
from pipeline.imports import load_timm
from pipeline.inference import open_bundle
from pipeline.runners import BundleRunner, Runner, TorchRunner
from pipeline.workspace import Workspace
from serving.bundle import Device
from serving.bundle_info import Output
from serving.masks import random_mask

Pool = Literal["mean", "class", "patches"]
OUTPUTS: dict[Pool, Output] = {"mean": "pooled", "class": "class_token", "patches": "patches"}
TIMM = "timm:"
SOURCES = "a bundle, trained weights (a file or its folder), or timm:NAME such as timm:vit_small_patch16_224"


class Model:
    """A loaded model; `load` makes it.

    Images are one or a sequence of: paths, Pillow images, uint8 arrays or tensors [c, h, w]; or one uint8 array or
    tensor [b, c, h, w]. They get the evaluation preprocessing of the model, but for arrays that have its size already.
    They are read batch by batch. Results always have the batch in front, also for one image.

    Errors of all methods: UserError for an image that cannot be read or used, named by its path or its position.
    """

    def __init__(
        self,
        runner: Runner,
        target: AnyTarget | None,
        device: torch.device,
        batch_size: int,
        progress: bool | None,
        as_torch: bool,
    ) -> None:
        self._runner, self._target, self._device = runner, target, device
        self.info, self.preprocessing = runner.info, runner.preprocessing
        self.batch_size, self.progress, self.as_torch = batch_size, progress, as_torch

    def encode(self, images: Images, pool: Pool = "mean") -> Array:
        """Features, float32: `mean` of the patches [b, d], `class` token [b, d], or all `patches` [b, n, d], row-major.

        Errors: UserError for another pool, and for `class` where the encoder has no class token.
        """
        if pool not in OUTPUTS:
            raise UserError(f"pool: {pool!r} is none of {', '.join(OUTPUTS)}")
        return self._read_and_run(images, lambda pixels, _: self._runner.features(pixels, OUTPUTS[pool]))

    def reconstruct(self, images: Images, mask: float | Array | None = None, *, seed: int = 0) -> Array:
        """The whole images as the model completes them from their visible patches, float32 [b, c, h, w] in 0-1.

        `mask`: as `random_mask` draws it for a share, the same for every image; or True for hidden patches, bool
        [h, w] or one for each image [b, h, w], all of which hide equally many.

        Errors: UserError for a mask that does not fit, and where there is no decoder or no target.
        """
        self._runner.check_reconstructor()
        given = listed(images)
        drawn = self.random_mask(mask, seed) if mask is None or isinstance(mask, int | float) else mask
        hidden = checked_mask(drawn, len(given), self.info.grid)
        return self._read_and_run(
            given, lambda pixels, rows: self._runner.reconstruct(pixels, *split_mask(hidden[rows]))
        )

    def random_mask(self, share: float | None = None, seed: int = 0) -> Bool[np.ndarray, "h w"]:
        """A mask that hides this share of the patches (by default the model's own), the server's for the same seed.

        Errors: UserError for a share that is not between 0 and 1, or none where the model has none of its own.
        """
        share = self._runner.mask_ratio if share is None else share
        if share is None or not 0 < share < 1:
            raise UserError(f"mask: {share} is no share of patches to hide; give one between 0 and 1, both excluded")
        mask = np.zeros(self.info.num_patches, dtype=np.bool_)
        mask[random_mask(mask.size, share, seed)[1]] = True
        return mask.reshape(self.info.grid)

    def tokenize(self, images: Images) -> Array:
        """What the target makes of the patches: tokens int64 [b, h, w]; of a pixel target float32 [b, h, w, p·p·c].

        Errors: UserError where the model has no target.
        """
        target = self._needed_target()

        def call(pixels: np.ndarray, _: slice) -> np.ndarray:
            codes = target.encode(target.view(unit_range(torch.from_numpy(pixels).to(self._device))))
            return codes.unflatten(1, self.info.grid).cpu().numpy()

        return self._read_and_run(images, call)

    def detokenize(self, tokens: Array) -> Array:
        """Images float32 [b, c, h, w] in 0-1 from what `tokenize` gives.

        Errors: UserError for another shape, type or range, and where the model has no target.
        """
        target = self._needed_target()
        codes = checked_codes(tokens, target)

        def call(start: int, stop: int) -> np.ndarray:
            batch = torch.from_numpy(codes[start:stop]).to(self._device).flatten(1, 2)
            return target.decode(batch).clamp(0, 1).cpu().numpy()

        return self._run(len(codes), call)

    def _read_and_run(self, images: Images, call: Callable[[np.ndarray, slice], np.ndarray]) -> Array:
        given = listed(images)

        def batch(start: int, stop: int) -> np.ndarray:
            pixels = [read(given[position], position, self.preprocessing) for position in range(start, stop)]
            return call(np.stack(pixels), slice(start, stop))

        return self._run(len(given), batch)

    @torch.inference_mode()
    def _run(self, count: int, call: Callable[[int, int], np.ndarray]) -> Array:
        """Results of all batches; `call` gets where each begins and ends."""
        parts = []
        # For tqdm None is off where there is no terminal.
        shown = False if self.progress is None and count <= self.batch_size else self.progress
        with tqdm(total=count, unit="image", disable=None if shown is None else not shown) as bar:
            for start in range(0, count, self.batch_size):
                stop = min(start + self.batch_size, count)
                parts.append(call(start, stop))
                bar.update(stop - start)
        result = np.concatenate(parts)
        return torch.from_numpy(result) if self.as_torch else result

    def _needed_target(self) -> AnyTarget:
        if self._target is None:
            raise UserError(
                f"{self.info.name}: has no target (tokenizer) beside it; name one: load(..., target='models/tokenizer')"
            )
        return self._target


def load(
    source: str | Path,
    *,
    target: str | Path | None = None,
    device: Device = "auto",
    batch_size: int = 32,
    progress: bool | None = None,
    as_torch: bool = False,
) -> Model:
    """A bundle, trained weights (a file or its folder), or a timm model with its published weights (`timm:NAME`).

    `target`: file or folder of the tokenizer; without it the one beside the model, or of its workspace or the current
    one if it is the one that the model was trained with. `batch_size`: images at a time. `progress`: a bar always or
    never; by default on a terminal, for more than one batch. `as_torch`: results are CPU tensors in place of NumPy.

    Errors: UserError for what is none of these or cannot be read, a target that does not fit, a device that is not
    there, and timm weights that cannot be fetched.
    """
    if device not in get_args(Device):
        raise UserError(f"device: {device!r} is none of {', '.join(get_args(Device))}")
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} must be at least 1")
    path = Path(source)
    runner: Runner
    if (path / "bundle.json").is_file():
        bundle = open_bundle(path, device)
        # ONNX Runtime finds its own device; torch runs the target alone.
        place = choose_device("auto" if device == "cuda" else device)
        runner, num_outputs = BundleRunner(bundle), None
        loaded = _load_target(target, path, (bundle.info.model_extra or {}).get("origin", {}))
    else:
        place = choose_device(device)
        trained, folder = _load_weights(source)
        loaded = _load_target(target, folder, trained.origin)
        runner = TorchRunner(trained, loaded, place)
        num_outputs = trained.architecture.num_outputs if isinstance(trained.architecture, Architecture) else None
    if loaded is not None:
        check_target(loaded, str(source), runner.preprocessing, runner.info.patch_size, num_outputs)
        loaded.to(place)
    return Model(runner, loaded, place, batch_size, progress, as_torch)


def _load_weights(source: str | Path) -> tuple[Trained, Path | None]:
    """The weights and the folder that they lie in, None for those that timm fetches."""
    name, path = str(source), Path(source)
    if name.startswith(TIMM):
        return load_timm(name.removeprefix(TIMM)), None
    try:
        return load_trained(path), find_weights(path).parent
    except NotReady as error:
        raise UserError(f"{error}. load takes {SOURCES}") from None


def _load_target(given: str | Path | None, folder: Path | None, origin: dict[str, Any]) -> AnyTarget | None:
    """The target that was named, else the one beside the model, else the one of its workspace or of the current one.

    The last two only by the hash that `origin` names.
    """
    here = Workspace.here()
    if given is not None:
        file = Path(given) / here.target.name if Path(given).is_dir() else Path(given)
        return load_target(file)
    if folder is None:
        return None
    # models/NAME, so the workspace is two folders up.
    own = replace(here, root=folder.resolve().parent.parent)
    found = look_for_target(folder / here.target.name, origin, own.target, here.target)
    return load_target(found) if found else None
