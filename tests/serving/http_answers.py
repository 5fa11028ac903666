"""Bodies for the server and readings of its answers, for tests that speak HTTP."""

from __future__ import annotations

import io
from typing import Any

import httpx
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from PIL import Image

MAX_BODY_BYTES = 200_000
MAX_PIXELS = 1_000_000
NPY = {"Accept": "application/x-npy"}
JSON = {"Accept": "application/json"}
SAFETENSORS = {"Accept": "application/x-safetensors"}


def encoded(pixels: NDArray[np.uint8], format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, format, **options)
    return buffer.getvalue()


def npy(pixels: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return buffer.getvalue()


def array(response: httpx.Response) -> NDArray[Any]:
    assert response.status_code == 200, response.text
    loaded: NDArray[Any] = np.load(io.BytesIO(response.content), allow_pickle=False)
    return loaded


def picture(response: httpx.Response) -> NDArray[np.uint8]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(response.content))).transpose(2, 0, 1)


def refused(response: httpx.Response, status: int, code: str) -> dict[str, str]:
    """The error of a refusal, which must have the one form that all have."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "request_id"}
    assert set(body["error"]) == {"code", "message", "hint"}
    assert body["error"]["code"] == code
    assert body["error"]["message"]
    assert body["error"]["hint"]
    assert response.headers["x-request-id"] == body["request_id"]
    error: dict[str, str] = body["error"]
    return error


def tensors(response: httpx.Response) -> dict[str, NDArray[Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-safetensors"
    loaded: dict[str, NDArray[Any]] = safetensors.numpy.load(response.content)
    return loaded
