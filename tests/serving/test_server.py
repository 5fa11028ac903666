"""The server as its callers meet it: a real process, real HTTP, a real bundle."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from running_server import Server, running
from tiny_bundle import (
    DEFAULT_MASK_RATIO,
    expected_features,
    expected_reconstruction,
    expected_skip,
    write_tiny_bundle,
)

from serving.app import create_app
from serving.bundle import Bundle
from serving.masks import paste, random_mask
from serving.settings import Settings

Pixels = Callable[..., NDArray[np.uint8]]
MAX_BODY_BYTES = 200_000
NPY = {"Accept": "application/x-npy"}
JSON = {"Accept": "application/json"}


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = {"CAE_SERVING_MAX_BODY_BYTES": str(MAX_BODY_BYTES), "CAE_SERVING_MAX_PIXELS": "1000000"}
    with running(tiny_bundle, tmp_path_factory.mktemp("server") / "log", limits) as running_server:
        yield running_server
        assert "Traceback" not in running_server.log.read_text()


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def image(random_pixels: Pixels) -> NDArray[np.uint8]:
    """[3, 32, 32]: the bundle's own size, so that nothing is resized."""
    return random_pixels(3, 32, 32)


@pytest.fixture(scope="module")
def png(image: NDArray[np.uint8]) -> bytes:
    return encoded(image)


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


# /embed


def test_embed_answers_the_pooled_features_as_json(
    http: httpx.Client, png: bytes, image: NDArray[np.uint8], tiny_bundle: Path
) -> None:
    response = http.post("/embed", content=png)
    body = response.json()
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert {"pooled", "class", "patches", "attention"} & set(body) == {"pooled"}
    assert body["shapes"] == {"pooled": [1, 3]}
    np.testing.assert_allclose(body["pooled"], expected_features(image[None])["pooled"], atol=1e-6)
    assert body["grid"] == [4, 4]
    assert response.headers["x-patch-grid"] == "4x4"
    assert body["bundle_sha256"] == response.headers["x-bundle-sha256"] == Bundle.open(tiny_bundle, "cpu").sha256
    assert body["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("asked", "name"),
    [("pooled", "pooled"), ("class", "class_token"), ("patches", "patches"), ("attention", "class_attention")],
)
def test_each_output_has_its_name_and_values(
    http: httpx.Client, png: bytes, image: NDArray[np.uint8], asked: str, name: str
) -> None:
    expected = expected_features(image[None])[name]
    binary = array(http.post("/embed", content=png, params={"outputs": asked}, headers=NPY))
    text = http.post("/embed", content=png, params={"outputs": asked}).json()
    assert binary.dtype == np.float32
    np.testing.assert_allclose(binary, expected, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(text[asked], np.float32), binary)
    assert text["shapes"][asked] == list(expected.shape)


def test_several_outputs_come_in_one_json_and_not_in_one_npy(http: httpx.Client, png: bytes) -> None:
    several = {"outputs": "patches,class,patches"}
    body = http.post("/embed", content=png, params=several).json()
    assert {"pooled", "class", "patches", "attention"} & set(body) == {"patches", "class"}
    assert list(body["shapes"]) == ["patches", "class"]
    error = refused(http.post("/embed", content=png, params=several, headers=NPY), 406, "not_acceptable")
    assert "one output" in error["hint"]
    either = {"Accept": "application/x-npy, application/json;q=0.1"}
    assert (
        http.post("/embed", content=png, params=several, headers=either).headers["content-type"] == "application/json"
    )


def test_the_image_is_turned_upright(http: httpx.Client, image: NDArray[np.uint8]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = http.post("/embed", content=encoded(image, exif=exif), params={"outputs": "patches"}, headers=NPY)
    upright = np.rot90(image, -1, axes=(1, 2))
    np.testing.assert_allclose(array(turned), expected_features(upright[None])["patches"], atol=1e-6)


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95})],
)
def test_every_format_is_read(http: httpx.Client, format: str, options: dict[str, Any]) -> None:
    smooth = np.stack([np.add.outer(np.arange(32) * k, np.arange(32) * 2) for k in (1, 2, 3)]).astype(np.uint8)
    got = array(
        http.post("/embed", content=encoded(smooth, format, **options), params={"outputs": "patches"}, headers=NPY)
    )
    tolerance = 0.02 if format == "JPEG" else 1e-6
    np.testing.assert_allclose(got, expected_features(smooth[None])["patches"], atol=tolerance)


