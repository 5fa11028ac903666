"""The HTTP application: images in, patch features and reconstructions out.

`POST /embed`, `POST /reconstruct`, `GET /info`, `GET /health/live`, `GET /health/ready`, `GET /metrics`, described by
`GET /openapi.json`, and a page to play with under `GET /`. The shortest call:
`curl --data-binary @photo.jpg http://127.0.0.1:8000/embed`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware

from serving import embed, errors, playground, reconstruct, status
from serving.observe import Observe
from serving.security import key_check
from serving.service import Service


def create_app(service: Service) -> FastAPI:
    """The application over a service; its batch thread runs as long as the application."""
    settings = service.settings

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    # The interactive pages are left out because they fetch scripts from elsewhere.
    app = FastAPI(
        title="Context Autoencoder",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        root_path=settings.root_path,
    )
    guarded = [Depends(key_check(settings.api_key))] if settings.api_key else []
    app.include_router(embed.router(service), dependencies=guarded)
    app.include_router(reconstruct.router(service), dependencies=guarded)
    app.include_router(status.router(service), dependencies=guarded)
    app.include_router(status.health(service))
    app.include_router(playground.router())
    errors.install(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    # Last, so that it is outermost.
    app.add_middleware(Observe, metrics=service.metrics, quiet=["/health/live", "/health/ready", "/metrics"])
    return app
