"""The bundle: a folder with an exported encoder, its reconstructors, and `bundle.json` that describes and seals them.

Its files and arrays: `encoder.onnx` turns `images` uint8 [B, C, H, W] into `patches` [B, N, D], `class_token` [B, D],
`pooled` [B, D] and `class_attention` [B, heads, N]; `reconstructor.onnx` turns `images`, `visible` int64 [B, V] and
`masked` int64 [B, M] into `reconstruction` float32 [B, C, H, W] in 0-1; `skip_reconstructor.onnx` does it from `images`
alone, without the regressor. N = h * w patches, row by row.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serving.machine import available_cpus, has_nvidia_device
from serving.masks import random_mask
from serving.preprocess import Preprocessing

Device = Literal["auto", "cpu", "cuda"]
Output = Literal["patches", "class_token", "pooled", "class_attention"]
OUTPUTS: tuple[Output, ...] = get_args(Output)
Capability = Literal["embed", "reconstruct", "skip_reconstruct"]

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class _Graph:
    """The file that gives a capability, and the names its graph must have."""

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


_GRAPHS: dict[Capability, _Graph] = {
    "embed": _Graph("encoder.onnx", ("images",), OUTPUTS),
    "reconstruct": _Graph("reconstructor.onnx", ("images", "visible", "masked"), ("reconstruction",)),
    "skip_reconstruct": _Graph("skip_reconstructor.onnx", ("images",), ("reconstruction",)),
}

_log = logging.getLogger(__name__)


class BundleError(RuntimeError):
    """A bundle that cannot be served; the message names the file, what was expected and what to do."""


class BundleMissingError(BundleError):
    """There is no bundle in the folder."""


class CapabilityError(LookupError):
    """The bundle has no graph for the call."""


class _Section(BaseModel):
    # Keys that a later exporter adds are kept, so that an older server still reads its bundles.
    model_config = ConfigDict(frozen=True, extra="allow")


class ModelInfo(_Section):
    """The encoder: `width` D, `grid` (h, w) in patches, `patch_size` in pixels, `target` what the decoder predicts."""

    name: str
    width: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    patch_size: int = Field(ge=1)
    grid: tuple[int, int]
    target: str | None = None

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]


class FileInfo(_Section):
    """The seal of one file: SHA-256 in hexadecimal digits, and its size."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Capabilities(_Section):
    """Which calls the bundle answers; an encoder without a decoder has no reconstructor."""

    embed: Literal[True]
    reconstruct: bool
    skip_reconstruct: bool


class BundleInfo(_Section):
    """`bundle.json`, format 1."""

    format: Literal[1]
    model: ModelInfo
    preprocessing: Preprocessing
    opset: int
    dtype: str
    files: dict[str, FileInfo]
    capabilities: Capabilities
    # Those that the encoder has: without a class token it gives neither the token nor its attention.
    outputs: tuple[Output, ...] = OUTPUTS
    default_mask_ratio: float | None = Field(None, gt=0, lt=1)
    params: dict[str, Any] = {}
    metrics: dict[str, Any] = {}

    @model_validator(mode="after")
    def _parts_fit_together(self) -> BundleInfo:
        rows, columns = self.model.grid
        covered = (rows * self.model.patch_size, columns * self.model.patch_size)
        size = (self.preprocessing.height, self.preprocessing.width)
        if covered != size:
            raise ValueError(
                f"model.grid {rows} x {columns} of patches of {self.model.patch_size} px covers {covered} px; "
                f"preprocessing gives {size}"
            )
        for name in self.files:
            if Path(name).name != name:
                raise ValueError(f"files.{name}: expected the plain name of a file in the bundle")
        for capability, graph in _GRAPHS.items():
            if getattr(self.capabilities, capability) and graph.file not in self.files:
                raise ValueError(f"capabilities.{capability} is true, but files has no {graph.file}")
        if self.capabilities.reconstruct and self.default_mask_ratio is None:
            raise ValueError("default_mask_ratio is missing, and capabilities.reconstruct is true")
        return self


