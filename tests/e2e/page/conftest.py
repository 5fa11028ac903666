"""A real Chromium, and a real server with examples in its bundle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.e2e.page.pictures import Pixels, encoded, pixels_of
from tests.e2e.page.tab import CHROMIUM, MAX_BODY_BYTES, Open, Tab, add_to_bundle
from tests.serving.running_server import Server, running
from tests.serving.tiny_bundle import write_tiny_bundle


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}; apt-get install chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=str(CHROMIUM),
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                # A name that is not this machine's own: what browsers allow on localhost alone is missing there.
                "--host-resolver-rules=MAP cae.test 127.0.0.1",
            ],
        )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def examples() -> list[Pixels]:
    return [pixels_of(1), pixels_of(2)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, examples: list[Pixels]) -> Iterator[Server]:
    folder = write_tiny_bundle(tmp_path_factory.mktemp("bundle"))
    add_to_bundle(folder, [encoded(pixels) for pixels in examples])
    limits = {"CAE_SERVING_MAX_BODY_BYTES": str(MAX_BODY_BYTES), "CAE_SERVING_MAX_PIXELS": "250000"}
    with running(folder, tmp_path_factory.mktemp("log") / "log", limits) as server:
        yield server
        assert "Traceback" not in server.log.read_text()


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[Open]:
    """Opens the page of a server; in the end nothing else was asked and the console is empty but for `allowed`."""
    opened: list[tuple[Tab, str, Sequence[str]]] = []

    def open_one(url: str, *, allowed: Sequence[str] = (), width: int = 1280, scheme: Any = "light") -> Tab:
        context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        context.set_default_timeout(15_000)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        tab = Tab(context.new_page())
        tab.watch()
        opened.append((tab, urlsplit(url).netloc, allowed))
        tab.page.goto(url)
        return tab

    yield open_one
    for tab, host, allowed in opened:
        assert [text for text in tab.problems if not any(part in text for part in allowed)] == []
        assert tab.hosts <= {host, ""}  # the empty one is that of blob:
        tab.page.context.close()
