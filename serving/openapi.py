"""What GET /openapi.json says of the two calls, with an example that can be sent and the answer it gets."""

from __future__ import annotations

import base64
import io
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


def embed(bundle: Bundle) -> dict[str, Any]:
    """The documentation of /embed."""
    file = _example_file(bundle)
    pixels = preprocess.prepare(preprocess.decode(file, max_pixels=10**6), bundle.info.preprocessing)
    answer = {
        "request_id": "example",
        "bundle_sha256": bundle.sha256,
        "grid": list(bundle.info.model.grid),
        "precision": bundle.precision,
        "shapes": {"pooled": [1, bundle.info.model.width]},
        "pooled": _embedded(bundle, pixels).tolist(),
    }
    outputs = dict.fromkeys(("pooled", "class", "patches", "attention"), _NUMBERS)
    properties = {**_COMMON, "shapes": {"type": "object"}, **outputs}
    schema = {"type": "object", "required": [*_COMMON, "shapes"], "properties": properties}
    form = {"type": "object", "required": ["images"], "properties": {"images": {"type": "array", "items": _FILE}}}
    answers = {JSON: {"schema": schema, "example": answer}, NPY: _BINARY, SAFETENSORS: _BINARY}
    return _documented(file, EmbedBody, form, answers)


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
    answers = {PNG: _BINARY, JSON: {"schema": schema}, NPY: _BINARY, SAFETENSORS: _BINARY}
    return _documented(_example_file(bundle), ReconstructBody, form, answers)


def _documented(
    file: bytes, body: type[EmbedBody], form: dict[str, Any], answers: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    content: dict[str, Any] = dict.fromkeys(RAW_TYPES, _BINARY)
    content[FORM] = {"schema": form}
    content[JSON] = {"schema": body.model_json_schema(), "example": {"images": [base64.b64encode(file).decode()]}}
    return {
        "openapi_extra": {"requestBody": {"required": True, "description": _BODY, "content": content}},
        "responses": {
            200: {"description": "by Accept", "content": answers},
            **{status: {"model": ErrorBody, "description": text} for status, text in _STATUSES.items()},
        },
    }


def _embedded(bundle: Bundle, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    try:
        return bundle.embed(pixels[None], ["pooled"])["pooled"]
    except Exception as error:  # as in `Bundle.open`
        raise BundleError(f"the encoder of the bundle cannot run: {error}") from error


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
