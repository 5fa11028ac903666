"""The Python client of the server, sync and async.

    with Client("http://127.0.0.1:8000") as client:
        features = client.embed("photo.jpg")
        folder = client.embed_folder("photos/")

A busy (429) or restarting (503) server is asked again after the time it names in Retry-After, and so is one whose
connection breaks.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

try:
    import httpx
    from httpx_retries import Retry, RetryTransport
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(
        f"{error}: serving.client needs httpx, httpx-retries and tqdm; pip install cae-pipe[client]"
    ) from error

Image = str | Path | bytes | NDArray[np.uint8]
Dtype = Literal["float32", "float16"]
# By name of the output where several were asked for.
Features = NDArray[Any] | dict[str, NDArray[Any]]

NPY, SAFETENSORS = "application/x-npy", "application/x-safetensors"
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".npy", ".png", ".tif", ".tiff", ".webp")


class ServerError(Exception):
    """The server refused, also after the retries.

    `status` of HTTP, `code` for programs, `message` what is wrong, `hint` what to do, `request_id` to find it in the
    server's log. Of an answer that is not the server's own (a proxy's) `message` is its text, the last two are empty.
    """

    def __init__(self, status: int, code: str, message: str, hint: str, request_id: str) -> None:
        super().__init__(f"{status} {code}: {message}" + (f" ({hint})" if hint else ""))
        self.status, self.code, self.message, self.hint, self.request_id = status, code, message, hint, request_id


# What one file of a folder may fail by: refused, not delivered, or not readable.
_FAILURES = (ServerError, httpx.TransportError, OSError)


@dataclass(frozen=True)
class Reconstruction:
    """`reconstruction` float32 [1, C, H, W] in 0-1, `masked` int64 [M]: indices of the hidden patches, row by row."""

    reconstruction: NDArray[np.float32]
    masked: NDArray[np.int64]


@dataclass(frozen=True)
class FolderFeatures:
    """`features` [len(paths), ...] in the order of `paths`, by name for several outputs; `failures` has the others.

    Where every file failed, `features` is empty: [0], or without names.
    """

    paths: list[Path]
    features: Features
    failures: dict[Path, Exception]


class Client:
    """Asks one server, from any number of threads. Use it as a context manager, or `close` it.

    `num_retries` of one call; `timeout_s` of connecting, and of every wait for bytes. With `api_key` every call carries
    it. Errors of all calls: ServerError; httpx.TransportError where the server cannot be reached.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 60,
        num_retries: int = 5,
    ) -> None:
        transport = RetryTransport(httpx.HTTPTransport(), _retry(num_retries))
        self._http = httpx.Client(base_url=base_url, headers=_key(api_key), timeout=timeout_s, transport=transport)

    def embed(
        self,
        image: Image,
        outputs: str | Sequence[str] = "pooled",
        *,
        dtype: Dtype = "float32",
        normalize: bool = False,
    ) -> Features:
        """Features of one image: a file, its bytes, or uint8 [C, H, W].

        `outputs` is one of pooled [1, D], class [1, D], patches [1, h*w, D] and attention [1, heads, h*w], or a
        sequence of them, which gives a dict. `normalize` scales every vector of features to length 1.
        """
        return _features(self._http.request(**_embed(image, outputs, dtype, normalize)), outputs)

    def reconstruct(
        self,
        image: Image,
        *,
        mask_ratio: float | None = None,
        seed: int | None = None,
        mask_kind: Literal["block", "random"] | None = None,
        masked: Iterable[int] | None = None,
        skip_regressor: bool = False,
    ) -> Reconstruction:
        """The image completed from its visible patches; what is None the server chooses.

        `masked` names the hidden patches, row by row, in place of ratio, seed and kind; `skip_regressor` hides none.
        """
        return _reconstruction(
            self._http.request(**_reconstruct(image, mask_ratio, seed, mask_kind, masked, skip_regressor))
        )

    def info(self) -> dict[str, Any]:
        """What GET /info says: bundle, device, limits, versions."""
        return _json(self._http.request("GET", "/info"))

    def embed_folder(
        self,
        folder: str | Path,
        outputs: str | Sequence[str] = "pooled",
        *,
        dtype: Dtype = "float32",
        normalize: bool = False,
        num_parallel: int = 8,
        progress: bool = True,
    ) -> FolderFeatures:
        """Features of every image file below `folder`, `num_parallel` of them asked for at once.

        A file that fails is kept in `failures` with its error, and the others go on. Errors: ValueError for a folder
        without images; as all calls where the server cannot be asked at all.
        """
        files = _image_files(folder)
        self.info()

        def outcome(path: Path) -> Features | Exception:
            try:
                return self.embed(path, outputs, dtype=dtype, normalize=normalize)
            except _FAILURES as error:
                return error

        with ThreadPoolExecutor(num_parallel) as pool, _bar(files, progress) as bar:
            outcomes = []
            for result in pool.map(outcome, files):
                outcomes.append(result)
                bar.update()
        return _collected(files, outcomes, outputs)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """`Client` for asyncio: the same arguments, results and errors, and every call is awaited."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 60,
        num_retries: int = 5,
    ) -> None:
        transport = RetryTransport(httpx.AsyncHTTPTransport(), _retry(num_retries))
        self._http = httpx.AsyncClient(base_url=base_url, headers=_key(api_key), timeout=timeout_s, transport=transport)

    async def embed(
        self,
        image: Image,
        outputs: str | Sequence[str] = "pooled",
        *,
        dtype: Dtype = "float32",
        normalize: bool = False,
    ) -> Features:
        """As `Client.embed`."""
        return _features(await self._http.request(**_embed(image, outputs, dtype, normalize)), outputs)

    async def reconstruct(
        self,
        image: Image,
        *,
        mask_ratio: float | None = None,
        seed: int | None = None,
        mask_kind: Literal["block", "random"] | None = None,
        masked: Iterable[int] | None = None,
        skip_regressor: bool = False,
    ) -> Reconstruction:
        """As `Client.reconstruct`."""
        return _reconstruction(
            await self._http.request(**_reconstruct(image, mask_ratio, seed, mask_kind, masked, skip_regressor))
        )

    async def info(self) -> dict[str, Any]:
        """As `Client.info`."""
        return _json(await self._http.request("GET", "/info"))

    async def embed_folder(
        self,
        folder: str | Path,
        outputs: str | Sequence[str] = "pooled",
        *,
        dtype: Dtype = "float32",
        normalize: bool = False,
        num_parallel: int = 8,
        progress: bool = True,
    ) -> FolderFeatures:
        """As `Client.embed_folder`."""
        files = _image_files(folder)
        await self.info()
        outcomes: dict[Path, Features | Exception] = {}
        waiting = iter(files)

        async def work() -> None:
            for path in waiting:
                try:
                    outcomes[path] = await self.embed(path, outputs, dtype=dtype, normalize=normalize)
                except _FAILURES as error:
                    outcomes[path] = error
                bar.update()

        with _bar(files, progress) as bar:
            async with asyncio.TaskGroup() as group:
                for _ in range(num_parallel):
                    group.create_task(work())
        return _collected(files, [outcomes[path] for path in files], outputs)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _retry(num_retries: int) -> Retry:
    """A call changes nothing on the server, so it may be repeated also where its answer was lost."""
    return Retry(
        total=num_retries,
        allowed_methods=["GET", "POST"],
        status_forcelist=[429, 503],
        retry_on_exceptions=[httpx.NetworkError, httpx.RemoteProtocolError],
        backoff_factor=0.1,
        respect_retry_after_header=True,
    )


def _key(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _post(path: str, image: Image, accept: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `httpx.Client.request`. Errors: OSError for a file that cannot be read."""
    content_type = "application/octet-stream"
    if isinstance(image, np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, image, allow_pickle=False)
        image, content_type = buffer.getvalue(), NPY
    content = image if isinstance(image, bytes) else Path(image).read_bytes()
    headers = {"Accept": accept, "Content-Type": content_type}
    given = {name: value for name, value in params.items() if value is not None}
    return {"method": "POST", "url": path, "content": content, "params": given, "headers": headers}


