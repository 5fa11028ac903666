"""What the server says of itself: /info, /health, /metrics, and the bundle's example images."""

from __future__ import annotations

import platform
from typing import Any

import fastapi
import numpy as np
import PIL
from fastapi import APIRouter, Response

from serving import metrics, preprocess
from serving.answers import PNG
from serving.errors import ApiError, ErrorBody, retry_later
from serving.ort import onnxruntime
from serving.service import Service


def health(service: Service) -> APIRouter:
    """/health/live and /health/ready, for whoever watches the process: without a key."""
    routes = APIRouter(prefix="/health")

    @routes.get("/live", responses={503: {"model": ErrorBody}})
    async def live() -> dict[str, str]:
        """The batch thread is alive and shows it; where it is not, the process should be replaced."""
        if not service.live:
            raise retry_later(503, "not_live", "the batch thread has ended or hangs; the process has to be replaced", 5)
        return {"status": "live"}

    @routes.get("/ready", responses={503: {"model": ErrorBody}})
    async def ready() -> dict[str, str]:
        """Every shape that will run has been run once, and calls are answered."""
        service.check_ready()
        return {"status": "ready"}

    return routes


def router(service: Service) -> APIRouter:
    """/info, /metrics and /examples."""
    routes = APIRouter()

    @routes.get("/info")
    async def info() -> dict[str, Any]:
        """The bundle, what it really runs on, versions and limits."""
        bundle, settings = service.bundle, service.settings
        return {
            "bundle": bundle.info.model_dump(),
            "bundle_sha256": bundle.sha256,
            "device": {
                "asked": settings.device,
                "provider": bundle.provider,
                "precision": bundle.precision,
                "num_threads": bundle.num_threads,
                "batch_sizes": list(service.batch_sizes),
            },
            "limits": {
                "max_body_bytes": settings.bytes_per_request,
                "max_pixels": settings.max_pixels,
                "min_side_px": preprocess.MIN_SIDE_PX,
                "max_images": settings.images_per_request,
                "max_queued_images": settings.max_queued_images,
                "max_queued_bytes": settings.max_queued_bytes,
            },
            "versions": {
                "python": platform.python_version(),
                "onnxruntime": onnxruntime.__version__,
                "pillow": PIL.__version__,
                "numpy": np.__version__,
                "fastapi": fastapi.__version__,
            },
        }

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {metrics.CONTENT_TYPE: {}}}})
    async def read_metrics() -> Response:
        """The figures that Prometheus reads."""
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    @routes.get(
        "/examples/{name}",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}}, 404: {"model": ErrorBody}},
    )
    async def example(name: str) -> Response:
        """One of the example images that the bundle carries; GET /info lists them under bundle.examples."""
        # Only names that bundle.json lists: no path that a caller makes up reaches the disk.
        if name not in service.examples:
            message = f"the bundle has no example {name[:64]!r}"
            raise ApiError(404, "not_found", message, "GET /info lists bundle.examples")
        return Response(service.examples[name], media_type=PNG)

    return routes
