"""What the endpoints share: admission, decoding, and the two calls of the bundle behind their queues."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import anyio
import anyio.to_thread
import numpy as np
from fastapi import Request, Response
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect

from serving import preprocess
from serving.admission import Admission, Ticket
from serving.batcher import Batcher, Lane, Times
from serving.bodies import Body, EmbedBody, declared_bytes, read_body
from serving.bundle import Bundle
from serving.bundle_info import Output
from serving.errors import retry_later
from serving.masks import Mask, painted_mask
from serving.metrics import Metrics
from serving.observe import Stages
from serving.pixel_budget import PixelBudget
from serving.settings import Settings

Pixels = NDArray[np.uint8]
Features = dict[Output, NDArray[np.float32]]

# On a CPU a batch costs what its images cost, but a larger one suffers less from what else runs on the cores; beyond 8
# nothing more is gained. A GPU gains from fuller batches, and from waiting for them: not yet measured.
_CPU_BATCH, _CUDA_BATCH = 8, 32
_CUDA_DELAY_MS = 2.0
_LONGEST_RETRY_S = 60

_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


class EmbedItem(NamedTuple):
    """One image, uint8 [C, H, W], and the outputs that are wanted of it."""

    image: Pixels
    outputs: tuple[Output, ...]


class ReconstructItem(NamedTuple):
    """One image, uint8 [C, H, W], and what is hidden of it; without a mask it goes the way without regressor."""

    image: Pixels
    mask: Mask | None


class Admitted(NamedTuple):
    """A request that was let in: its room, its body, and its time in each stage."""

    request: Request
    ticket: Ticket
    body: Body
    stages: Stages


class Call:
    """One of the two calls: its room, its queue and its figures."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        metrics: Metrics,
        run: Callable[[Sequence[Any]], Sequence[Any]],
        batch_sizes: Sequence[int],
        retry_after_s: Callable[[], float],
    ) -> None:
        self.name = name
        self.admission = Admission(settings.max_queued_images, settings.max_queued_bytes, retry_after_s)
        self.lane: Lane[Any, Any] = Lane(name, run, self._ran, batch_sizes)
        self._metrics = metrics
        # Seconds for each image of late; nothing is known before the first batch.
        self._image_s = 0.0
        metrics.watch_queue(
            name, lambda: self.admission.images, lambda: self.admission.bytes, lambda: len(self.lane.items)
        )

    @property
    def backlog_s(self) -> float:
        """Work for the batch thread in what is admitted now, in seconds."""
        return self._image_s * self.admission.images

    def _ran(self, size: int, seconds: float) -> None:
        self._metrics.images.labels(self.name).inc(size)
        self._metrics.batch_size.labels(self.name).observe(size)
        self._metrics.batch_seconds.labels(self.name).observe(seconds)
        self._image_s = seconds / size if self._image_s == 0 else 0.9 * self._image_s + 0.1 * seconds / size


