"""The client against a real server, and against one that is busy at first."""

from __future__ import annotations

import asyncio
import io
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from numpy.typing import NDArray
from PIL import Image
from running_server import ROOT, Server, running
from tiny_bundle import DEFAULT_MASK_RATIO, expected_features, expected_reconstruction, expected_skip

from serving.client import AsyncClient, Client, ServerError
from serving.masks import random_mask

API_KEY = "a key of the tests"


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running(tiny_bundle, log, {"CAE_SERVING_API_KEY": API_KEY}) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def image(random_pixels: Callable[..., NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """[3, 32, 32]: the bundle's own size, so that nothing is resized."""
    return random_pixels(3, 32, 32)


@pytest.fixture
def folder(tmp_path: Path, random_pixels: Callable[..., NDArray[np.uint8]]) -> Path:
    """Twelve pictures in two folders, one file that is none, and one of another kind."""
    for number in range(12):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, np.roll(random_pixels(3, 32, 32), number, axis=1))
    (tmp_path / "photos/a/broken.jpg").write_bytes(b"no picture")
    (tmp_path / "photos/notes.txt").write_text("no image by its name")
    return tmp_path / "photos"


def write_png(path: Path, pixels: NDArray[np.uint8]) -> Path:
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(path, "PNG")
    return path


class Waited:
    """`AsyncClient` with the calls of `Client`, so that one test promises the same of both."""

    def __init__(self, base_url: str, **options: Any) -> None:
        self._base_url, self._options = base_url, options

    def __getattr__(self, call: str) -> Callable[..., Any]:
        async def ask(*arguments: Any, **options: Any) -> Any:
            async with AsyncClient(self._base_url, **self._options) as client:
                return await getattr(client, call)(*arguments, **options)

        return lambda *arguments, **options: asyncio.run(ask(*arguments, **options))


@pytest.fixture(params=[Client, Waited], ids=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(kind: Any, server: Server) -> Any:
    return kind(server.url, api_key=API_KEY)


def test_a_path_bytes_and_an_array_give_the_same_features(
    client: Any, image: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = write_png(tmp_path / "image.png", image)
    features = client.embed(image)
    assert (features.shape, features.dtype) == ((1, 3), np.float32)
    np.testing.assert_allclose(features, expected_features(image[None])["pooled"], atol=1e-6)
    for same in (path, str(path), path.read_bytes()):
        np.testing.assert_array_equal(client.embed(same), features)


def test_several_outputs_come_by_name(client: Any, image: NDArray[np.uint8]) -> None:
    features = client.embed(image, ["patches", "class", "attention"])
    expected = expected_features(image[None])
    assert list(features) == ["patches", "class", "attention"]
    np.testing.assert_allclose(features["patches"], expected["patches"], atol=1e-6)
    np.testing.assert_allclose(features["class"], expected["class_token"], atol=1e-6)
    np.testing.assert_allclose(features["attention"], expected["class_attention"], atol=1e-6)


def test_type_and_length_are_as_asked(client: Any, image: NDArray[np.uint8]) -> None:
    features = client.embed(image, "patches", dtype="float16", normalize=True)
    assert features.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(features.astype(np.float32), axis=-1), np.ones((1, 16)), atol=1e-3)


def test_a_reconstruction_says_what_was_hidden(client: Any, image: NDArray[np.uint8]) -> None:
    result = client.reconstruct(image, mask_ratio=0.75, seed=3)
    visible, masked = random_mask(16, 0.75, 3)
    np.testing.assert_array_equal(result.masked, masked)
    expected = expected_reconstruction(image[None], visible[None], masked[None])
    np.testing.assert_allclose(result.reconstruction, expected, atol=1e-6)
    np.testing.assert_array_equal(client.reconstruct(image).masked, random_mask(16, DEFAULT_MASK_RATIO, 0)[1])


def test_the_hidden_patches_can_be_given_or_none(client: Any, image: NDArray[np.uint8]) -> None:
    hidden = np.array([1, 6, 7, 12])
    result = client.reconstruct(image, masked=hidden)
    np.testing.assert_array_equal(result.masked, hidden)
    visible = np.setdiff1d(np.arange(16), hidden)
    expected = expected_reconstruction(image[None], visible[None], hidden[None])
    np.testing.assert_allclose(result.reconstruction, expected, atol=1e-6)
    whole = client.reconstruct(image, skip_regressor=True)
    assert whole.masked.shape == (0,)
    np.testing.assert_allclose(whole.reconstruction, expected_skip(image[None]), atol=1e-6)


def test_blocks_of_patches_can_be_hidden(client: Any, image: NDArray[np.uint8]) -> None:
    blocks, scattered = (client.reconstruct(image, mask_kind=kind, seed=1) for kind in ("block", "random"))
    assert len(blocks.masked) == 8
    assert blocks.masked.tolist() != scattered.masked.tolist()


def test_info_names_the_bundle(client: Any) -> None:
    assert client.info()["bundle"]["model"]["name"] == "tiny"


def test_a_refusal_carries_all_that_the_server_says(client: Any) -> None:
    with pytest.raises(ServerError) as caught:
        client.embed(b"no picture")
    error = caught.value
    assert (error.status, error.code) == (415, "image_unsupported")
    assert all((error.message, error.hint, error.request_id))
    assert error.message in str(error)


def test_a_wrong_key_is_refused(kind: Any, server: Server, image: NDArray[np.uint8]) -> None:
    with pytest.raises(ServerError) as caught:
        kind(server.url, api_key="another").embed(image)
    assert (caught.value.status, caught.value.code) == (401, "unauthorized")


def test_a_folder_gives_features_in_order_and_names_what_failed(client: Any, folder: Path) -> None:
    result = client.embed_folder(folder, num_parallel=3)
    assert [path.relative_to(folder).as_posix() for path in result.paths] == [
        *(f"a/{number:02d}.png" for number in range(0, 12, 2)),
        *(f"b/{number:02d}.png" for number in range(1, 12, 2)),
    ]
    pixels = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in result.paths])
    np.testing.assert_allclose(result.features, expected_features(pixels)["pooled"], atol=1e-6)
    assert list(result.failures) == [folder / "a/broken.jpg"]
    assert isinstance(result.failures[folder / "a/broken.jpg"], ServerError)


