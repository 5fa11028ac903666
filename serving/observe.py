"""ASGI middleware: the id of each request, its line in the log, and its part in the metrics."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import REQUEST_ID
from serving.metrics import Metrics

# An id of the caller's is kept only in this form, since it is written to logs and headers.
_CALLERS_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# What nobody waits for any more; the number is that of nginx, and only the log and the metrics see it.
_CLIENT_GONE = 499
# What is smaller fits into buffers.
_LARGE_BYTES = 2**16

_log = logging.getLogger("serving.requests")


class Observe:
    """Each request gets an id (the caller's X-Request-Id, or a new one), a line in the log, and is counted.

    Endpoints and error handlers add to `request.state.facts`, which goes into the line; never what an image holds.
    What is in `request.state.at_end` is called when the answer has been taken, or cannot be.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, quiet: Sequence[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._quiet = frozenset(quiet)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _CALLERS_ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, object] = {}
        at_end: list[Callable[[], None]] = []
        scope.setdefault("state", {}).update(request_id=request_id, facts=facts, at_end=at_end)
        status = 500
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            elif len(message.get("body", b"")) > _LARGE_BYTES and not message.get("more_body"):
                # The next message waits until the caller has taken most of this one, and so does what runs at the end.
                await send({**message, "more_body": True})
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            for call in at_end:
                call()
            if facts.pop("gone", False):
                status = _CLIENT_GONE
            self._record(scope, status, time.perf_counter() - started, request_id, facts)

    def _record(self, scope: Scope, status: int, seconds: float, request_id: str, facts: dict[str, object]) -> None:
        # The path of the route that answered: any path can be asked for, and each label is a series kept for ever.
        path = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(path, str(status)).inc()
        self._metrics.request_seconds.labels(path).observe(seconds)
        if "error" in facts:
            self._metrics.rejected.labels(path, str(facts["error"])).inc()
        level = logging.DEBUG if path in self._quiet and status < 400 else logging.INFO
        _log.log(
            level,
            "%s %s %d",
            scope["method"],
            path,
            status,
            extra={
                "request_id": request_id,
                "method": scope["method"],
                "path": path,
                "status": status,
                "ms": round(seconds * 1000, 1),
                **facts,
            },
        )


class Stages:
    """The seconds that one request spends in each stage: for its answer, the log and the metrics."""

    def __init__(self, metrics: Metrics, call: str) -> None:
        self.seconds: dict[str, float] = {}
        self._metrics = metrics
        self._call = call

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - started)

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = seconds
        self._metrics.stage_seconds.labels(self._call, stage).observe(seconds)

    def milliseconds(self) -> dict[str, float]:
        return {stage: round(seconds * 1000, 2) for stage, seconds in self.seconds.items()}

    def server_timing(self) -> str:
        """As a Server-Timing header, which browsers show."""
        return ", ".join(f"{stage};dur={value}" for stage, value in self.milliseconds().items())
