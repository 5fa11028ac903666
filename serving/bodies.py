"""What a request carries: one image raw, several as a form, or base64 in JSON; for /reconstruct a mask beside it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

import anyio
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, ValidationError, WithJsonSchema
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from serving.admission import Ticket
from serving.answers import JSON, NPY
from serving.errors import ApiError
from serving.settings import Settings

FORM = "multipart/form-data"
# The last is what `curl --data-binary` says of any file, so the shortest call works.
RAW_TYPES = ("image/*", NPY, "application/octet-stream", "application/x-www-form-urlencoded")
# Elements of a JSON body: far more than images and patches, and so few that the errors of all of them cost nothing.
_MAX_ELEMENTS = 50_000
HOW_TO_SEND = "curl --data-binary @photo.jpg ...; several as a form: curl -F images=@a.jpg -F images=@b.jpg ..."


def _from_base64(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError("expected the bytes of an image file as a base64 string")
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64 ({error}); expected the bytes of an image file") from None


Base64 = Annotated[
    bytes, BeforeValidator(_from_base64), WithJsonSchema({"type": "string", "contentEncoding": "base64"})
]


class EmbedBody(BaseModel):
    """The body of /embed as JSON."""

    model_config = ConfigDict(extra="forbid")

    images: list[Base64] = Field(min_length=1, description="image files, each as base64")


class ReconstructBody(EmbedBody):
    """The body of /reconstruct as JSON."""

    images: list[Base64] = Field(min_length=1, max_length=1, description="one image file as base64")
    mask: Base64 | None = Field(None, description="an image file as base64: white hides, black shows")
    masked: list[StrictInt] | None = Field(None, description="indices of the patches to hide, row by row")


@dataclass(frozen=True)
class Body:
    """Image files, at least one, and what else a body of /reconstruct may say."""

    images: tuple[bytes, ...]
    mask: bytes | None = None
    masked: tuple[int, ...] | None = None


async def read_body(
    request: Request,
    ticket: Ticket,
    settings: Settings,
    model: type[EmbedBody],
    in_thread: Callable[..., Awaitable[Body]],
) -> Body:
    """The body of a request that has been admitted; it is charged to the ticket while it arrives.

    It is taken apart by `in_thread`, a worker thread of a limited number, for a body made for it takes seconds.

    Errors: ApiError 400, 408, 413, 415, 422; RequestValidationError; QueueFullError.
    """
    media_type = _media_type(request)
    data = await _read(request, ticket, settings)
    if not data:
        raise ApiError(400, "empty_body", "the body is empty; expected an image file", HOW_TO_SEND)
    if media_type == FORM:
        body = await in_thread(_from_form, request.headers, data, model)
    elif media_type == JSON:
        body = await in_thread(_from_json, data, model)
    else:
        body = Body((data,))
    if len(body.images) > settings.images_per_request:
        raise ApiError(
            422,
            "too_many_images",
            f"{len(body.images)} images; at most {settings.images_per_request} are answered in one call",
            "send them in several calls",
        )
    for index, image in enumerate(body.images):
        if not image:
            raise ApiError(400, "empty_body", f"image {index} is empty; expected an image file", HOW_TO_SEND)
    ticket.add(images=len(body.images) - 1)
    return body


def declared_bytes(request: Request, limit: int) -> int:
    """The size that the head of the request declares, 0 where it is sent in chunks. Errors: ApiError 413."""
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isdecimal() else 0
    if size > limit:
        raise _too_large(limit)
    return size


def _media_type(request: Request) -> str:
    """Of the kinds of body; whether it is an image, the bytes decide. Errors: ApiError 415."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if not media_type or media_type.startswith("image/") or media_type in (*RAW_TYPES, FORM, JSON):
        return media_type
    raise ApiError(
        415,
        "unsupported_body",
        f"Content-Type: {media_type}; expected one image or NumPy file ({', '.join(RAW_TYPES)}), {FORM} or {JSON}",
        HOW_TO_SEND,
    )


