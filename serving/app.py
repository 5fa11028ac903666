"""The HTTP application: one image in, patch features or a reconstruction out.

`POST /embed`, `POST /reconstruct`, `GET /info`, `GET /health/live`, `GET /health/ready`, described by
`GET /openapi.json`. The body of the calls is the raw image file, or a NumPy file for any number of channels:
`curl --data-binary @photo.jpg http://127.0.0.1:8000/embed`.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

import anyio
import fastapi
import numpy as np
import onnxruntime
import PIL
from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serving import errors, masks, preprocess
from serving.answers import JSON, NPY, PNG, json_response, negotiate, npy_response
from serving.bundle import Bundle
from serving.bundle_info import Output
from serving.errors import ApiError
from serving.settings import Settings

# The names callers use, and the arrays of the bundle they stand for.
EMBED_OUTPUTS: dict[str, Output] = {
    "pooled": "pooled",
    "class": "class_token",
    "patches": "patches",
    "attention": "class_attention",
}
# The last is what `curl --data-binary` says of any file, so the shortest call works.
BODY_TYPES = ("image/*", NPY, "application/octet-stream", "application/x-www-form-urlencoded")

_HOW_TO_SEND = "curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' ..."
_BODY = (
    f"One image file, or one NumPy file ({NPY}) with an array uint8 or uint16 [C, H, W]. The number of channels of the "
    "model stands in GET /info under bundle.preprocessing; grey and colour fit 1 and 3. The bytes decide, not the type."
)
_Answer = TypeVar("_Answer")
_log = logging.getLogger(__name__)


class EmbedQuery(BaseModel):
    """The query of /embed."""

    model_config = ConfigDict(extra="forbid")

    outputs: str = Field(
        "pooled",
        description=f"comma-separated, of {', '.join(EMBED_OUTPUTS)}: mean of the patch features [1, D], class token "
        "[1, D], patch features [1, h*w, D], attention of the class token in the last layer [1, heads, h*w]",
        examples=["pooled,class"],
    )

    @field_validator("outputs")
    @classmethod
    def _are_known(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        unknown = [name for name in names if name not in EMBED_OUTPUTS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not an output; expected some of {', '.join(EMBED_OUTPUTS)}")
        return ",".join(dict.fromkeys(names))

    def names(self) -> list[str]:
        return self.outputs.split(",")


class ReconstructQuery(BaseModel):
    """The query of /reconstruct."""

    model_config = ConfigDict(extra="forbid")

    mask_ratio: float | None = Field(
        None, gt=0, lt=1, description="share of the patches to hide; the bundle's own by default", examples=[0.5]
    )
    seed: int | None = Field(
        None, ge=0, lt=2**32, description="which patches are hidden; the same seed hides the same; 0 by default"
    )
    skip_regressor: bool = Field(
        False, description="hide nothing: the whole image through encoder and decoder, without the regressor"
    )
    view: masks.View = Field(
        "pasted",
        description="the PNG: the reconstruction alone; the hidden patches pasted into the image; or image, image with "
        "hidden patches in grey, and pasted side by side (without regressor: image and completion)",
    )

    @model_validator(mode="after")
    def _skipping_has_no_mask(self) -> ReconstructQuery:
        if self.skip_regressor and (self.mask_ratio is not None or self.seed is not None):
            raise ValueError("skip_regressor=true hides no patch; leave out mask_ratio and seed")
        return self


class Service:
    """What the endpoints share: the bundle, the settings, and the room for decoding and inference."""

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        self.bundle = bundle
        self.settings = settings
        self.ready = False
        # More at once would not be faster, only hold more decoded pictures in memory.
        self._room = anyio.CapacityLimiter(bundle.num_threads)

    async def work(self, call: Callable[[], _Answer]) -> _Answer:
        """Run `call` in a worker thread, so that the event loop stays free for health checks and other bodies."""
        return await anyio.to_thread.run_sync(call, limiter=self._room)

    async def read_image(self, request: Request) -> bytes:
        """The raw body. Errors: ApiError 503, 415, 413, 400."""
        self.check_ready()
        _check_type(request)
        body = await _read_body(request, self.settings.max_body_bytes)
        if not body:
            raise ApiError(400, "empty_body", "the body is empty; expected an image file", _HOW_TO_SEND)
        return body

    def check_ready(self) -> None:
        """Errors: ApiError 503."""
        if not self.ready:
            raise ApiError(503, "not_ready", "the server is warming up or stopping", "ask again in a second")

    def prepared(self, data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """uint8 [1, C, H, W] from the bytes of an image file. Errors: ImageError."""
        image = preprocess.decode(data, max_pixels=self.settings.max_pixels)
        return preprocess.prepare(image, self.bundle.info.preprocessing)[None]

    def headers(self) -> dict[str, str]:
        rows, columns = self.bundle.info.model.grid
        return {"X-Patch-Grid": f"{rows}x{columns}", "X-Bundle-Sha256": self.bundle.sha256}

    def common(self, request: Request) -> dict[str, Any]:
        """What every JSON answer carries beside its arrays."""
        return {
            "request_id": request.state.request_id,
            "bundle_sha256": self.bundle.sha256,
            "grid": list(self.bundle.info.model.grid),
        }


def create_app(settings: Settings, bundle: Bundle) -> FastAPI:
    """The application over an opened bundle; it becomes ready when its graphs have been warmed, before it listens."""
    service = Service(bundle, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.work(bundle.warm)
        service.ready = True
        _log.info("ready: %s on %s, %d threads", settings.bundle, bundle.provider, bundle.num_threads)
        yield
        service.ready = False

    # The interactive pages are left out because they fetch scripts from elsewhere.
    app = FastAPI(title="Context Autoencoder", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    errors.install(app)
    _add_embed(app, service)
    _add_reconstruct(app, service)
    _add_status(app, service)
    return app


def _add_embed(app: FastAPI, service: Service) -> None:
    @app.post("/embed", response_class=Response, **_documented(JSON, NPY))
    async def embed(request: Request, query: Annotated[EmbedQuery, Query()]) -> Response:
        """Features of one image.

        JSON holds the outputs under the names that were asked for, each with a first axis of 1 for the one image;
        `application/x-npy` is one array, so it takes one output.
        """
        names = query.names()
        offered, hint = [JSON, NPY], "leave Accept out to get JSON"
        if len(names) > 1:
            offered, hint = [JSON], f"{NPY} holds one array: ask for one output, or for {JSON}"
        form = negotiate(request.headers.get("accept"), offered, hint)
        data = await service.read_image(request)

        def answer() -> Response:
            images = service.prepared(data)
            arrays = service.bundle.embed(images, [EMBED_OUTPUTS[name] for name in names])
            outputs = {name: arrays[EMBED_OUTPUTS[name]] for name in names}
            if form == NPY:
                return npy_response(outputs[names[0]], service.headers())
            shapes = {name: list(array.shape) for name, array in outputs.items()}
            content = service.common(request) | {"shapes": shapes} | outputs
            return json_response(content, service.headers())

        return await service.work(answer)


def _add_reconstruct(app: FastAPI, service: Service) -> None:
    @app.post("/reconstruct", response_class=Response, **_documented(PNG, JSON, NPY))
    async def reconstruct(request: Request, query: Annotated[ReconstructQuery, Query()]) -> Response:
        """The image completed from some of its patches, the hidden ones drawn at random.

        PNG is the `view`; JSON and npy are the whole reconstruction, float32 [1, C, H, W] in 0-1. X-Mask-Ratio,
        X-Mask-Seed and X-Masked-Patches (indices, row by row) say what was hidden.
        """
        form = negotiate(request.headers.get("accept"), [PNG, JSON, NPY], f"leave Accept out to get {PNG}")
        data = await service.read_image(request)
        return await service.work(lambda: _reconstruct(service, request, query, data, form))


def _reconstruct(service: Service, request: Request, query: ReconstructQuery, data: bytes, form: str) -> Response:
    model = service.bundle.info.model
    headers = service.headers()
    content = service.common(request)
    masked = None
    if query.skip_regressor:
        images = service.prepared(data)
        reconstruction = service.bundle.skip_reconstruct(images)
    else:
        seed = query.seed or 0
        ratio, visible, masked = service.bundle.random_mask(query.mask_ratio, seed)
        images = service.prepared(data)
        reconstruction = service.bundle.reconstruct(images, visible[None], masked[None])
        headers |= {
            "X-Mask-Ratio": str(ratio),
            "X-Mask-Seed": str(seed),
            "X-Masked-Patches": ",".join(map(str, masked)),
        }
        content |= {"mask_ratio": ratio, "seed": seed, "visible": visible, "masked": masked}
    if form == NPY:
        return npy_response(reconstruction, headers)
    if form == JSON:
        content |= {"shape": list(reconstruction.shape), "reconstruction": reconstruction}
        return json_response(content, headers)
    picture = masks.draw(query.view, images[0], reconstruction[0], masked, model.patch_size)
    return Response(masks.png(picture), media_type=PNG, headers=headers)


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "live"}

    @app.get("/health/ready", responses={503: {"model": errors.ErrorBody}})
    async def ready() -> dict[str, str]:
        """Every graph has been run once and calls are answered."""
        service.check_ready()
        return {"status": "ready"}

    @app.get("/info")
    async def info() -> dict[str, Any]:
        """The bundle, what it really runs on, versions and limits."""
        bundle, settings = service.bundle, service.settings
        return {
            "bundle": bundle.info.model_dump(),
            "bundle_sha256": bundle.sha256,
            "device": {"asked": settings.device, "provider": bundle.provider, "num_threads": bundle.num_threads},
            "limits": {
                "max_body_bytes": settings.max_body_bytes,
                "max_pixels": settings.max_pixels,
                "min_side_px": preprocess.MIN_SIDE_PX,
            },
            "versions": {
                "python": platform.python_version(),
                "onnxruntime": onnxruntime.__version__,
                "pillow": PIL.__version__,
                "numpy": np.__version__,
                "fastapi": fastapi.__version__,
            },
        }


async def _read_body(request: Request, limit: int) -> bytes:
    """The body, read no further than `limit` bytes.

    The framework has such a limit too, but it answers in plain text, in place of the JSON form of every other error.

    Errors: ApiError 413.
    """
    too_large = ApiError(
        413, "body_too_large", f"the body has more than {limit} bytes", "send a smaller file; GET /info names the limit"
    )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def _check_type(request: Request) -> None:
    """Refuse a type that announces another kind of body; whether it is an image, the bytes decide."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type and not media_type.startswith("image/") and media_type not in BODY_TYPES:
        raise ApiError(
            415,
            "unsupported_body",
            f"Content-Type: {media_type}; expected the raw bytes of one image or NumPy file ({', '.join(BODY_TYPES)})",
            _HOW_TO_SEND,
        )


def _documented(*answers: str) -> dict[str, Any]:
    """OpenAPI of a call that takes a raw image and answers in one of several forms."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    schemas = {JSON: {"schema": {"type": "object"}}}
    statuses = (400, 404, 406, 413, 415, 422, 500, 503)
    return {
        "openapi_extra": {
            "requestBody": {"required": True, "description": _BODY, "content": dict.fromkeys(BODY_TYPES, binary)}
        },
        "responses": {
            200: {"description": "by Accept", "content": {name: schemas.get(name, binary) for name in answers}},
            **{status: {"model": errors.ErrorBody} for status in statuses},
        },
    }
