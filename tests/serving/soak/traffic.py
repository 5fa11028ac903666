"""Requests with known answers: drawn at random, sent, and compared with the NumPy twins of the tiny bundle."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from PIL import Image
from tiny_bundle import expected_features, expected_reconstruction, expected_skip

SIDE_PX = 32
NUM_PATCHES = 16
NAMES = {"pooled": "pooled", "class": "class_token", "patches": "patches", "attention": "class_attention"}
_LOSSLESS = ("PNG", "WEBP", "BMP", "TIFF", "NPY")
_FORMS = ("application/json", "application/x-npy", "application/x-safetensors")

Generator = np.random.Generator
Check = Callable[[httpx.Response], None]


@dataclass(frozen=True)
class Call:
    """A request, and what its answer must be: `check` for a success, or one of `refusals`."""

    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    check: Check | None = None
    refusals: tuple[int, ...] = ()

    def verify(self, response: httpx.Response) -> None:
        if self.check is None:
            assert response.status_code in self.refusals, (response.status_code, response.text[:300])
            assert response.json()["error"]["hint"]
            return
        assert response.status_code == 200, (response.status_code, response.text[:300])
        self.check(response)


def draw_pixels(rng: Generator, count: int = 1) -> NDArray[np.uint8]:
    """uint8 [count, 3, 32, 32]: the bundle's own size, so that nothing is resized."""
    return rng.integers(0, 256, (count, 3, SIDE_PX, SIDE_PX), dtype=np.uint8)


def encoded(pixels: NDArray[Any], form: str = "PNG", **options: Any) -> bytes:
    """uint8 [3, H, W] as a file."""
    file = io.BytesIO()
    if form == "NPY":
        np.save(file, pixels)
    else:
        lossless = {"lossless": True} if form == "WEBP" else {}
        Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, form, **lossless, **options)
    return file.getvalue()


def form_body(parts: list[tuple[str, bytes]]) -> tuple[bytes, str]:
    """A multipart body of file parts, and its Content-Type."""
    boundary = b"7c9e6679f3b04c1d"
    pieces = []
    for name, data in parts:
        head = f'Content-Disposition: form-data; name="{name}"; filename="x"\r\n\r\n'.encode()
        pieces += [b"--", boundary, b"\r\n", head, data, b"\r\n"]
    return b"".join([*pieces, b"--", boundary, b"--\r\n"]), f"multipart/form-data; boundary={boundary.decode()}"


def wrapped(rng: Generator, files: list[bytes], **extra: Any) -> tuple[bytes, dict[str, str]]:
    """The files in one of the kinds of body that can hold them, and the headers that go with it."""
    kinds = ["form", "json"] + (["raw"] if len(files) == 1 and not extra else [])
    kind = rng.choice(kinds)
    if kind == "raw":
        return files[0], {}
    if kind == "json":
        text = {"images": [base64.b64encode(file).decode() for file in files], **extra}
        return json.dumps(text).encode(), {"Content-Type": "application/json"}
    body, media_type = form_body([("images", file) for file in files])
    return body, {"Content-Type": media_type}


def good_call(rng: Generator) -> Call:
    """A request that must succeed, of any kind."""
    return draw_embedding(rng) if rng.random() < 0.6 else draw_reconstruction(rng)


def draw_embedding(rng: Generator, num_images: int | None = None) -> Call:
    """For so many images, by default one to four."""
    images = draw_pixels(rng, num_images or int(rng.integers(1, 5)))
    accept = str(rng.choice(_FORMS))
    names = [str(name) for name in rng.permutation(list(NAMES))[: 1 if "npy" in accept else rng.integers(1, 5)]]
    body, headers = wrapped(rng, [encoded(pixels, str(rng.choice(_LOSSLESS))) for pixels in images])

    def check(response: httpx.Response) -> None:
        arrays = read_arrays(response, names)
        expected = expected_features(images)
        for name in names:
            np.testing.assert_allclose(arrays[name], expected[NAMES[name]], atol=1e-5)

    return Call(f"/embed?outputs={','.join(names)}", body, {**headers, "Accept": accept}, check)