async def _read(request: Request, ticket: Ticket, settings: Settings) -> bytes:
    """No further than the limit. The framework has such a limit too, but it answers in plain text, not in our form."""
    chunks, size = [], 0
    try:
        with anyio.fail_after(settings.body_timeout_s):
            async for chunk in request.stream():
                chunks.append(chunk)
                size += len(chunk)
                if size > settings.bytes_per_request:
                    raise _too_large(settings.bytes_per_request)
                # What was declared is charged already.
                if size > ticket.bytes:
                    ticket.add(num_bytes=size - ticket.bytes)
    except TimeoutError:
        raise ApiError(
            408,
            "body_timeout",
            f"{size} bytes came in {settings.body_timeout_s:g} s, and the body is not complete",
            "send smaller files, or over a faster line",
            {"Connection": "close"},
        ) from None
    return b"".join(chunks)


def _too_large(limit: int) -> ApiError:
    message = f"the body has more than {limit} bytes"
    # The rest of the body is not worth reading.
    return ApiError(
        413,
        "body_too_large",
        message,
        "send less at once; GET /info names the limit",
        {"Connection": "close"},
    )


def _from_json(data: bytes, model: type[EmbedBody]) -> Body:
    if data.count(b",") > _MAX_ELEMENTS:
        # Millions of small elements would become gigabytes of objects and of errors. There is no comma in base64.
        raise ApiError(422, "bad_field", f"the JSON has more than {_MAX_ELEMENTS} elements", HOW_TO_SEND)
    try:
        parsed = model.model_validate_json(data)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        raise RequestValidationError([{**problem, "loc": ("body", *problem["loc"])} for problem in problems]) from None
    extra: dict[str, Any] = {}
    if isinstance(parsed, ReconstructBody):
        extra = {"mask": parsed.mask, "masked": None if parsed.masked is None else tuple(parsed.masked)}
    return Body(tuple(parsed.images), **extra)


class _InMemoryParser(MultiPartParser):
    # The body is in memory and limited already; a file on disk would only be a copy.
    spool_max_size = 2**62
    ended = False

    def on_end(self) -> None:
        self.ended = True

    def parse_now(self) -> FormData:
        """What `parse` gives, outside an event loop. Errors: MultiPartException."""
        try:
            # With the whole body at hand it waits for nothing.
            self.parse().send(None)
        except StopIteration as result:
            form: FormData = result.value
        except UnicodeError as error:
            raise MultiPartException(f"A name in it has no meaning in the charset of the form ({error}).") from None
        if not self.ended:
            raise MultiPartException("Its end is missing.")
        return form


def _from_form(headers: Headers, data: bytes, model: type[EmbedBody]) -> Body:
    try:
        form = _InMemoryParser(headers, _whole(data), max_fields=0).parse_now()
    except MultiPartException as error:
        raise ApiError(
            400, "bad_body", f"the form cannot be read: {error.message} Every part must be a file", HOW_TO_SEND
        ) from None
    known = ("images", "mask") if model is ReconstructBody else ("images",)
    files: dict[str, list[bytes]] = {"images": [], "mask": []}
    for name, part in form.multi_items():
        if name not in known:
            raise _bad_part(name[:64], f"not a part of this form; expected {' and '.join(known)}")
        assert isinstance(part, UploadFile)  # fields that are no files are refused by the parser
        files[name].append(part.file.read())
    if not files["images"]:
        raise _bad_part("images", "the form has no file of this name")
    if model is ReconstructBody:
        for name in known:
            if len(files[name]) > 1:
                raise _bad_part(name, f"{len(files[name])} files; expected one")
    return Body(tuple(files["images"]), next(iter(files["mask"]), None))


async def _whole(data: bytes) -> AsyncGenerator[bytes, None]:
    yield data


def _bad_part(name: str, problem: str) -> RequestValidationError:
    return RequestValidationError([{"loc": ("body", name), "msg": problem}])
