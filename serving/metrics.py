"""What Prometheus reads from `GET /metrics`. Each application has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

__all__ = ["CONTENT_TYPE", "Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The series of one server; `call` is `embed` or `reconstruct`, `path` a path of the server or `other`."""

    def __init__(self) -> None:
        # Series of the time when each was made double the text and help nobody.
        disable_created_metrics()
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.requests = Counter("cae_requests", "Requests answered.", ["path", "status"], registry=registry)
        self.request_seconds = Histogram(
            "cae_request_seconds",
            "From head to answer.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "cae_stage_seconds",
            "Time of one request in a stage: read, decode, queue, inference, encode.",
            ["call", "stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.rejected = Counter("cae_rejected", "Requests refused, by reason.", ["path", "reason"], registry=registry)
        self.images = Counter("cae_images", "Images that went through the model.", ["call"], registry=registry)
        self.batch_size = Histogram(
            "cae_batch_size", "Images in one inference.", ["call"], buckets=_SIZES, registry=registry
        )
        self.batch_seconds = Histogram(
            "cae_batch_seconds", "Time of one inference.", ["call"], buckets=_SECONDS, registry=registry
        )
        self._admitted_images = Gauge(
            "cae_admitted_images", "Images admitted and not yet answered.", ["call"], registry=registry
        )
        self._admitted_bytes = Gauge(
            "cae_admitted_bytes", "Bytes of bodies admitted and not yet answered.", ["call"], registry=registry
        )
        self._queued = Gauge("cae_queue_images", "Images that wait for the model.", ["call"], registry=registry)
        self._state = Gauge("cae_up", "1 where the server is live, or ready.", ["state"], registry=registry)
        self._runs = Gauge(
            "cae_runs_on",
            "1, labelled with what the model runs on: cuda asked for and not got shows here.",
            ["asked", "provider", "precision"],
            registry=registry,
        )
        self._registry = registry

    def watch_queue(
        self, call: str, admitted: Callable[[], float], num_bytes: Callable[[], float], queued: Callable[[], float]
    ) -> None:
        """Read the depth of a call's queue whenever somebody asks for the metrics."""
        self._admitted_images.labels(call).set_function(admitted)
        self._admitted_bytes.labels(call).set_function(num_bytes)
        self._queued.labels(call).set_function(queued)

    def watch_state(self, live: Callable[[], bool], ready: Callable[[], bool]) -> None:
        """Read the two states whenever somebody asks for the metrics."""
        self._state.labels("live").set_function(live)
        self._state.labels("ready").set_function(ready)

    def runs_on(self, asked: str, provider: str, precision: str) -> None:
        """Say what the model runs on."""
        self._runs.labels(asked, provider, precision).set(1)

    def text(self) -> bytes:
        """The text that Prometheus reads, of CONTENT_TYPE."""
        return generate_latest(self._registry)
