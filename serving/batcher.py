"""One thread that runs what is queued, in batches: whatever waits is taken at once, up to the largest batch.

Each call has a lane of its own, and the lanes take turns, so that a flood of one call does not hold up the other. An
item whose caller has gone or whose time is over is dropped unseen. When a batch fails its items are run one by one, so
that only the one at fault fails.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

_IDLE_BEAT_S = 0.5
# For the batch that runs when the server ends. A thread that hangs does not keep it from ending.
_JOIN_S = 2.0
_COMPANY_S = 0.025

_Payload = TypeVar("_Payload")
_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


class ExpiredError(Exception):
    """The item was not begun before its deadline."""


class StoppedError(Exception):
    """The batch thread has ended, and the item will not be run."""


@dataclass(eq=False)
class _Item(Generic[_Payload, _Result]):
    payload: _Payload
    # Only items of one key, say one shape, share a batch.
    key: Hashable
    future: asyncio.Future[_Result]
    deadline: float
    queued_at: float = field(default_factory=time.monotonic)
    # How long it took from being queued to being begun, and from there to its result.
    waited_s: float = 0.0
    ran_s: float = 0.0


@dataclass
class Times:
    """Seconds that an item waited and ran."""

    queue: float
    inference: float


class Lane(Generic[_Payload, _Result]):
    """The queue of one call: what runs a batch, and the batch sizes that are run, ascending and beginning with 1.

    `run` gets the payloads of a batch, all of one key, and gives as many results; it is called in the batch thread.
    `on_batch` is told the size of every batch and its seconds.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Sequence[_Payload]], Sequence[_Result]],
        on_batch: Callable[[int, float], None],
        sizes: Sequence[int],
    ) -> None:
        self.name = name
        self.sizes = tuple(sizes)
        self.run = run
        self.on_batch = on_batch
        self.items: deque[_Item[_Payload, _Result]] = deque()
        # Items that are being made ready and will be submitted soon. Kept by whoever submits them.
        self.expected = 0

    def take(self) -> tuple[list[_Item[_Payload, _Result]], list[_Item[_Payload, _Result]]]:
        """The next batch, and the items that are too late; both leave the queue, as do those nobody waits for."""
        now = time.monotonic()
        waiting: list[_Item[_Payload, _Result]] = []
        expired: list[_Item[_Payload, _Result]] = []
        for item in self.items:
            if not item.future.cancelled():
                (expired if item.deadline < now else waiting).append(item)
        alike = [item for item in waiting if item.key == waiting[0].key]
        size = max((size for size in self.sizes if size <= len(alike)), default=0)
        batch = alike[:size]
        chosen = set(map(id, batch))
        self.items = deque(item for item in waiting if id(item) not in chosen)
        for item in batch:
            item.waited_s = now - item.queued_at
        return batch, expired


class Batcher:
    """The batch thread over some lanes. `delay_s` is how long an item waits for company when the batch is not full."""

    def __init__(self, lanes: Sequence[Lane[Any, Any]], delay_s: float) -> None:
        self._lanes = deque(lanes)
        self._delay_s = delay_s
        self._condition = threading.Condition()
        self._stopping = False
        self._running: Sequence[_Item[Any, Any]] = ()
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="batch", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to work for the event loop that is running."""
        self._loop = asyncio.get_running_loop()
        self._beat = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the batch that it is at. What is queued still gets StoppedError."""
        self._end()
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            _log.critical("the batch thread hangs, and is left behind")

    def give_up(self) -> None:
        """Everything that is queued or runs gets StoppedError, also from a thread that hangs."""
        self._end()
        self._drop()

    @property
    def working(self) -> bool:
        return self._thread.is_alive()

    def silence_s(self) -> float:
        """Seconds since the thread showed that it lives: long where a batch hangs, infinite once it has ended."""
        return time.monotonic() - self._beat if self._thread.is_alive() else float("inf")

    async def submit(
        self, lane: Lane[_Payload, _Result], payload: _Payload, key: Hashable, deadline: float
    ) -> tuple[_Result, Times]:
        """The result of `payload`, and how long it took. `deadline` is on the clock of `time.monotonic`.

        Errors: ExpiredError, StoppedError, and whatever the lane's `run` raises for this item alone.
        """
        assert self._loop is not None
        item = _Item[_Payload, _Result](payload, key, self._loop.create_future(), deadline)
        with self._condition:
            if self._stopping:
                raise StoppedError
            lane.items.append(item)
            self._condition.notify()
        result = await item.future
        return result, Times(item.waited_s, item.ran_s)

    def _work(self) -> None:
        try:
            while True:
                with self._condition:
                    lane = self._next_lane()
                    if lane is None:
                        return
                    batch, expired = lane.take()
                self._running = batch
                self._deliver(expired, [ExpiredError()] * len(expired))
                if batch:
                    self._run(lane, batch)
                self._running = ()
        except BaseException:
            _log.critical("the batch thread has ended", exc_info=True)
        finally:
            self.give_up()

    def _next_lane(self) -> Lane[Any, Any] | None:
        """The lane whose turn it is, once it has a batch to run; None to stop."""
        while not self._stopping:
            self._beat = time.monotonic()
            patience = [(self._patience_s(lane), lane) for lane in self._lanes if lane.items]
            due = next((lane for seconds, lane in patience if seconds <= 0), None)
            if due is None:
                self._condition.wait(min((seconds for seconds, _ in patience), default=_IDLE_BEAT_S))
                continue
            self._lanes.remove(due)
            self._lanes.append(due)
            return due
        return None

    def _patience_s(self, lane: Lane[Any, Any]) -> float:
        """How much longer the oldest item of a lane waits for others to share its batch."""
        if len(lane.items) >= lane.sizes[-1]:
            return 0.0
        # Whoever makes items ready keeps the processor busy, so that to wait a little for them wastes nothing.
        limit = max(self._delay_s, _COMPANY_S) if lane.expected > 0 else self._delay_s
        return min(limit - (self._beat - lane.items[0].queued_at), _IDLE_BEAT_S)

    def _run(self, lane: Lane[Any, Any], batch: Sequence[_Item[Any, Any]]) -> None:
        started = time.monotonic()
        outcomes: list[Any]
        try:
            outcomes = list(lane.run([item.payload for item in batch]))
        except Exception as error:
            if len(batch) > 1:
                _log.warning("%s: a batch of %d failed (%s); each alone", lane.name, len(batch), error, exc_info=True)
                for item in batch:
                    self._run(lane, [item])
                return
            outcomes = [error]
        seconds = time.monotonic() - started
        for item in batch:
            item.ran_s = seconds
        lane.on_batch(len(batch), seconds)
        self._deliver(batch, outcomes)

    def _deliver(self, items: Sequence[_Item[Any, Any]], outcomes: Sequence[Any]) -> None:
        """Hand the outcomes, an exception being a failure, to those who wait in the event loop."""
        if items and self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_settle, items, outcomes)

    def _drop(self) -> None:
        with self._condition:
            left = [*self._running, *(item for lane in self._lanes for item in lane.items)]
            for lane in self._lanes:
                lane.items.clear()
        self._deliver(left, [StoppedError()] * len(left))

    def _end(self) -> None:
        with self._condition:
            self._stopping = True
            self._condition.notify()


def _settle(items: Sequence[_Item[Any, Any]], outcomes: Sequence[Any]) -> None:
    for item, outcome in zip(items, outcomes, strict=True):
        if item.future.done():
            continue
        if isinstance(outcome, Exception):
            item.future.set_exception(outcome)
        else:
            item.future.set_result(outcome)
