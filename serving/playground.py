"""The page to play with under `GET /`: plain files that need no build step and fetch nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

from serving.errors import ApiError

_FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# The page may load, run and call only what comes from this server. blob: and data: are the pictures that a person gave.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Files of one version belong together; a browser asks whether it still has the newest.
    "Cache-Control": "no-cache",
}


def router() -> APIRouter:
    """`/` and `/page/NAME`, without a key: they hold nothing of the bundle."""
    routes = APIRouter()
    # A mount of static files would miss them under a root path that the proxy has taken off.
    files = {path.name: path for path in _FOLDER.iterdir() if path.suffix in _TYPES}

    @routes.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return _answer(files["index.html"])

    @routes.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> FileResponse:
        if name not in files:
            raise ApiError(404, "not_found", f"the page has no file {name[:64]!r}", "GET / is the page")
        return _answer(files[name])

    return routes


def _answer(path: Path) -> FileResponse:
    return FileResponse(path, media_type=_TYPES[path.suffix], headers=_HEADERS)