def _embed(image: Image, outputs: str | Sequence[str], dtype: Dtype, normalize: bool) -> dict[str, Any]:
    accept, names = (NPY, outputs) if isinstance(outputs, str) else (SAFETENSORS, ",".join(outputs))
    return _post("/embed", image, accept, {"outputs": names, "dtype": dtype, "normalize": normalize})


def _reconstruct(
    image: Image,
    mask_ratio: float | None,
    seed: int | None,
    mask_kind: str | None,
    masked: Iterable[int] | None,
    skip_regressor: bool,
) -> dict[str, Any]:
    indices = None if masked is None else ",".join(str(int(index)) for index in masked)
    params = {"mask_ratio": mask_ratio, "seed": seed, "mask_kind": mask_kind, "masked": indices}
    return _post("/reconstruct", image, NPY, {**params, "skip_regressor": skip_regressor or None})


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        body = response.json()
        error = body["error"]
        raise ServerError(response.status_code, error["code"], error["message"], error["hint"], body["request_id"])
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ServerError(response.status_code, response.reason_phrase, response.text[:200], "", "") from None


def _json(response: httpx.Response) -> dict[str, Any]:
    content: dict[str, Any] = _checked(response).json()
    return content


def _array(response: httpx.Response) -> NDArray[Any]:
    array: NDArray[Any] = np.load(io.BytesIO(_checked(response).content), allow_pickle=False)
    return array


def _features(response: httpx.Response, outputs: str | Sequence[str]) -> Features:
    if isinstance(outputs, str):
        return _array(response)
    arrays = safetensors.numpy.load(_checked(response).content)
    # The file keeps no order.
    return {name: arrays[name] for name in outputs}


def _reconstruction(response: httpx.Response) -> Reconstruction:
    array = _array(response)
    masked = response.headers.get("X-Masked-Patches", "")
    return Reconstruction(array, np.array([int(index) for index in masked.split(",") if index], dtype=np.int64))


def _image_files(folder: str | Path) -> list[Path]:
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"{folder}: no image files below it ({', '.join(IMAGE_SUFFIXES)}); check the path")
    return files


def _bar(files: Sequence[Path], progress: bool) -> tqdm:
    # None hides the bar where nobody looks: stderr is no terminal.
    return tqdm(total=len(files), desc="embed", unit="image", disable=None if progress else True)


def _collected(
    files: Sequence[Path], outcomes: Sequence[Features | Exception], outputs: str | Sequence[str]
) -> FolderFeatures:
    results = list(zip(files, outcomes, strict=True))
    failures = {path: outcome for path, outcome in results if isinstance(outcome, Exception)}
    done = {path: outcome for path, outcome in results if not isinstance(outcome, Exception)}
    features: Features
    if isinstance(outputs, str):
        features = np.concatenate(list(done.values())) if done else np.empty(0, dtype=np.float32)
    else:
        names = outputs if done else ()
        features = {name: np.concatenate([part[name] for part in done.values()]) for name in names}
    return FolderFeatures(list(done), features, failures)
