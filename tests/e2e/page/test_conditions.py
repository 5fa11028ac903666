"""The page when something is in its way: errors, keys, other bundles, small and dark screens, proxies."""

from __future__ import annotations

import io
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.e2e.page.pictures import Pixels, assert_same, encoded, expected_pasted, pixels_of, saved
from tests.e2e.page.tab import MAX_BODY_BYTES, Open, add_to_bundle, shell
from tests.serving.running_server import Server, running
from tests.serving.tiny_bundle import write_tiny_bundle


@pytest.mark.parametrize(
    ("name", "data", "title", "part"),
    [
        ("notes.txt", b"dear diary, today", "The server cannot read this file", "expected one of JPEG, PNG"),
        (
            "half.jpg",
            encoded(pixels_of(6, size=(160, 160)), "JPEG")[:2000],
            "cut off or damaged",
            "Check that it opens",
        ),
        ("empty.png", b"", "This file is empty", "Take another one"),
        ("small.png", encoded(pixels_of(7)[:, :5]), "This picture is too small", "32 × 5 pixels"),
        ("long.png", encoded(np.zeros((3, 300, 1000), np.uint8)), "too many pixels", "1000 × 300 pixels"),
        ("heavy.bin", bytes(MAX_BODY_BYTES + 1), "This file is too large", "the server takes 100 kB"),
    ],
)
def test_a_file_that_will_not_do_is_told_in_sentences_and_the_image_before_stays(
    server: Server, open_tab: Open, tmp_path: Path, name: str, data: bytes, title: str, part: str
) -> None:
    tab = open_tab(server.url, allowed=["415"])
    tab.settle()
    before = tab.canvas("#picture")
    bodies: list[str] = []
    tab.page.on("request", lambda request: bodies.append(request.url) if request.method == "POST" else None)
    tab.page.set_input_files("#file", saved(tmp_path, name, data))
    notice = tab.page.get_by_role("alert").filter(has_text=title)
    expect(notice).to_contain_text(part)
    expect(notice).to_contain_text(name)
    text = notice.inner_text()
    assert not any(word in text for word in ("curl", "GET /", "undefined", "{"))
    expect(tab.page.locator("#retry")).to_be_hidden()
    # What the page can see by itself is not sent.
    assert len(bodies) == (name in ("notes.txt", "half.jpg"))
    assert (tab.canvas("#picture") == before).all()
    tab.pick(saved(tmp_path, "good.png", encoded(pixels_of(8))))
    expect(tab.page.locator("#notice")).to_be_hidden()
    assert_same(tab.canvas("#picture"), pixels_of(8))


def test_a_full_queue_offers_another_try_when_the_server_allows_one(
    open_tab: Open, tmp_path: Path, examples: list[Pixels]
) -> None:
    image = encoded(examples[0])
    folder = add_to_bundle(write_tiny_bundle(tmp_path / "bundle"), [image])
    room = len(image) + 100
    with running(folder, tmp_path / "log", {"CAE_SERVING_MAX_QUEUED_BYTES": str(room)}) as server:
        address = urlsplit(server.url)
        assert address.hostname
        assert address.port
        with socket.create_connection((address.hostname, address.port)) as slow:
            # It is charged what it says it will send, and sends nothing.
            slow.sendall(f"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: {room}\r\n\r\n".encode())
            tab = open_tab(server.url, allowed=["429"])
            notice = tab.page.get_by_role("alert").filter(has_text="The server is busy")
            expect(notice).to_be_visible()
            retry = tab.page.locator("#retry")
            expect(retry).to_be_disabled()
            expect(retry).to_have_text("Try again in 1 s")
        expect(retry).to_be_enabled()
        retry.click()
        tab.settle()
        expect(tab.page.locator("#notice")).to_be_hidden()
        assert_same(tab.canvas("#picture"), examples[0])