def test_a_folder_gives_several_outputs_by_name(client: Any, folder: Path) -> None:
    result = client.embed_folder(folder, ["pooled", "patches"])
    assert {name: array.shape for name, array in result.features.items()} == {
        "pooled": (12, 3),
        "patches": (12, 16, 3),
    }


def test_a_folder_of_which_nothing_can_be_read_has_no_features(client: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    result = client.embed_folder(tmp_path)
    assert (result.paths, len(result.features), len(result.failures)) == ([], 0, 1)
    assert client.embed_folder(tmp_path, ["pooled"]).features == {}


def test_a_folder_without_images_is_named(client: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        client.embed_folder(tmp_path)


class Busy:
    """An ASGI application that refuses the first calls and then answers with an array; it keeps when it was asked."""

    def __init__(self, num_refusals: int, status: int, retry_after_s: int = 0) -> None:
        self.num_refusals, self.status, self.retry_after_s = num_refusals, status, retry_after_s
        self.asked_at: list[float] = []
        self.num_at_once = self.most_at_once = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        while (await receive()).get("more_body"):
            pass  # the body is read and forgotten
        self.asked_at.append(time.monotonic())
        self.num_at_once += 1
        self.most_at_once = max(self.most_at_once, self.num_at_once)
        await asyncio.sleep(0.02)
        self.num_at_once -= 1
        refused = len(self.asked_at) <= self.num_refusals
        headers = [(b"retry-after", str(self.retry_after_s).encode())] if refused else []
        zeros = io.BytesIO()
        np.save(zeros, np.zeros((1, 2), np.float32))
        body = b"busy" if refused else zeros.getvalue()
        await send({"type": "http.response.start", "status": self.status if refused else 200, "headers": headers})
        await send({"type": "http.response.body", "body": body if scope["path"] != "/info" else b"{}"})


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Serve `app` in a thread; the URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(kind: Any, status: int) -> None:
    app = Busy(num_refusals=2, status=status, retry_after_s=1)
    with listening(app) as url:
        np.testing.assert_array_equal(kind(url).embed(b"image"), np.zeros((1, 2), np.float32))
    assert len(app.asked_at) == 3
    assert (np.diff(app.asked_at) >= 1).all()


def test_a_server_that_stays_busy_is_given_up(kind: Any) -> None:
    app = Busy(num_refusals=100, status=429)
    with listening(app) as url, pytest.raises(ServerError) as caught:
        kind(url, num_retries=2).embed(b"image")
    assert (len(app.asked_at), caught.value.status, caught.value.message) == (3, 429, "busy")


def test_other_refusals_are_final(kind: Any) -> None:
    app = Busy(num_refusals=100, status=500)
    with listening(app) as url, pytest.raises(ServerError):
        kind(url).embed(b"image")
    assert len(app.asked_at) == 1


def test_a_folder_asks_for_no_more_at_once_than_it_was_told(kind: Any, folder: Path) -> None:
    app = Busy(num_refusals=0, status=429)
    with listening(app) as url:
        assert len(kind(url).embed_folder(folder, num_parallel=3).paths) == 13
    assert app.most_at_once == 3


def test_a_server_that_is_not_there_is_an_error_of_the_transport(kind: Any, folder: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = kind(f"http://127.0.0.1:{unused.getsockname()[1]}", num_retries=1)
        for ask in (nobody.info, lambda: nobody.embed_folder(folder)):
            with pytest.raises(httpx.ConnectError):
                ask()


def test_without_httpx_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['httpx'] = None; import serving.client"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "pip install cae-pipe[client]" in done.stderr


def test_the_client_needs_nothing_else_of_the_server() -> None:
    code = "import sys, serving.client; print([name for name in sys.modules if name.startswith('serving.')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['serving.client']"
