"""What `bundle.json` says of a bundle: the model, its files and their seals, the encoder's variants and how they did.

`read_info` reads it, `verify` holds a file against its seal.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serving.preprocess import Preprocessing

Output = Literal["patches", "class_token", "pooled", "class_attention"]
OUTPUTS: tuple[Output, ...] = get_args(Output)
Capability = Literal["embed", "reconstruct", "skip_reconstruct"]
Precision = Literal["float32", "float16", "int8"]
"""Of the encoder."""
WantedPrecision = Literal["auto", Precision]
"""What may be asked for."""


@dataclass(frozen=True)
class GraphFile:
    """The file that gives a capability, and the names its graph must have."""

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


GRAPHS: dict[Capability, GraphFile] = {
    "embed": GraphFile("encoder.onnx", ("images",), OUTPUTS),
    "reconstruct": GraphFile("reconstructor.onnx", ("images", "visible", "masked"), ("reconstruction",)),
    "skip_reconstruct": GraphFile("skip_reconstructor.onnx", ("images",), ("reconstruction",)),
}


class BundleError(RuntimeError):
    """A bundle that cannot be served; the message names the file, what was expected and what to do."""


class BundleMissingError(BundleError):
    """There is no bundle in the folder."""


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


class Agreement(_Section):
    """Cosine between the rows of a variant's output and those of float32, over real images: mean, and the worst."""

    mean: float
    min: float


class VariantInfo(_Section):
    """An encoder of another precision that passed its gate: its file, and what it was let through on.

    Accuracies are fractions, and changes are towards float32 (negative: worse); None where there were no labels.
    """

    file: str
    cosine: dict[str, Agreement]
    knn_top1: float | None
    knn_top1_change: float | None
    linear_top1: float | None
    linear_top1_change: float | None


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
    # Encoders of other precisions, by precision.
    variants: dict[str, VariantInfo] = {}
    # PNG files of validation images, to try the bundle with.
    examples: tuple[str, ...] = ()
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
        if self.capabilities.reconstruct and self.default_mask_ratio is None:
            raise ValueError("default_mask_ratio is missing, and capabilities.reconstruct is true")
        return self

    @model_validator(mode="after")
    def _files_are_sealed(self) -> BundleInfo:
        for name in self.files:
            if Path(name).name != name:
                raise ValueError(f"files.{name}: expected the plain name of a file in the bundle")
        for capability, graph in GRAPHS.items():
            if getattr(self.capabilities, capability) and graph.file not in self.files:
                raise ValueError(f"capabilities.{capability} is true, but files has no {graph.file}")
        for precision, variant in self.variants.items():
            if variant.file not in self.files:
                raise ValueError(f"variants.{precision}.file: files has no {variant.file}")
        for example in self.examples:
            if example not in self.files:
                raise ValueError(f"examples: files has no {example}")
        return self

    def choose(self, precision: WantedPrecision, *, on_cuda: bool) -> Precision:
        """The precision that runs where `precision` is asked for; BundleError where the bundle does not have it.

        "auto" is the variant made for the device: int8 is slow on CUDA, and float16 gains nothing on a CPU.
        """
        if precision == "auto":
            fastest: Precision = "float16" if on_cuda else "int8"
            return fastest if fastest in self.variants else "float32"
        if precision != "float32" and precision not in self.variants:
            raise BundleError(
                f"precision={precision}: this bundle has {', '.join(['float32', *self.variants])}. Take one of these "
                "or auto, or export the bundle with the variant (export.int8, export.fp16), which its gate may refuse"
            )
        return precision

    def encoder_file(self, precision: Precision) -> str:
        """The file of the encoder in a precision that the bundle has."""
        return GRAPHS["embed"].file if precision == "float32" else self.variants[precision].file


def read_info(folder: Path) -> tuple[BundleInfo, str]:
    """`bundle.json` and its SHA-256, which stands for the whole bundle: the file holds the hashes of the others."""
    path = folder / "bundle.json"
    try:
        raw = path.read_bytes()
    except PermissionError as error:
        raise BundleError(_forbidden(path)) from error
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


def _forbidden(path: Path) -> str:
    return (
        f"{path}: may not be read by the user as whom this runs (10001 in the server's image); "
        "`chmod -R a+rX` on the folder of the bundle opens it for everybody"
    )


def verify(path: Path, seal: FileInfo) -> None:
    remedy = "Copy or export the bundle again (`make repro`)"
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    except PermissionError as error:
        raise BundleError(_forbidden(path)) from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}), but bundle.json lists it. {remedy}") from error
    if (digest, size) != (seal.sha256, seal.bytes):
        raise BundleError(
            f"{path}: damaged: SHA-256 {digest} and {size} bytes; "
            f"bundle.json expects {seal.sha256} and {seal.bytes} bytes. {remedy}"
        )
