"""What GET /openapi.json says of the two calls, with an example that can be sent and the answer it gets."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serving import preprocess
from serving.answers import JSON, NPY, PNG, SAFETENSORS
from serving.bodies import FORM, RAW_TYPES, EmbedBody, ReconstructBody
from serving.bundle import Bundle
from serving.bundle_info import BundleError
from serving.errors import ErrorBody

_BODY = (
    f"Raw: one image file, or one NumPy file ({NPY}) with an array uint8 or uint16 [C, H, W]. The number of channels "
    "of the model stands in GET /info under bundle.preprocessing; grey and colour fit 1 and 3. The bytes decide, "
    "not the type. Several: file parts `images` of a form, or base64 in JSON."
)


def _header(description: str, required: bool = True, **schema: str) -> dict[str, Any]:
    return {"description": description, "required": required, "schema": {"type": "string", **schema}}


_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_FILE = {"type": "string", "format": "binary"}
_NUMBERS = {"type": "array", "items": {}}
_COMMON = {
    "request_id": {"type": "string"},
    "bundle_sha256": {"type": "string"},
    "grid": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
    "precision": {"type": "string"},
}
_STATUSES = {
    400: "no body, or one that cannot be read",
    401: "the key is missing or wrong",
    404: "the bundle does not have what was asked for",
    406: "no answer in a form that Accept takes",
    408: "the body took too long to arrive",
    413: "too many bytes or pixels",
    415: "not an image of a kind that is read, or a damaged one",
    422: "a field that will not do; the message names it",
    429: "the queue is full; Retry-After says when to ask again",
    500: "a fault in the server",
    503: "warming up, stopping, or the request waited too long",
}
_REQUEST_ID = {"X-Request-Id": _header("that of the request, or a new one; the server's log has it too")}
_SUCCESS = _REQUEST_ID | {
    "X-Patch-Grid": _header("rows and columns of patches, as in 14x14", pattern=r"^\d+x\d+$"),
    "X-Bundle-Sha256": _header("of bundle.json, which holds the hashes of all other files of the bundle"),
    "X-Precision": _header("what the encoder runs in: float32, float16 or int8"),
    "Server-Timing": _header("milliseconds of each stage"),
}
_MASK = {
    "X-Mask-Kind": _header("random, block, given (as indices) or image; absent where nothing was hidden", False),
    "X-Masked-Patches": _header("indices of what was hidden, row by row; `masked` takes them back", False),
    "X-Mask-Ratio": _header("of a mask that was drawn", False, type="number"),
    "X-Mask-Seed": _header("of a mask that was drawn", False, type="integer"),
}
_RETRY_AFTER = {"Retry-After": _header("seconds until another try is worth it", type="integer")}
_REFUSAL = {
    401: {"WWW-Authenticate": _header("Bearer")},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}


def embed(bundle: Bundle) -> dict[str, Any]:
    """The documentation of /embed."""
    file = _example_file(bundle)
    with _must_run("the encoder"):
        pooled = bundle.embed(_pixels(file, bundle), ["pooled"])["pooled"]
    answer = {**_about(bundle), "shapes": {"pooled": list(pooled.shape)}, "pooled": pooled.tolist()}
    outputs = dict.fromkeys(("pooled", "class", "patches", "attention"), _NUMBERS)
    properties = {**_COMMON, "shapes": {"type": "object"}, **outputs}
    schema = {"type": "object", "required": [*_COMMON, "shapes"], "properties": properties}
    form = {"type": "object", "required": ["images"], "properties": {"images": {"type": "array", "items": _FILE}}}
    answers = {JSON: {"schema": schema, "example": answer}, NPY: _BINARY, SAFETENSORS: _BINARY}
    return _documented(file, EmbedBody, form, answers, _SUCCESS)


def reconstruct(bundle: Bundle) -> dict[str, Any]:
    """The documentation of /reconstruct."""
    properties: dict[str, Any] = {
        **_COMMON,
        "mask_kind": {"enum": ["random", "block", "given", "image"]},
        "mask_ratio": {"type": ["number", "null"]},
        "seed": {"type": ["integer", "null"]},
        "visible": {"type": "array", "items": {"type": "integer"}},
        "masked": {"type": "array", "items": {"type": "integer"}},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "reconstruction": _NUMBERS,
    }
    schema = {"type": "object", "required": [*_COMMON, "shape", "reconstruction"], "properties": properties}
    form = {"type": "object", "required": ["images"], "properties": {"images": _FILE, "mask": _FILE}}
    file = _example_file(bundle)
    json = {"schema": schema}
    if bundle.info.capabilities.reconstruct:
        json["examples"] = {"short": {"summary": "cut to the first row of pixels", "value": _completed(file, bundle)}}
    answers = {PNG: _BINARY, JSON: json, NPY: _BINARY, SAFETENSORS: _BINARY}
    return _documented(file, ReconstructBody, form, answers, _SUCCESS | _MASK)


def _completed(file: bytes, bundle: Bundle) -> dict[str, Any]:
    """The answer to the example; the rest of the reconstruction would make megabytes of text."""
    pixels = _pixels(file, bundle)
    ratio, mask = bundle.draw_mask("random", None, 0)
    with _must_run("the reconstructor"):
        reconstruction = bundle.reconstruct(pixels, mask.visible[None], mask.masked[None])
    return {
        **_about(bundle),
        "mask_kind": "random",
        "mask_ratio": ratio,
        "seed": 0,
        "shape": list(reconstruction.shape),
        "reconstruction": reconstruction[:, :, :1].tolist(),
        "visible": mask.visible.tolist(),
        "masked": mask.masked.tolist(),
    }


def _documented(
    file: bytes,
    body: type[EmbedBody],
    form: dict[str, Any],
    answers: dict[str, dict[str, Any]],
    headers: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    content: dict[str, Any] = dict.fromkeys(RAW_TYPES, _BINARY)
    content[FORM] = {"schema": form}
    content[JSON] = {"schema": body.model_json_schema(), "example": {"images": [base64.b64encode(file).decode()]}}
    return {
        "openapi_extra": {"requestBody": {"required": True, "description": _BODY, "content": content}},
        "responses": {
            200: {"description": "by Accept", "content": answers, "headers": headers},
            **{
                status: {"model": ErrorBody, "description": text, "headers": _REQUEST_ID | _REFUSAL.get(status, {})}
                for status, text in _STATUSES.items()
            },
        },
    }


def _about(bundle: Bundle) -> dict[str, Any]:
    return {
        "request_id": "example",
        "bundle_sha256": bundle.sha256,
        "grid": list(bundle.info.model.grid),
        "precision": bundle.precision,
    }


@contextmanager
def _must_run(graph: str) -> Iterator[None]:
    """Errors: BundleError."""
    try:
        yield
    except Exception as error:  # as in `Bundle.open`
        raise BundleError(f"{graph} of the bundle cannot run: {error}") from error


def _pixels(file: bytes, bundle: Bundle) -> NDArray[np.uint8]:
    """As the model takes it, [1, C, H, W]."""
    return preprocess.prepare(preprocess.decode(file, max_pixels=10**6), bundle.info.preprocessing)[None]


def _example_file(bundle: Bundle) -> bytes:
    """A small picture of slanting light, as a file that fits the bundle."""
    channels, side = bundle.info.preprocessing.channels, 16
    bands, rows, columns = np.mgrid[:channels, :side, :side]
    light = rows * (bands + 1) + columns * (channels - bands)
    pixels = (light * 255 // (side * (channels + 1))).astype(np.uint8)
    file = io.BytesIO()
    if channels in (1, 3):
        Image.fromarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0)).save(file, "PNG")
    else:
        np.save(file, pixels)
    return file.getvalue()
