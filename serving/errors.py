"""How the server says no: one JSON form for every error, and the request id in every answer."""

from __future__ import annotations

import logging
import math
import reprlib
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from serving.admission import QueueFullError
from serving.batcher import ExpiredError, StoppedError
from serving.bundle import CapabilityError
from serving.preprocess import MIN_SIDE_PX, ImageError, Reason

REQUEST_ID = "X-Request-Id"
_log = logging.getLogger(__name__)

# What callers send stands in the messages, and may be of any length.
_MAX_MESSAGE = 1000
_MAX_PROBLEMS = 5

_IMAGE_STATUS: dict[Reason, int] = {"unsupported": 415, "truncated": 415, "too_large": 413, "too_small": 422}
_IMAGE_HINT: dict[Reason, str] = {
    "unsupported": "send JPEG, PNG, WebP, BMP or TIFF files: curl --data-binary @photo.jpg; other "
    "numbers of channels than 1 and 3 as one NumPy file (.npy)",
    "truncated": "check that the file opens in a viewer, and send all of it",
    "too_large": "scale the picture down first; GET /info names the limit",
    "too_small": f"send a picture of at least {MIN_SIDE_PX} x {MIN_SIDE_PX} pixels",
}


class ErrorDetail(BaseModel):
    """`code` for programs, `message` what is wrong, `hint` what to do about it."""

    code: str
    message: str
    hint: str


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail
    request_id: str


class ApiError(Exception):
    """A refusal with its HTTP status; becomes an ErrorBody."""

    def __init__(
        self, status: int, code: str, message: str, hint: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.detail = ErrorDetail(code=code, message=message, hint=hint)


def retry_later(status: int, code: str, message: str, seconds: float = 1) -> ApiError:
    """A refusal that is worth another try, after some seconds."""
    wait = max(1, math.ceil(seconds))
    return ApiError(status, code, message, f"ask again in {wait} s", {"Retry-After": str(wait)})


def install(app: FastAPI) -> None:
    """Answer every exception that can leave an endpoint of `app` in the one JSON form."""
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(ImageError, _bad_image)
    app.add_exception_handler(CapabilityError, _no_capability)
    app.add_exception_handler(RequestValidationError, _bad_field)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(QueueFullError, _queue_full)
    app.add_exception_handler(ExpiredError, _expired)
    app.add_exception_handler(StoppedError, _stopped)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _internal)


def _answer(request: Request, status: int, detail: ErrorDetail, headers: Mapping[str, str] | None = None) -> Response:
    request_id = request.state.request_id
    request.state.facts["error"] = detail.code
    if len(detail.message) > _MAX_MESSAGE:
        detail = detail.model_copy(update={"message": detail.message[:_MAX_MESSAGE] + " ..."})
    body = ErrorBody(error=detail, request_id=request_id)
    # The id again, because the answer to an unexpected error is sent from outside the middleware.
    return JSONResponse(body.model_dump(), status, headers={REQUEST_ID: request_id, **(headers or {})})


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _answer(request, error.status, error.detail, error.headers)


def _queue_full(request: Request, error: Exception) -> Response:
    assert isinstance(error, QueueFullError)
    return _refused(request, retry_later(429, "queue_full", str(error), error.retry_after_s))


def _expired(request: Request, error: Exception) -> Response:
    return _refused(request, retry_later(503, "expired", "the request waited too long and was dropped unseen"))


def _stopped(request: Request, error: Exception) -> Response:
    return _refused(request, retry_later(503, "stopped", "the server has stopped working and will end", 5))


def _bad_image(request: Request, error: Exception) -> Response:
    assert isinstance(error, ImageError)
    detail = ErrorDetail(code=f"image_{error.reason}", message=str(error), hint=_IMAGE_HINT[error.reason])
    return _answer(request, _IMAGE_STATUS[error.reason], detail)


def _no_capability(request: Request, error: Exception) -> Response:
    detail = ErrorDetail(
        code="capability_absent", message=str(error), hint="GET /info lists what this bundle can do under capabilities"
    )
    return _answer(request, 404, detail)


def _bad_field(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = []
    for problem in error.errors()[:_MAX_PROBLEMS]:
        # Where it comes from a validator of ours pydantic puts its own words before the sentence.
        text = problem["msg"].removeprefix("Value error, ")
        # Of a body nothing is repeated: it holds images.
        given = f" (got {reprlib.repr(problem['input'])})" if problem["loc"][0] == "query" else ""
        problems.append(f"{'.'.join(map(str, problem['loc'][1:])) or problem['loc'][0]}: {text}{given}")
    detail = ErrorDetail(
        code="bad_field", message="; ".join(problems), hint="GET /openapi.json describes every field and its range"
    )
    return _answer(request, 422, detail)


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    detail = ErrorDetail(
        code=phrase.lower().replace(" ", "_"),
        message=f"{request.method} {request.url.path}: {error.detail}",
        hint="GET /openapi.json lists every path and its methods",
    )
    return _answer(request, error.status_code, detail, error.headers)


def _gone(request: Request, error: Exception) -> Response:
    request.state.facts["gone"] = True
    # Nobody reads it; without a handler the disconnect would be logged as a failure of the server.
    return Response(status_code=400)


def _internal(request: Request, error: Exception) -> Response:
    _log.error("a request failed", exc_info=error, extra={"request_id": request.state.request_id})
    detail = ErrorDetail(
        code="internal",
        message="the server failed on this request",
        hint="report the request id; the server's log holds the cause",
    )
    return _answer(request, 500, detail)
