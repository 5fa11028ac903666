"""uvicorn's HTTP with limits of its own: on the head of a request, and on callers that send or read nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sized
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

# Of the address and headers of one request, and of all else that surrounds its body.
_MAX_HEAD_BYTES = 2**16
# A chunk may have a head of this many bytes for each byte of its own: five where it holds a single one.
_HEAD_PER_BODY = 8
# So much of an answer must be taken in the time that the caller has, or it is given up.
_MIN_PROGRESS_BYTES = 2**16


class _OneAtATime(FlowControl):
    """Reads no further while a request waits for the one before it, or waiting bodies would fill the memory."""

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        # uvloop raises an error for a connection that is being closed.
        if not self._waiting and not self._transport.is_closing():
            super().resume_reading()


def protocol_class(patience_s: float) -> type[Protocol]:
    """The protocol with this patience; uvicorn makes one of it for each connection."""
    return type("PatientProtocol", (Protocol,), {"patience_s": patience_s})


class Protocol(HttpToolsProtocol):
    """One connection. A caller has `patience_s` seconds to send a head, and to take (more of) an answer."""

    patience_s: float

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_bytes = 0
        self._running: RequestResponseCycle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._answer_timer: asyncio.TimerHandle | None = None
        self._rest_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _OneAtATime(transport, self.pipeline)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # uvicorn tells only the last of several requests in a row.
        if self._running and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self.pipeline.clear()
        for timer in (self._head_timer, self._answer_timer, self._rest_timer):
            if timer:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        # Before the parser takes from it what is body.
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > _MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._await_head()

    def on_headers_complete(self) -> None:
        if self._head_timer:
            self._head_timer.cancel()
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.more_body and not self.transport.is_closing():
            # Answered before its body was read. The rest is read and forgotten, but not for ever.
            self._rest_timer = self.loop.call_later(self.patience_s, self.transport.abort)

    def on_message_complete(self) -> None:
        if self._rest_timer:
            self._rest_timer.cancel()
        super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = max(0, self._head_bytes - _HEAD_PER_BODY * len(body))
        super().on_body(body)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answer_timer:
            self._answer_timer.cancel()

    def _await_head(self) -> None:
        if self._head_timer:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(self.patience_s, self.transport.abort)

    def _await_reader(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._answer_timer = self.loop.call_later(self.patience_s, self._check_reader, left)

    def _check_reader(self, before: int) -> None:
        if before - self.transport.get_write_buffer_size() < _MIN_PROGRESS_BYTES:
            # Close would wait for the reader, and keep the answer in memory until then.
            self.transport.abort()
        else:
            self._await_reader()
