"""The bundle: a folder with an exported encoder, its reconstructors, and `bundle.json` that describes and seals them.

Its files and arrays: `encoder.onnx` turns `images` uint8 [B, C, H, W] into `patches` [B, N, D], `class_token` [B, D],
`pooled` [B, D] and `class_attention` [B, heads, N]; `reconstructor.onnx` turns `images`, `visible` int64 [B, V] and
`masked` int64 [B, M] into `reconstruction` float32 [B, C, H, W] in 0-1; `skip_reconstructor.onnx` does it from `images`
alone, without the regressor. N = h * w patches, row by row. Variants of the encoder in int8 or float16, where the
bundle has them, take and give the same arrays.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from serving.bundle_info import (
    GRAPHS,
    BundleError,
    BundleInfo,
    Capability,
    GraphFile,
    Output,
    Precision,
    WantedPrecision,
    read_info,
    verify,
)
from serving.machine import available_cpus, has_nvidia_device
from serving.masks import Mask, MaskKind, block_mask, random_mask
from serving.ort import onnxruntime

Device = Literal["auto", "cpu", "cuda"]

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"

_log = logging.getLogger(__name__)


class CapabilityError(LookupError):
    """The bundle has no graph for the call."""


class Bundle:
    """An opened bundle: verified, loaded into ONNX Runtime, ready to answer calls from many threads."""

    def __init__(
        self,
        info: BundleInfo,
        sha256: str,
        sessions: dict[Capability, onnxruntime.InferenceSession],
        provider: str,
        num_threads: int,
        precision: Precision,
    ) -> None:
        self.info = info
        self.sha256 = sha256
        self.provider = provider
        self.num_threads = num_threads
        self.precision = precision
        self._sessions = sessions

    @classmethod
    def open(
        cls,
        folder: Path,
        device: Device = "auto",
        num_threads: int | None = None,
        precision: WantedPrecision = "float32",
    ) -> Bundle:
        """Read, verify and load the bundle in `folder`.

        `device` "cuda" refuses to start where CUDA does not really run; "auto" then takes the CPU, with a warning where
        an NVIDIA device is present. `num_threads` of one inference: by default the CPUs that this process may use.
        `precision` is the encoder's; "auto" takes the fastest that the bundle has for the device that really runs.

        Errors: BundleError.
        """
        info, sha256 = read_info(folder)
        for name, seal in info.files.items():
            verify(folder / name, seal)
        threads = num_threads or available_cpus()
        loader = _Loader(folder, device, threads)
        chosen, encoder = loader.load_encoder(info, precision)
        sessions: dict[Capability, onnxruntime.InferenceSession] = {"embed": encoder}
        for capability, graph in GRAPHS.items():
            if capability != "embed" and getattr(info.capabilities, capability):
                sessions[capability] = loader.load(graph, graph.outputs)
        opened = cls(info, sha256, sessions, loader.provider, threads, chosen)
        opened._check_sizes(folder)
        return opened

    @property
    def on_cuda(self) -> bool:
        return self.provider == _CUDA

    def embed(
        self, images: NDArray[np.uint8], outputs: Sequence[Output] | None = None
    ) -> dict[Output, NDArray[np.float32]]:
        """Features of `images` uint8 [B, C, H, W] by name; shapes are in the module's docstring.

        Only `outputs` are handed over, by default all that the encoder has. The time is nearly the same for any of
        them: they share the encoder's blocks.

        Errors: ValueError for a wrong shape or type; CapabilityError for an output that the encoder does not have.
        """
        self._check_images(images)
        outputs = outputs or self.info.outputs
        self.check_outputs(outputs)
        values = self._sessions["embed"].run(list(outputs), {"images": images})
        return dict(zip(outputs, values, strict=True))

    def reconstruct(
        self, images: NDArray[np.uint8], visible: NDArray[np.int64], masked: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """The images completed from their visible patches, float32 [B, C, H, W] in 0-1.

        `images` uint8 [B, C, H, W]; `visible` int64 [B, V] and `masked` int64 [B, M] are patch indices, row by row.

        Errors: CapabilityError without a reconstructor; ValueError for a wrong shape, type or index.
        """
        session = self._session("reconstruct")
        self._check_images(images)
        for name, indices in (("visible", visible), ("masked", masked)):
            self._check_indices(name, indices, len(images))
        return _only(session.run(["reconstruction"], {"images": images, "visible": visible, "masked": masked}))

    def draw_mask(self, kind: MaskKind, ratio: float | None, seed: int) -> tuple[float, Mask]:
        """The ratio, by default the bundle's own, and the mask drawn with it.

        Errors: CapabilityError without a reconstructor; ValueError as `masks.random_mask`.
        """
        self.check_capability("reconstruct")
        chosen = self.info.default_mask_ratio if ratio is None else ratio
        assert chosen is not None  # a bundle with a reconstructor has one
        model = self.info.model
        if kind == "block":
            return chosen, block_mask(model.grid, chosen, seed)
        return chosen, random_mask(model.num_patches, chosen, seed)

    def skip_reconstruct(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The images uint8 [B, C, H, W] through encoder and decoder without the regressor (Figure 3 of the paper).

        float32 [B, C, H, W] in 0-1. Errors: CapabilityError without a skip-reconstructor; ValueError as `embed`.
        """
        session = self._session("skip_reconstruct")
        self._check_images(images)
        return _only(session.run(["reconstruction"], {"images": images}))

    def check_outputs(self, outputs: Sequence[Output]) -> None:
        """Errors: CapabilityError for an output that the encoder does not have."""
        if missing := [name for name in outputs if name not in self.info.outputs]:
            raise CapabilityError(
                f"the encoder of this bundle has no {missing[0]}; it gives {', '.join(self.info.outputs)}"
            )

    def check_capability(self, capability: Capability) -> None:
        """Errors: CapabilityError where the bundle has no graph for it."""
        if capability not in self._sessions:
            raise CapabilityError(
                f"this bundle has no {GRAPHS[capability].file}: bundle.json says capabilities.{capability} is false. "
                "It was exported without a decoder, or without the tokenizer that its decoder predicts; export them "
                "together"
            )

    def _session(self, capability: Capability) -> onnxruntime.InferenceSession:
        self.check_capability(capability)
        return self._sessions[capability]

    def _check_sizes(self, folder: Path) -> None:
        """Errors: BundleError where a graph takes other images than bundle.json says."""
        expected = [self.info.preprocessing.channels, self.info.preprocessing.height, self.info.preprocessing.width]
        for capability, session in self._sessions.items():
            found = next(node.shape[1:] for node in session.get_inputs() if node.name == "images")
            if found != expected:
                raise BundleError(
                    f"{folder / GRAPHS[capability].file}: takes images of {found}, but bundle.json says {expected} "
                    "(channels, height, width). Export the bundle again"
                )

    def _check_images(self, images: NDArray[np.uint8]) -> None:
        expected = (self.info.preprocessing.channels, self.info.preprocessing.height, self.info.preprocessing.width)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected or len(images) == 0:
            raise ValueError(
                f"images is {images.dtype} {list(images.shape)}; expected uint8 [B, {', '.join(map(str, expected))}]"
            )

    def _check_indices(self, name: str, indices: NDArray[np.int64], batch: int) -> None:
        if indices.dtype != np.int64 or indices.ndim != 2 or indices.shape[0] != batch or indices.shape[1] == 0:
            raise ValueError(
                f"{name} is {indices.dtype} {list(indices.shape)}; expected int64 [{batch}, at least 1 patch]"
            )
        num_patches = self.info.model.num_patches
        if indices.min() < 0 or indices.max() >= num_patches:
            raise ValueError(
                f"{name} has indices from {indices.min()} to {indices.max()}; "
                f"the patches are numbered 0 to {num_patches - 1}"
            )