@pytest.mark.parametrize(
    "content_type", ["image/png", "image/jpeg", "application/octet-stream", "application/x-www-form-urlencoded", None]
)
def test_the_bytes_decide_and_not_the_content_type(http: httpx.Client, png: bytes, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    assert http.post("/embed", content=png, headers=headers).status_code == 200


# /reconstruct


def test_reconstruct_pastes_the_hidden_patches_by_default(
    http: httpx.Client, png: bytes, image: NDArray[np.uint8]
) -> None:
    response = http.post("/reconstruct", content=png)
    visible, masked = random_mask(16, DEFAULT_MASK_RATIO, 0)
    reconstruction = expected_reconstruction(image[None], visible[None], masked[None])[0].astype(np.float32)
    got = picture(response).astype(int)
    np.testing.assert_allclose(got, paste(image, reconstruction, masked, 8).astype(int), atol=1)
    shown = np.isin(np.arange(16), visible).reshape(4, 4).repeat(8, 0).repeat(8, 1)
    np.testing.assert_array_equal(got[:, shown], image[:, shown])


def test_arrays_and_mask_come_as_json_and_npy(http: httpx.Client, png: bytes, image: NDArray[np.uint8]) -> None:
    query = {"mask_ratio": "0.75", "seed": "3"}
    body = http.post("/reconstruct", content=png, params=query, headers=JSON).json()
    visible, masked = random_mask(16, 0.75, 3)
    assert (body["visible"], body["masked"]) == (visible.tolist(), masked.tolist())
    assert (body["mask_ratio"], body["seed"], body["shape"]) == (0.75, 3, [1, 3, 32, 32])
    got = np.asarray(body["reconstruction"], np.float32)
    np.testing.assert_allclose(got, expected_reconstruction(image[None], visible[None], masked[None]), atol=1e-6)
    binary = array(http.post("/reconstruct", content=png, params=query, headers=NPY))
    np.testing.assert_array_equal(binary, got)


@pytest.mark.parametrize(
    "query", [{}, {"seed": "5"}, {"mask_ratio": "0.3", "seed": "4294967295"}, {"mask_ratio": "1e-3"}]
)
def test_the_echoed_mask_repeats_the_same_picture(http: httpx.Client, png: bytes, query: dict[str, str]) -> None:
    first = http.post("/reconstruct", content=png, params=query)
    echoed = {"mask_ratio": first.headers["x-mask-ratio"], "seed": first.headers["x-mask-seed"]}
    again = http.post("/reconstruct", content=png, params=echoed)
    assert again.content == first.content
    masked = [int(index) for index in first.headers["x-masked-patches"].split(",")]
    assert masked == random_mask(16, float(echoed["mask_ratio"]), int(echoed["seed"]))[1].tolist()


def test_another_seed_hides_other_patches(http: httpx.Client, png: bytes) -> None:
    masks = {
        http.post("/reconstruct", content=png, params={"seed": seed}).headers["x-masked-patches"] for seed in range(4)
    }
    assert len(masks) == 4


def test_every_view_is_drawn(http: httpx.Client, png: bytes, image: NDArray[np.uint8]) -> None:
    views = {
        view: picture(http.post("/reconstruct", content=png, params={"view": view}))
        for view in ("completion", "pasted", "side_by_side")
    }
    assert views["completion"].shape == (3, 32, 32)
    assert views["side_by_side"].shape == (3, 32, 96)
    np.testing.assert_array_equal(views["side_by_side"][:, :, :32], image)
    np.testing.assert_array_equal(views["side_by_side"][:, :, 64:], views["pasted"])
    assert (views["completion"] != views["pasted"]).any()


def test_the_path_without_regressor_hides_nothing(http: httpx.Client, png: bytes, image: NDArray[np.uint8]) -> None:
    skip = {"skip_regressor": "true"}
    response = http.post("/reconstruct", content=png, params=skip)
    assert not any(name.startswith("x-mask") for name in response.headers)
    np.testing.assert_array_equal(picture(response), 255 - image)
    body = http.post("/reconstruct", content=png, params=skip, headers=JSON).json()
    assert "masked" not in body
    assert "seed" not in body
    np.testing.assert_allclose(body["reconstruction"], expected_skip(image[None]), atol=1e-6)


def test_grey_bundles_take_and_give_grey(tmp_path: Path, random_pixels: Pixels) -> None:
    folder = write_tiny_bundle(tmp_path / "bundle", channels=1, size=(16, 24), reconstructors=False)
    grey = random_pixels(1, 16, 24)
    buffer = io.BytesIO()
    Image.fromarray(grey[0]).save(buffer, "PNG")
    with running(folder, tmp_path / "log", {}) as server:
        pooled = array(httpx.post(server.url + "/embed", content=buffer.getvalue(), headers=NPY))
        np.testing.assert_allclose(pooled, expected_features(grey[None])["pooled"], atol=1e-6)
        for query in ("", "?skip_regressor=true"):
            response = httpx.post(server.url + "/reconstruct" + query, content=buffer.getvalue())
            assert "capabilities" in refused(response, 404, "capability_absent")["message"]


def test_any_number_of_channels_comes_as_a_numpy_file(tmp_path: Path, random_pixels: Pixels, png: bytes) -> None:
    folder = write_tiny_bundle(tmp_path / "bundle", channels=13, size=(24, 32))
    pixels = random_pixels(13, 24, 32)
    body = npy(pixels)
    visible, masked = random_mask(12, DEFAULT_MASK_RATIO, 0)
    reconstruction = expected_reconstruction(pixels[None], visible[None], masked[None])
    with running(folder, tmp_path / "log", {}) as server, httpx.Client(base_url=server.url) as client:
        # 16 bits, channels last, any type of body: the same pixels.
        deep = npy(pixels.transpose(1, 2, 0).astype(np.uint16) * 257)
        for content, content_type in ((body, NPY["Accept"]), (deep, NPY["Accept"]), (body, "image/x-anything")):
            headers = {**NPY, "Content-Type": content_type}
            patches = array(client.post("/embed", content=content, params={"outputs": "patches"}, headers=headers))
            np.testing.assert_allclose(patches, expected_features(pixels[None])["patches"], atol=1e-6)
        got = array(client.post("/reconstruct", content=body, headers=NPY))
        np.testing.assert_allclose(got, reconstruction, atol=1e-6)
        drawn = picture(client.post("/reconstruct", content=body, params={"view": "side_by_side"}))
        assert drawn.shape == (3, 24, 96)
        np.testing.assert_array_equal(drawn[..., :32], pixels[:3])
        error = refused(client.post("/embed", content=png), 415, "image_unsupported")
        assert "3 channels, expected 13" in error["message"]
        assert ".npy" in error["hint"]
        refused(client.post("/embed", content=body[:-1]), 415, "image_truncated")
        refused(client.post("/embed", content=npy(pixels.astype(np.float32))), 415, "image_unsupported")
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_numpy_file_of_three_channels_is_a_colour_image(http: httpx.Client, image: NDArray[np.uint8]) -> None:
    answer = array(http.post("/embed", content=npy(image), headers={**NPY, "Content-Type": "application/x-npy"}))
    np.testing.assert_allclose(answer, expected_features(image[None])["pooled"], atol=1e-6)
    error = refused(http.post("/embed", content=npy(image[:2])), 415, "image_unsupported")
    assert "2 channels, expected 3" in error["message"]


# Refusals


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

    @pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=x", "text/plain"])
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


# Ids, health, information


@pytest.mark.parametrize(("given", "kept"), [("job-7.a_B", True), ("x" * 65, False), ("a b", False), ("", False)])
def test_a_request_id_is_kept_if_it_is_harmless(http: httpx.Client, given: str, kept: bool) -> None:
    returned = http.get("/health/live", headers={"X-Request-Id": given}).headers["x-request-id"]
    assert (returned == given) is kept
    assert returned


def test_a_warmed_server_is_live_and_ready(http: httpx.Client) -> None:
    assert http.get("/health/live").json() == {"status": "live"}
    assert http.get("/health/ready").json() == {"status": "ready"}


def test_before_it_is_warmed_it_is_live_and_refuses(tiny_bundle: Path, png: bytes) -> None:
    """The application without its lifespan, which is what warms it."""
    app = create_app(Settings(bundle=tiny_bundle), Bundle.open(tiny_bundle, "cpu"))

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            assert (await client.get("/health/live")).status_code == 200
            refused(await client.get("/health/ready"), 503, "not_ready")
            refused(await client.post("/embed", content=png), 503, "not_ready")

    anyio.run(ask)


def test_a_failure_of_the_server_is_a_500_in_the_same_form(tiny_bundle: Path, png: bytes) -> None:
    bundle = Bundle.open(tiny_bundle, "cpu")
    app = create_app(Settings(bundle=tiny_bundle), bundle)

    async def ask() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://t") as client,
        ):
            # As if the graph had broken after it was warmed.
            bundle._sessions.clear()
            error = refused(await client.post("/embed", content=png), 500, "internal")
            assert "KeyError" not in str(error)

    anyio.run(ask)