class Service:
    """A bundle at work. Everything but `warm` is for the event loop."""

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        self.bundle = bundle
        self.settings = settings
        self.metrics = Metrics()
        self.batch_sizes = _powers_of_two(settings.max_batch_size or (_CUDA_BATCH if bundle.on_cuda else _CPU_BATCH))
        self.embedding = Call("embed", settings, self.metrics, self._embed, self.batch_sizes, self._retry_after_s)
        self.reconstruction = Call(
            "reconstruct", settings, self.metrics, self._reconstruct, self.batch_sizes, self._retry_after_s
        )
        self.warmed = False
        self.draining = False
        # In memory and as they were verified, whatever becomes of the folder.
        self.examples = {name: (settings.bundle / name).read_bytes() for name in bundle.info.examples}
        delay_ms = settings.batch_delay_ms
        if delay_ms is None:
            delay_ms = _CUDA_DELAY_MS if bundle.on_cuda else 0.0
        self._batcher = Batcher([self.embedding.lane, self.reconstruction.lane], delay_ms / 1000)
        # More at once would not be faster, only hold more decoded pictures in memory.
        self._decoding = PixelBudget(settings.max_pixels)
        self._room = anyio.CapacityLimiter(bundle.num_threads)
        self.metrics.watch_state(lambda: self.live, lambda: self.ready)
        self.metrics.runs_on(settings.device, bundle.provider, bundle.precision)

    @property
    def live(self) -> bool:
        return self._batcher.silence_s() < self.settings.heartbeat_timeout_s

    @property
    def ready(self) -> bool:
        return self.warmed and not self.draining and self.live

    @property
    def idle(self) -> bool:
        """Whether everything that was admitted has been answered."""
        return self.embedding.admission.images == 0 == self.reconstruction.admission.images

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The batch thread, for the time of the context."""
        self._batcher.start()
        try:
            yield
        finally:
            self._batcher.stop()

    @property
    def working(self) -> bool:
        """Whether a batch thread has not ended."""
        return self._batcher.working

    def give_up(self) -> None:
        """Answer all who wait that nothing will come: the batch thread has ended or hangs."""
        self._batcher.give_up()

    def warm(self) -> None:
        """Run every shape that will be run, so that no caller pays for allocations and the choice of kernels."""
        prepared = self.bundle.info.preprocessing
        shape = (prepared.channels, prepared.height, prepared.width)
        image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        for size in self.batch_sizes:
            self._embed([EmbedItem(image, self.bundle.info.outputs)] * size)
            if self.bundle.info.capabilities.reconstruct:
                # Other ratios have other shapes, too many to be run.
                _, mask = self.bundle.draw_mask("random", None, 0)
                self._reconstruct([ReconstructItem(image, mask)] * size)
            if self.bundle.info.capabilities.skip_reconstruct:
                self._reconstruct([ReconstructItem(image, None)] * size)
        self.warmed = True

    def check_ready(self) -> None:
        """Errors: ApiError 503."""
        if self.draining:
            raise retry_later(503, "draining", "the server is stopping; it finishes what it has and takes nothing new")
        if not self.ready:
            raise retry_later(503, "not_ready", "the server is warming up" if self.live else "the server has failed")

    async def admit(self, call: Call, request: Request, model: type[EmbedBody]) -> Admitted:
        """Room for the request until it is answered, and then its body. Errors: ApiError 503; as `read_body`."""
        self.check_ready()
        stages = Stages(self.metrics, call.name)
        ticket = call.admission.admit(declared_bytes(request, self.settings.bytes_per_request))

        def end() -> None:
            request.state.facts.update(images=ticket.images, bytes=ticket.bytes)
            ticket.give_back()

        request.state.at_end.append(end)
        with stages.timed("read"):
            body = await read_body(request, ticket, self.settings, model, self.in_thread)
        return Admitted(request, ticket, body, stages)

    async def in_thread(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """The result of `work` from a worker thread, so that the event loop stays free."""
        return await anyio.to_thread.run_sync(work, *arguments, limiter=self._room)

    async def decode(self, call: Call, files: Sequence[bytes]) -> list[Pixels]:
        """Each image file as uint8 [C, H, W], completely decoded. Errors: ImageError, which says which of several."""
        call.lane.expected += len(files)
        try:
            # An error of a single image need not say which.
            names = [f"image {index}: " for index in range(len(files))] if len(files) > 1 else [""]
            named = zip(names, files, strict=True)
            return await _all([functools.partial(self.in_thread, self._prepared, *item) for item in named])
        finally:
            call.lane.expected -= len(files)

    def read_mask(self, data: bytes) -> Mask:
        """The mask that a picture paints. Errors: ImageError; ValueError where it hides all or nothing."""
        with self._room_for(data):
            # One pixel for each patch is enough.
            image = preprocess.decode(data, max_pixels=self.settings.max_pixels, min_side_px=1)
            return painted_mask(preprocess.to_mode(image, 1), self.bundle.info.model.grid)

    async def run(self, call: Call, items: Sequence[Any], stages: Stages) -> list[Any]:
        """The results of the items, in their order. Errors: ExpiredError, StoppedError."""
        deadline = time.monotonic() + self.settings.request_timeout_s
        outcomes: list[tuple[Any, Times]] = await _all(
            [functools.partial(self._batcher.submit, call.lane, item, self._key(item), deadline) for item in items]
        )
        # Of several images: how long the slowest waited and ran.
        stages.add("queue", max(times.queue for _, times in outcomes))
        stages.add("inference", max(times.inference for _, times in outcomes))
        return [result for result, _ in outcomes]

    def response(
        self, admitted: Admitted, data: bytes, form: str, headers: Mapping[str, str] = MappingProxyType({})
    ) -> Response:
        """A success, with what every success says in its headers, and `headers`."""
        admitted.request.state.facts.update(admitted.stages.milliseconds())
        admitted.ticket.charge_answer(len(data))
        rows, columns = self.bundle.info.model.grid
        common = {
            "X-Patch-Grid": f"{rows}x{columns}",
            "X-Bundle-Sha256": self.bundle.sha256,
            "X-Precision": self.bundle.precision,
            "Server-Timing": admitted.stages.server_timing(),
        }
        return Response(data, media_type=form, headers={**common, **headers})

    def about(self, request: Request) -> dict[str, str]:
        """What every answer but a picture says beside its arrays."""
        rows, columns = self.bundle.info.model.grid
        return {
            "request_id": request.state.request_id,
            "bundle_sha256": self.bundle.sha256,
            "grid": f"{rows}x{columns}",
            "precision": self.bundle.precision,
        }

    def _retry_after_s(self) -> float:
        """How long it should take until all that is admitted now has been answered: one thread runs both calls."""
        return min(self.embedding.backlog_s + self.reconstruction.backlog_s, _LONGEST_RETRY_S)

    def _prepared(self, name: str, data: bytes) -> Pixels:
        try:
            with self._room_for(data):
                image = preprocess.decode(data, max_pixels=self.settings.max_pixels)
                return preprocess.prepare(image, self.bundle.info.preprocessing)
        except preprocess.ImageError as error:
            raise preprocess.ImageError(error.reason, f"{name}{error}") from None

    def _room_for(self, data: bytes) -> AbstractContextManager[None]:
        return self._decoding.room(preprocess.header_pixels(data, max_pixels=self.settings.max_pixels))

    @staticmethod
    def _key(item: EmbedItem | ReconstructItem) -> tuple[int, ...]:
        """What must be equal in one batch: the shapes of the arrays."""
        return (
            () if isinstance(item, EmbedItem) or item.mask is None else (len(item.mask.visible), len(item.mask.masked))
        )

    def _embed(self, items: Sequence[EmbedItem]) -> list[Features]:
        wanted = tuple(dict.fromkeys(output for item in items for output in item.outputs))
        arrays = self.bundle.embed(np.stack([item.image for item in items]), wanted)
        return [{name: arrays[name][index] for name in item.outputs} for index, item in enumerate(items)]

    def _reconstruct(self, items: Sequence[ReconstructItem]) -> list[NDArray[np.float32]]:
        images = np.stack([item.image for item in items])
        masks = [item.mask for item in items if item.mask is not None]
        if not masks:
            return list(self.bundle.skip_reconstruct(images))
        visible, masked = (np.stack(indices) for indices in zip(*masks, strict=True))
        return list(self.bundle.reconstruct(images, visible, masked))


def _powers_of_two(limit: int) -> tuple[int, ...]:
    """Those up to `limit`, and the limit itself, ascending."""
    return tuple(sorted({limit, *(2**power for power in range(limit.bit_length()))}))


async def unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is cancelled when the caller hangs up. The body must have been read.

    Errors: ClientDisconnect.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_gone(request))
    tasks: set[asyncio.Task[Any]] = {working, leaving}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass  # an empty piece after the end of the body


async def _all(calls: Sequence[Callable[[], Coroutine[Any, Any, _Result]]]) -> list[_Result]:
    """The results of all calls at once, in their order; the first error ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call()) for call in calls]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