def test_a_server_that_is_gone_is_told_and_nothing_is_lost(
    open_tab: Open, tmp_path: Path, examples: list[Pixels]
) -> None:
    folder = add_to_bundle(write_tiny_bundle(tmp_path / "bundle"), [encoded(examples[0])])
    with running(folder, tmp_path / "log", {}) as server:
        tab = open_tab(server.url, allowed=["ERR_CONNECTION"])
        tab.settle()
        before = tab.masked()
    tab.page.get_by_role("button", name="Invert").click()
    expect(tab.page.get_by_role("alert").filter(has_text="The server does not answer")).to_be_visible()
    expect(tab.page.locator("#retry")).to_be_enabled()
    assert sorted(before + tab.masked()) == list(range(16))


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
def test_a_key_is_asked_for_kept_in_memory_and_left_out_of_commands(
    open_tab: Open, tmp_path: Path, examples: list[Pixels]
) -> None:
    folder = add_to_bundle(write_tiny_bundle(tmp_path / "bundle"), [encoded(examples[0])])
    key = "a-long-secret"
    with running(folder, tmp_path / "log", {"CAE_SERVING_API_KEY": key}) as server:
        tab = open_tab(server.url, allowed=["401"])
        expect(tab.page.get_by_role("heading", name="This server asks for a key")).to_be_visible()
        expect(tab.page.get_by_label("Key")).to_be_focused()
        for wrong, sentence in (("not-the-key", "does not accept"), ("schlüssel", "ASCII")):
            tab.page.get_by_label("Key").fill(wrong)
            tab.page.keyboard.press("Enter")
            expect(tab.page.locator("#key-problem")).to_contain_text(sentence)
        tab.page.get_by_label("Key").fill(key)
        tab.page.get_by_role("button", name="Use key").click()
        tab.settle()
        expect(tab.page.locator("#key-form")).to_be_hidden()
        assert_same(tab.canvas("#picture"), examples[0])
        assert tab.page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        command = tab.copied("Copy curl: Pasted")
        assert key not in command
        shell(command, tmp_path, CAE_SERVING_API_KEY=key)
        assert (np.asarray(Image.open(tmp_path / "pasted.png")).transpose(2, 0, 1) == tab.figure("pasted")).all()
        tab.page.reload()
        expect(tab.page.locator("#key-form")).to_be_visible()


def test_an_encoder_alone_shows_features_and_says_why_no_completion(open_tab: Open, tmp_path: Path) -> None:
    folder = add_to_bundle(
        write_tiny_bundle(tmp_path / "bundle", reconstructors=False, size=(32, 48)), outputs=["patches", "pooled"]
    )
    with running(folder, tmp_path / "log", {}) as server:
        tab = open_tab(server.url)
        tab.settle()
        expect(tab.page.locator("#about-image")).to_contain_text("so this one is drawn")
        expect(tab.page.locator("#completion")).to_contain_text("an encoder without a decoder")
        expect(tab.page.locator("#completion figure").first).to_be_hidden()
        expect(tab.page.locator("#mask")).to_be_hidden()
        expect(tab.page.locator('[data-figure="attention"] .empty')).to_contain_text("no class token")
        expect(tab.page.locator("#heads")).to_be_hidden()
        # A grid of 4 rows and 6 columns.
        assert tab.figure("pca").shape == (3, 4, 6)
        tab.page.get_by_role("gridcell", name="row 4, column 6", exact=True).click()
        expect(tab.page.locator('[data-figure="similarity"] .reading')).to_contain_text("row 4, column 6")
        # TIFF: the server reads it, a browser cannot draw it, and nothing here can draw it for the browser.
        path = saved(tmp_path, "scan.tiff", encoded(pixels_of(9, size=(32, 48)), "TIFF"))
        tab.page.set_input_files("#file", path)
        expect(tab.page.locator("#about-image")).to_contain_text("no decoder to do it")


def test_a_grey_bundle_that_is_not_square_works(open_tab: Open, tmp_path: Path) -> None:
    image = pixels_of(10, channels=1, size=(24, 40))
    folder = add_to_bundle(write_tiny_bundle(tmp_path / "bundle", channels=1, size=(24, 40)), [encoded(image)])
    with running(folder, tmp_path / "log", {}) as server:
        tab = open_tab(server.url)
        tab.settle()
        assert_same(tab.canvas("#picture"), image.repeat(3, axis=0))
        assert_same(tab.figure("pasted"), expected_pasted(image, tab.masked()).repeat(3, axis=0))
        with tab.completing():
            tab.page.get_by_role("gridcell", name="row 3, column 5").click()
        assert_same(tab.figure("pasted"), expected_pasted(image, tab.masked()).repeat(3, axis=0))
        # A colour file is turned grey for the eye as for the model.
        colour = pixels_of(11, size=(24, 40))
        tab.pick(saved(tmp_path, "colour.png", encoded(colour)))
        grey = np.asarray(Image.fromarray(np.ascontiguousarray(colour.transpose(1, 2, 0))).convert("L"))
        assert_same(tab.canvas("#picture"), np.stack([grey] * 3))


