"""One process: warming up beside the open port, draining on SIGTERM, and ending when the batch thread has died."""

from __future__ import annotations

import logging
import threading
import time
from types import FrameType

import uvicorn

from serving.app import create_app
from serving.protocol import protocol_class
from serving.service import Service

# Time for whoever watches to see that the process is not live, before it ends.
_LAST_WORDS_S = 2.0
# The last of the grace: for answers to be taken and connections to be closed, and for the batch at work to end.
_CLOSING_S, _JOINING_S = 1.0, 2.0
# uvicorn asks ten times a second.
_LATE_TICK_S = 1.0
_log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn over one service. `failed` says after `run` whether it ended because it could not go on."""

    def __init__(self, service: Service) -> None:
        settings = service.settings
        self.failed = False
        self._service = service
        # Not of the event loop's own pool, for whose threads it waits when it ends.
        self._warming = threading.Thread(target=self._warm, name="warm", daemon=True)
        self._deadline = float("inf")
        self._last_tick = time.monotonic()
        self._trusted_until = 0.0
        super().__init__(
            uvicorn.Config(
                create_app(service),
                host=settings.host,
                port=settings.port,
                http=protocol_class(settings.body_timeout_s),
                # There is nothing for WebSockets here, and a library for them may be installed.
                ws="none",
                lifespan="on",
                # Requests are logged by Observe, with their ids.
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=max(1, round(settings.grace_s)),
                server_header=False,
            )
        )

    async def on_tick(self, counter: int) -> bool:
        """What uvicorn asks ten times a second: whether it is time to end."""
        if self._warming.ident is None:
            self._warming.start()
        service, now = self._service, time.monotonic()
        if now - self._last_tick > _LATE_TICK_S:
            # The whole process was paused. Its batch thread may need a moment, too, to show that it lives.
            self._trusted_until = now + _LATE_TICK_S
        self._last_tick = now
        if not service.live and not self.failed and now > self._trusted_until:
            self.failed = True
            service.draining = True
            service.give_up()
            self._deadline = now + _LAST_WORDS_S
            _log.critical("the batch thread has ended or hangs; the server ends")
        if service.draining and not self.should_exit:
            if now > self._deadline:
                service.give_up()
                self._end(_CLOSING_S)
            elif service.idle and not self.failed:
                # Those who still send or read have what is left of the grace.
                self._end(self._deadline - now)
        return await super().on_tick(counter)

    def _end(self, seconds: float) -> None:
        self.should_exit = True
        self.config.timeout_graceful_shutdown = max(1, int(seconds))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On the first SIGTERM or Ctrl-C finish what was admitted and end; on the next end at once."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        grace_s = self._service.settings.grace_s
        self._deadline = time.monotonic() + max(grace_s - _CLOSING_S - _JOINING_S, grace_s / 2)

    @property
    def left_behind(self) -> bool:
        """Whether a thread of the server is still in the model, after `run`."""
        return self._warming.is_alive() or self._service.working

    def _warm(self) -> None:
        started = time.monotonic()
        service = self._service
        try:
            service.warm()
        except Exception:
            _log.critical("the bundle cannot run", exc_info=True)
            self.failed = self.should_exit = True
            return
        _log.info(
            "ready after %.1f s: %s in %s on %s, %d threads, batches of %s",
            time.monotonic() - started,
            service.settings.bundle,
            service.bundle.precision,
            service.bundle.provider,
            service.bundle.num_threads,
            service.batch_sizes,
        )