class _Loader:
    """Makes the sessions of one bundle, all on the same provider."""

    def __init__(self, folder: Path, device: Device, num_threads: int) -> None:
        self.provider = _wanted_provider(device)
        self._folder = folder
        self._device = device
        self._options = onnxruntime.SessionOptions()
        self._options.intra_op_num_threads = num_threads
        self._options.inter_op_num_threads = 1
        # Threads spin while a batch runs, or two threads would gain less; after it they leave the cores to others.
        self._options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.provider == _CUDA:
            # CUDA and cuDNN may lie in wheels beside onnxruntime, where the system's loader does not look.
            onnxruntime.preload_dlls()

    def load_encoder(
        self, info: BundleInfo, precision: WantedPrecision
    ) -> tuple[Precision, onnxruntime.InferenceSession]:
        """The encoder, and the precision that it has; call it before `load`."""
        asked = self.provider
        chosen = info.choose(precision, on_cuda=asked == _CUDA)
        session = self.load(replace(GRAPHS["embed"], file=info.encoder_file(chosen)), info.outputs)
        if precision == "auto" and self.provider != asked:
            # CUDA did not start, and another variant may be the fast one on the CPU.
            return self.load_encoder(info, precision)
        return chosen, session

    def load(self, graph: GraphFile, expected: Sequence[str]) -> onnxruntime.InferenceSession:
        path = self._folder / graph.file
        providers = [_CUDA, _CPU] if self.provider == _CUDA else [_CPU]
        try:
            session = onnxruntime.InferenceSession(path, self._options, providers=providers)
        except Exception as error:  # onnxruntime's error types have no common base that is public
            raise BundleError(f"{path}: onnxruntime {onnxruntime.__version__} cannot load it: {error}") from error
        inputs = tuple(node.name for node in session.get_inputs())
        outputs = {node.name for node in session.get_outputs()}
        if set(inputs) != set(graph.inputs) or not outputs.issuperset(expected):
            raise BundleError(
                f"{path}: the graph has inputs {sorted(inputs)} and outputs {sorted(outputs)}; expected inputs "
                f"{list(graph.inputs)} and outputs {list(expected)}. Export it again with this version"
            )
        # onnxruntime falls back to the CPU in silence, so what it was asked for says nothing.
        if session.get_providers()[0] != self.provider:
            self._fall_back()
        return session

    def _fall_back(self) -> None:
        reason = (
            "onnxruntime could not start CUDA (its own message on stderr names the library that is missing or too "
            'old); install onnxruntime-gpu with its extras "cuda,cudnn" and a driver that supports them'
        )
        if self._device == "cuda":
            raise BundleError(f"device=cuda: {reason}, or use device=cpu")
        _log.warning("device=auto runs on the CPU: %s", reason)
        self.provider = _CPU


def _wanted_provider(device: Device) -> str:
    """The provider to ask for. Asking for CUDA where it cannot be would only put onnxruntime's error on stderr."""
    if device == "cpu":
        return _CPU
    if _CUDA not in onnxruntime.get_available_providers():
        obstacle = "this onnxruntime is built without CUDA; install onnxruntime-gpu in its place"
    elif not has_nvidia_device():
        obstacle = "no NVIDIA device is visible to this process; check the driver, or the container's GPU reservation"
    else:
        return _CUDA
    if device == "cuda":
        raise BundleError(f"device=cuda: {obstacle}, or use device=cpu")
    return _CPU


def _only(values: Sequence[Any]) -> NDArray[np.float32]:
    (value,) = values
    result: NDArray[np.float32] = value
    return result