def draw_reconstruction(rng: Generator) -> Call:
    images = draw_pixels(rng)
    hidden = np.sort(rng.permutation(NUM_PATCHES)[: rng.integers(1, NUM_PATCHES)]).astype(np.int64)
    visible = np.setdiff1d(np.arange(NUM_PATCHES, dtype=np.int64), hidden)
    way = rng.choice(["query", "json", "mask", "skip"])
    expected = expected_skip(images) if way == "skip" else expected_reconstruction(images, visible[None], hidden[None])
    query, extra = "", {}
    if way == "query":
        query = f"?masked={','.join(map(str, hidden))}"
    elif way == "skip":
        query = "?skip_regressor=true"
    elif way == "json":
        extra = {"masked": hidden.tolist()}
    file = encoded(images[0], str(rng.choice(_LOSSLESS)))
    if way == "mask":
        body, media_type = form_body([("images", file), ("mask", _painted(hidden))])
        headers = {"Content-Type": media_type}
    elif way == "json":
        text = {"images": [base64.b64encode(file).decode()], **extra}
        body, headers = json.dumps(text).encode(), {"Content-Type": "application/json"}
    else:
        body, headers = wrapped(rng, [file])
    accept = str(rng.choice([*_FORMS, "image/png"]))

    def check(response: httpx.Response) -> None:
        if way != "skip":
            assert response.headers["x-masked-patches"] == ",".join(map(str, hidden))
        if accept == "image/png":
            picture = np.asarray(Image.open(io.BytesIO(response.content)), dtype=np.float64).transpose(2, 0, 1)
            np.testing.assert_allclose(picture, expected[0] * 255, atol=0.51)
        else:
            np.testing.assert_allclose(read_arrays(response, ["reconstruction"])["reconstruction"], expected, atol=1e-5)

    if accept == "image/png":
        query += ("&" if query else "?") + "view=completion"
    return Call(f"/reconstruct{query}", body, {**headers, "Accept": accept}, check)


def bad_call(rng: Generator) -> Call:
    """A request that must be refused."""
    file = encoded(draw_pixels(rng)[0])
    path = str(rng.choice(["/embed", "/reconstruct"]))
    kind = rng.choice(["cut", "text", "empty", "query", "accept", "type", "one of many", "json", "form"])
    if kind == "cut":
        return Call(path, file[: int(rng.integers(1, len(file) - 30))], refusals=(415,))
    if kind == "text":
        return Call(path, rng.bytes(int(rng.integers(1, 3000))), refusals=(413, 415, 422))
    if kind == "empty":
        return Call(path, b"", refusals=(400,))
    if kind == "query":
        return Call(f"{path}?nonsense={rng.integers(9)}", file, refusals=(422,))
    if kind == "accept":
        return Call(path, file, {"Accept": "text/html"}, refusals=(406,))
    if kind == "type":
        return Call(path, file, {"Content-Type": "text/plain"}, refusals=(415,))
    if kind == "json":
        return Call(path, b'{"images": ["!"]', {"Content-Type": "application/json"}, refusals=(422,))
    if kind == "form":
        return Call(path, file, {"Content-Type": "multipart/form-data; boundary=x"}, refusals=(400, 422))
    body, headers = wrapped(rng, [file, file[:-30], file])
    return Call("/embed", body, headers, refusals=(415,))


def read_arrays(response: httpx.Response, names: list[str]) -> dict[str, NDArray[Any]]:
    """The arrays of an answer of any form; npy has no names, so it is given that of `names`."""
    media_type = response.headers["content-type"]
    if media_type == "application/x-npy":
        return {names[0]: np.load(io.BytesIO(response.content), allow_pickle=False)}
    if media_type == "application/x-safetensors":
        loaded: dict[str, NDArray[Any]] = safetensors.numpy.load(response.content)
        return loaded
    content = response.json()
    return {name: np.array(content[name]) for name in names}


def _painted(hidden: NDArray[np.int64]) -> bytes:
    """A mask image that hides just these patches."""
    cells = np.zeros(NUM_PATCHES, np.uint8)
    cells[hidden] = 255
    file = io.BytesIO()
    Image.fromarray(cells.reshape(4, 4).repeat(5, axis=0).repeat(5, axis=1)).save(file, "PNG")
    return file.getvalue()


def connect(url: str) -> httpx.Client:
    """A client that costs little: without TLS and proxies there is nothing to load."""
    return httpx.Client(base_url=url, timeout=60, verify=False, trust_env=False)


def gauges(url: str) -> dict[str, float]:
    """What is admitted and queued, by series; every value is 0 when nothing is going on."""
    with connect(url) as client:
        text = client.get("/metrics").text
    found = re.findall(r"^(cae_(?:admitted_images|admitted_bytes|queue_images)\{.*\}) (\S+)$", text, re.MULTILINE)
    assert len(found) == 6
    return {name: float(value) for name, value in found}


def rss_mib(pid: int) -> float:
    """Memory of a process that is really there, in MiB."""
    (kib,) = re.findall(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(kib) / 1024


def peak_mib(pid: int) -> float:
    """The most that it ever had."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024


def refused(response: httpx.Response, *statuses: int) -> str:
    """The code of the error, which must have one of the statuses and be short whatever was sent."""
    assert response.status_code in statuses, (response.status_code, response.text[:500])
    assert len(response.content) < 10_000
    code: str = response.json()["error"]["code"]
    return code


def spoken(url: str, *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """What the server answers to these bytes until it closes, or says nothing for 2 seconds."""
    host, port = url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=2) as connection, suppress(OSError):
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause_s)
        while data := connection.recv(65536):
            received += data
    return received