def test_files_that_no_browser_draws_are_sent_as_they_are_and_drawn_by_the_server(
    open_tab: Open, tmp_path: Path
) -> None:
    image = pixels_of(12, channels=5)
    buffer = io.BytesIO()
    np.save(buffer, image)
    with running(write_tiny_bundle(tmp_path / "bundle", channels=5), tmp_path / "log", {}) as server:
        tab = open_tab(server.url, allowed=["415"])
        expect(tab.page.locator("#channels-hint")).to_contain_text("images of 5 channels")
        tab.pick(saved(tmp_path, "tile.npy", buffer.getvalue()))
        assert_same(tab.canvas("#picture"), image[:3])
        tab.page.set_input_files("#file", saved(tmp_path, "photo.png", encoded(image[:3])))
        expect(tab.page.get_by_role("alert").filter(has_text="has 3 channels, expected 5")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_screen_and_can_be_read(server: Server, open_tab: Open, width: int, scheme: str) -> None:
    tab = open_tab(server.url, width=width, scheme=scheme)
    tab.settle()
    tab.copied("Copy curl: Pasted")
    tab.page.set_input_files("#file", [{"name": "empty.png", "mimeType": "image/png", "buffer": b""}])
    expect(tab.page.locator("#notice")).to_be_visible()
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    brightness = tab.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(brightness) < 60) if scheme == "dark" else (min(brightness) > 200)
    assert tab.page.evaluate(FAINT_TEXTS) == []
    assert tab.page.evaluate(NAMELESS) == []


# Texts whose contrast with what lies behind them is below 4.5 (WCAG 2.2, 1.4.3).
FAINT_TEXTS = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, k) => sum + x * [0.2126, 0.7152, 0.0722][k], 0);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = parts(getComputedStyle(element).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter((node) => node.nodeType === 3 && node.data.trim());
    if (!text.length || !element.checkVisibility() || element.closest(".hidden, .skip, noscript, :disabled")) continue;
    const [high, low] = [parts(getComputedStyle(element).color), behind(element)].map(luminance).sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) faint.push(`${element.textContent.trim()}: ${ratio.toFixed(2)}`);
  }
  return faint;
}"""

# Controls that a screen reader could not name.
NAMELESS = """() => [...document.querySelectorAll("button, input, [role=grid], [role=gridcell], [role=img]")]
  .filter((e) => e.checkVisibility() && !e.ariaLabel && !e.getAttribute("aria-labelledby"))
  .filter((e) => ![...(e.labels ?? [])].some((label) => label.textContent.trim()))
  .filter((e) => e.localName !== "button" || !e.textContent.trim())
  .map((e) => e.outerHTML)"""


def test_the_page_works_behind_a_proxy_that_takes_a_prefix_off(
    open_tab: Open, tmp_path: Path, examples: list[Pixels]
) -> None:
    folder = add_to_bundle(write_tiny_bundle(tmp_path / "bundle"), [encoded(examples[0])])
    with (
        running(folder, tmp_path / "log", {"CAE_SERVING_ROOT_PATH": "/cae"}) as server,
        stripping_proxy(server.url, "/cae") as url,
    ):
        tab = open_tab(f"{url}/cae/")
        tab.settle()
        assert_same(tab.canvas("#picture"), examples[0])
        assert f"{url}/cae/reconstruct" in tab.copied("Copy curl: Pasted")


@contextmanager
def stripping_proxy(target: str, prefix: str) -> Iterator[str]:
    """A proxy that shows `target` under a prefix, which the server behind it never sees."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            if not self.path.startswith(prefix + "/"):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = httpx.request(
                self.command, target + self.path.removeprefix(prefix), content=body, headers=dict(self.headers)
            )
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_POST = handle_any  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Silent: the base class writes every request to stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
        proxy.shutdown()
        thread.join()


def test_the_pages_files_may_load_nothing_from_elsewhere(server: Server) -> None:
    for path in ("/", "/page/app.js", "/page/style.css"):
        answer = httpx.get(server.url + path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert httpx.get(server.url + "/page/no.js").json()["error"]["code"] == "not_found"
    assert httpx.get(server.url + "/page/%2e%2e/app.py").status_code == 404
