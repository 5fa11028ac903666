"""The form of an answer: choosing it from the Accept header, and writing arrays as JSON, npy or safetensors."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
import safetensors.numpy
from numpy.typing import NDArray

from serving.errors import ApiError

JSON = "application/json"
NPY = "application/x-npy"
SAFETENSORS = "application/x-safetensors"
PNG = "image/png"


def negotiate(accept: str | None, offered: Sequence[str], hint: str) -> str:
    """The media type to answer with: of `offered` the one the caller likes best, the first where it is equal.

    `accept` is the Accept header (RFC 9110 section 12.5.1: wildcards, q values, the most specific range decides); None
    takes anything. A range that cannot be parsed is passed over.

    Errors: ApiError 406, listing what is offered, with `hint`.
    """
    ranges = [{"type": "*/*", "q": 1.0}] if accept is None or not accept.strip() else _ranges(accept)
    best, best_quality = "", 0.0
    for media_type in offered:
        quality = _quality(media_type, ranges)
        if quality > best_quality:
            best, best_quality = media_type, quality
    if not best:
        raise ApiError(406, "not_acceptable", f"Accept: {accept}; this call can answer {', '.join(offered)}", hint)
    return best


def _ranges(accept: str) -> list[dict[str, Any]]:
    ranges = []
    for part in accept.split(","):
        media_type, *parameters = (item.strip().lower() for item in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    quality = float(parameter[2:])
                except ValueError:
                    quality = 0.0
        ranges.append({"type": media_type, "q": quality})
    return ranges


def _quality(media_type: str, ranges: Sequence[Mapping[str, Any]]) -> float:
    family = media_type.split("/")[0] + "/*"
    for pattern in (media_type, family, "*/*"):
        matches = [item["q"] for item in ranges if item["type"] == pattern]
        if matches:
            return float(max(matches))
    return 0.0


def written(
    form: str, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, str], described: Mapping[str, Any]
) -> bytes:
    """The arrays in one of the forms.

    JSON holds `about`, `described` and the arrays as nested lists of numbers that read back to the same values;
    safetensors the arrays, with `about` in its head; npy the first array alone.
    """
    if form == NPY:
        buffer = io.BytesIO()
        np.save(buffer, next(iter(arrays.values())), allow_pickle=False)
        return buffer.getvalue()
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    if form == SAFETENSORS:
        return safetensors.numpy.save(contiguous, dict(about))
    return orjson.dumps({**about, **described, **contiguous}, option=orjson.OPT_SERIALIZE_NUMPY)