class Bundle:
    """An opened bundle: verified, loaded into ONNX Runtime, ready to answer calls from many threads."""

    def __init__(
        self,
        info: BundleInfo,
        sha256: str,
        sessions: dict[Capability, onnxruntime.InferenceSession],
        provider: str,
        num_threads: int,
    ) -> None:
        self.info = info
        self.sha256 = sha256
        self.provider = provider
        self.num_threads = num_threads
        self._sessions = sessions

    @classmethod
    def open(cls, folder: Path, device: Device = "auto", num_threads: int | None = None) -> Bundle:
        """Read, verify and load the bundle in `folder`.

        `device` "cuda" refuses to start where CUDA does not really run; "auto" then takes the CPU, with a warning where
        an NVIDIA device is present. `num_threads` of one inference: by default the CPUs that this process may use.

        Errors: BundleError.
        """
        info, sha256 = _read_info(folder)
        for name, seal in info.files.items():
            _verify(folder / name, seal)
        threads = num_threads or available_cpus()
        loader = _Loader(folder, device, threads)
        sessions = {
            capability: loader.load(graph, info.outputs if capability == "embed" else graph.outputs)
            for capability, graph in _GRAPHS.items()
            if getattr(info.capabilities, capability)
        }
        return cls(info, sha256, sessions, loader.provider, threads)

    def warm(self) -> None:
        """Run every graph once, so that the first caller does not pay for allocations and kernel selection."""
        shape = (self.info.preprocessing.channels, self.info.preprocessing.height, self.info.preprocessing.width)
        images = np.zeros((1, *shape), dtype=np.uint8)
        self.embed(images)
        if self.info.capabilities.reconstruct:
            num_visible = self.info.model.num_patches - 1
            order = np.arange(num_visible + 1, dtype=np.int64)[None]
            self.reconstruct(images, order[:, :num_visible], order[:, num_visible:])
        if self.info.capabilities.skip_reconstruct:
            self.skip_reconstruct(images)

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
        if missing := [name for name in outputs if name not in self.info.outputs]:
            raise CapabilityError(
                f"the encoder of this bundle has no {missing[0]}; it gives {', '.join(self.info.outputs)}"
            )
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

    def random_mask(self, ratio: float | None, seed: int) -> tuple[float, NDArray[np.int64], NDArray[np.int64]]:
        """The ratio, by default the bundle's own, and indices of the visible [V] and the masked patches [M].

        Errors: CapabilityError without a reconstructor; ValueError as `masks.random_mask`.
        """
        self._session("reconstruct")
        chosen = self.info.default_mask_ratio if ratio is None else ratio
        assert chosen is not None  # a bundle with a reconstructor has one
        return chosen, *random_mask(self.info.model.num_patches, chosen, seed)

    def skip_reconstruct(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The images uint8 [B, C, H, W] through encoder and decoder without the regressor (Figure 3 of the paper).

        float32 [B, C, H, W] in 0-1. Errors: CapabilityError without a skip-reconstructor; ValueError as `embed`.
        """
        session = self._session("skip_reconstruct")
        self._check_images(images)
        return _only(session.run(["reconstruction"], {"images": images}))

    def _session(self, capability: Capability) -> onnxruntime.InferenceSession:
        if capability not in self._sessions:
            raise CapabilityError(
                f"this bundle has no {_GRAPHS[capability].file}: bundle.json says capabilities.{capability} is false. "
                "It was exported without a decoder, or without the tokenizer that its decoder predicts; export them "
                "together"
            )
        return self._sessions[capability]

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
        if self.provider == _CUDA:
            # CUDA and cuDNN may lie in wheels beside onnxruntime, where the system's loader does not look.
            onnxruntime.preload_dlls()

    def load(self, graph: _Graph, expected: Sequence[str]) -> onnxruntime.InferenceSession:
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


def _read_info(folder: Path) -> tuple[BundleInfo, str]:
    """`bundle.json` and its SHA-256, which stands for the whole bundle: the file holds the hashes of the others."""
    path = folder / "bundle.json"
    try:
        raw = path.read_bytes()
    except OSError as error:
        kind = BundleMissingError if isinstance(error, FileNotFoundError) else BundleError
        raise kind(
            f"{path}: cannot be read ({error.strerror}); expected the folder of a bundle. "
            "`make repro` writes one to models/bundle; name another with --bundle"
        ) from error
    try:
        info = BundleInfo.model_validate(json.loads(raw))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise BundleError(f"{path}: {key}: {first['msg']}. Export the bundle again with this version") from error
    except ValueError as error:
        raise BundleError(f"{path}: not JSON ({error}). Export the bundle again") from error
    return info, hashlib.sha256(raw).hexdigest()


def _verify(path: Path, seal: FileInfo) -> None:
    remedy = "Copy or export the bundle again (`make repro`)"
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}), but bundle.json lists it. {remedy}") from error
    if (digest, size) != (seal.sha256, seal.bytes):
        raise BundleError(
            f"{path}: damaged: SHA-256 {digest} and {size} bytes; "
            f"bundle.json expects {seal.sha256} and {seal.bytes} bytes. {remedy}"
        )


def _only(values: Sequence[Any]) -> NDArray[np.float32]:
    (value,) = values
    result: NDArray[np.float32] = value
    return result