def test_info_tells_what_runs_and_what_is_allowed(http: httpx.Client) -> None:
    info = http.get("/info").json()
    assert info["device"]["asked"] == "cpu"
    assert info["device"]["provider"] == "CPUExecutionProvider"
    assert info["limits"] == {"max_body_bytes": MAX_BODY_BYTES, "max_pixels": 1000000, "min_side_px": 8}
    assert info["bundle"]["preprocessing"]["height"] == 32
    assert info["bundle"]["capabilities"]["reconstruct"] is True
    assert {"python", "onnxruntime", "pillow", "numpy"} <= set(info["versions"])


def test_openapi_describes_raw_images_and_every_field(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/embed", "/reconstruct", "/info", "/health/live", "/health/ready"}
    for path, fields in (("/embed", {"outputs"}), ("/reconstruct", {"mask_ratio", "seed", "skip_regressor", "view"})):
        operation = paths[path]["post"]
        for body in ("image/*", "application/x-npy"):
            assert operation["requestBody"]["content"][body]["schema"] == {"type": "string", "format": "binary"}
        assert "[C, H, W]" in operation["requestBody"]["description"]
        assert {parameter["name"] for parameter in operation["parameters"]} == fields
        assert {"200", "400", "404", "406", "413", "415", "422", "503"} <= set(operation["responses"])
        assert "application/x-npy" in operation["responses"]["200"]["content"]
