"""What the server refuses, and how: the same form for every error."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from http_answers import MAX_BODY_BYTES, NPY, array, encoded, refused
from numpy.typing import NDArray
from running_server import Server
from tiny_bundle import expected_features

Pixels = Callable[..., NDArray[np.uint8]]


@pytest.mark.parametrize(
    ("path", "query", "field"),
    [
        ("/embed", "outputs=pooled,colour", "outputs"),
        ("/embed", "outputs=", "outputs"),
        ("/embed", "output=pooled", "output"),
        ("/reconstruct", "mask_ratio=0", "mask_ratio"),
        ("/reconstruct", "mask_ratio=1", "mask_ratio"),
        ("/reconstruct", "mask_ratio=nan", "mask_ratio"),
        ("/reconstruct", "mask_ratio=half", "mask_ratio"),
        ("/reconstruct", "seed=-1", "seed"),
        ("/reconstruct", "seed=4294967296", "seed"),
        ("/reconstruct", "seed=1.5", "seed"),
        ("/reconstruct", "view=mosaic", "view"),
        ("/reconstruct", "skip_regressor=perhaps", "skip_regressor"),
        ("/reconstruct", "skip_regressor=true&seed=1", "seed"),
        ("/reconstruct", "maskratio=0.5", "maskratio"),
        ("/embed", "dtype=float64", "dtype"),
        ("/embed", "normalize=perhaps", "normalize"),
        ("/reconstruct", "mask_kind=round", "mask_kind"),
        ("/reconstruct", "masked=", "masked"),
        ("/reconstruct", "masked=1,x", "masked"),
        ("/reconstruct", "masked=16", "masked"),
        ("/reconstruct", "masked=3,3", "masked"),
        ("/reconstruct", "masked=" + ",".join(map(str, range(16))), "masked"),
        ("/reconstruct", "masked=1&seed=2", "seed"),
        ("/reconstruct", "masked=1&skip_regressor=true", "masked"),
    ],
)
def test_a_bad_field_is_named(http: httpx.Client, png: bytes, path: str, query: str, field: str) -> None:
    error = refused(http.post(f"{path}?{query}", content=png), 422, "bad_field")
    assert field in error["message"]


@pytest.mark.parametrize("path", ["/embed", "/reconstruct"])
class TestBothCallsRefuse:
    def test_an_empty_body(self, http: httpx.Client, path: str) -> None:
        refused(http.post(path), 400, "empty_body")

    def test_what_is_not_an_image(self, http: httpx.Client, path: str) -> None:
        error = refused(http.post(path, content=b"hello"), 415, "image_unsupported")
        assert "JPEG, PNG, WEBP, BMP, TIFF" in error["message"]

    def test_an_image_that_is_cut_off(self, http: httpx.Client, path: str, png: bytes) -> None:
        refused(http.post(path, content=png[: len(png) // 2]), 415, "image_truncated")

    def test_an_image_that_is_too_small(self, http: httpx.Client, path: str) -> None:
        refused(http.post(path, content=encoded(np.zeros((3, 1, 1), np.uint8))), 422, "image_too_small")

    def test_an_image_with_too_many_pixels(self, http: httpx.Client, path: str) -> None:
        bomb = encoded(np.zeros((3, 1001, 1000), np.uint8))
        assert len(bomb) < MAX_BODY_BYTES
        assert "1000000" in refused(http.post(path, content=bomb), 413, "image_too_large")["message"]

    def test_a_body_that_declares_too_many_bytes(self, http: httpx.Client, path: str) -> None:
        response = http.post(path, content=b"\0" * (MAX_BODY_BYTES + 1))
        assert str(MAX_BODY_BYTES) in refused(response, 413, "body_too_large")["message"]

    def test_a_chunked_body_that_grows_too_large(self, http: httpx.Client, path: str) -> None:
        response = http.post(path, content=(b"\0" * 10_000 for _ in range(30)))
        refused(response, 413, "body_too_large")

    @pytest.mark.parametrize("content_type", ["text/plain", "application/xml", "video/mp4"])
    def test_other_kinds_of_body(self, http: httpx.Client, path: str, content_type: str, png: bytes) -> None:
        response = http.post(path, content=png, headers={"Content-Type": content_type})
        assert "--data-binary" in refused(response, 415, "unsupported_body")["hint"]

    def test_an_answer_it_does_not_have(self, http: httpx.Client, path: str, png: bytes) -> None:
        response = http.post(path, content=png, headers={"Accept": "text/html"})
        assert "application/x-npy" in refused(response, 406, "not_acceptable")["message"]

    def test_other_methods(self, http: httpx.Client, path: str) -> None:
        response = http.get(path)
        refused(response, 405, "method_not_allowed")
        assert response.headers["allow"] == "POST"


def test_the_limit_on_bytes_is_inclusive(http: httpx.Client, png: bytes) -> None:
    # Bytes after the end of a PNG do no harm.
    body = png + b"\0" * (MAX_BODY_BYTES - len(png))
    assert http.post("/embed", content=body).status_code == 200
    assert http.post("/embed", content=(body[start : start + 9999] for start in range(0, len(body), 9999))).is_success


def test_a_declared_size_is_refused_before_the_body_is_sent(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nHost: test\r\nContent-Length: 999999999\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_an_unknown_path_has_the_same_form(http: httpx.Client) -> None:
    refused(http.get("/nowhere"), 404, "not_found")


def test_a_caller_that_hangs_up_leaves_no_trace(server: Server, http: httpx.Client, png: bytes) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(b"POST /embed HTTP/1.1\r\nHost: test\r\nContent-Length: 5000\r\n\r\n" + png[:100])
    assert http.post("/embed", content=png).status_code == 200
    assert "Traceback" not in server.log.read_text()


def test_corrupt_images_among_many_fail_alone(server: Server, random_pixels: Pixels) -> None:
    images = random_pixels(64, 3, 32, 32)
    bodies = [encoded(pixels) for pixels in images]
    corrupt = {5: bodies[5][:900], 20: b"hello", 40: bodies[40][:-40], 63: b"\x89PNG\r\n\x1a\n" + bytes(100)}

    with httpx.Client(base_url=server.url, timeout=30) as client, ThreadPoolExecutor(16) as pool:
        responses = list(
            pool.map(lambda i: client.post("/embed", content=corrupt.get(i, bodies[i]), headers=NPY), range(64))
        )
    expected = expected_features(images)["pooled"]
    for index, response in enumerate(responses):
        if index in corrupt:
            assert response.status_code == 415
        else:
            np.testing.assert_allclose(array(response)[0], expected[index], atol=1e-6)
