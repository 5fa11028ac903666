"""The page in a real Chromium against a real server, as a person uses it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from serving.masks import paste, random_mask
from serving.preprocess import Preprocessing, decode, prepare
from tests.serving.running_server import Server, running
from tests.serving.tiny_bundle import (
    NUM_HEADS,
    expected_features,
    expected_reconstruction,
    expected_skip,
    write_tiny_bundle,
)

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}; apt-get install chromium")
MAX_BODY_BYTES = 100_000
PATCH = 8
Pixels = NDArray[np.uint8]


def pixels_of(seed: int, channels: int = 3, size: tuple[int, int] = (32, 32)) -> Pixels:
    """Random patches with some noise, uint8 [C, H, W]: of the bundle's size, so that nothing is resized."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(30, 226, (channels, size[0] // PATCH, size[1] // PATCH))
    grown = patches.repeat(PATCH, axis=1).repeat(PATCH, axis=2)
    noisy: Pixels = (grown + rng.integers(-20, 21, grown.shape)).astype(np.uint8)
    return noisy


def encoded(pixels: Pixels, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format)
    return buffer.getvalue()


def saved(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def add_to_bundle(folder: Path, examples: Sequence[bytes] = (), **changes: Any) -> Path:
    """Example images, and other values of `bundle.json`."""
    info = json.loads((folder / "bundle.json").read_text())
    info |= changes | {"examples": [f"example_{number}.png" for number in range(len(examples))]}
    for name, data in zip(info["examples"], examples, strict=True):
        saved(folder, name, data)
        info["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "bundle.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
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


@dataclass
class Tab:
    """One open page, with what a test reads from it."""

    page: Page
    problems: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def watch(self) -> None:
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))

    def settle(self) -> None:
        """Wait until features and completions of the first image are there."""
        expect(self.page.locator("#latency tbody tr").first).to_be_visible()
        self.page.wait_for_load_state("networkidle")
        self.idle()

    def idle(self) -> None:
        expect(self.page.locator("[data-busy]")).to_have_count(0)

    @contextmanager
    def completing(self) -> Iterator[None]:
        """What is done in the context leads to a new completion; wait for it."""
        with self.page.expect_response(lambda answer: "view=completion" in answer.url and "skip" not in answer.url):
            yield
        self.idle()

    def pick(self, path: Path) -> None:
        with self.page.expect_response(lambda answer: "skip_regressor" in answer.url):
            self.page.set_input_files("#file", path)
        self.idle()

    def canvas(self, selector: str) -> Pixels:
        """The pixels of a canvas as the person sees their colours, uint8 [3, H, W]."""
        # From a copy: a canvas that is often read warns of it in the console.
        read = """c => {
          const context = new OffscreenCanvas(c.width, c.height).getContext("2d");
          context.drawImage(c, 0, 0);
          return [c.height, c.width, ...context.getImageData(0, 0, c.width, c.height).data];
        }"""
        height, width, *values = self.page.eval_on_selector(selector, read)
        return np.array(values, np.uint8).reshape(height, width, 4)[:, :, :3].transpose(2, 0, 1)

    def figure(self, name: str) -> Pixels:
        return self.canvas(f'[data-figure="{name}"] .frame canvas')

    def masked(self) -> list[int]:
        read = "cells => cells.flatMap((cell, index) => cell.ariaSelected === 'true' ? [index] : [])"
        chosen: list[int] = self.page.eval_on_selector_all("#grid [role=gridcell]", read)
        return chosen

    def values(self, name: str, low: float, high: float) -> NDArray[np.float64]:
        """What a person reads from a map by its legend, [N]."""
        scale = self.canvas(f'[data-figure="{name}"] .scale')[:, 0, :].T.astype(int)
        colours = self.figure(name).reshape(3, -1).T.astype(int)
        nearest = np.abs(colours[:, None] - scale[None]).sum(axis=2).argmin(axis=1)
        return low + (high - low) * nearest / (len(scale) - 1)

    def copied(self, button: str) -> str:
        self.page.get_by_role("button", name=button, exact=True).click()
        expect(self.page.locator("#command")).to_contain_text("Copied")
        text: str = self.page.evaluate("navigator.clipboard.readText()")
        return text


Open = Callable[..., Tab]


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


def expected_pasted(image: Pixels, masked: Sequence[int]) -> Pixels:
    hidden = np.array(masked)
    visible = np.setdiff1d(np.arange(image.shape[1] * image.shape[2] // PATCH**2), hidden)
    completed = expected_reconstruction(image[None], visible[None], hidden[None])[0]
    return paste(image, completed.astype(np.float32), hidden, PATCH)


def assert_same(shown: Pixels, expected: Pixels) -> None:
    assert shown.shape == expected.shape
    # The twin in NumPy rounds in double precision.
    assert np.abs(shown.astype(int) - expected).max() <= 1


def test_the_first_example_is_shown_with_everything_that_is_made_of_it(
    server: Server, open_tab: Open, examples: list[Pixels]
) -> None:
    tab = open_tab(server.url)
    tab.settle()
    image = examples[0]
    mask = random_mask(16, 0.5, 0)
    assert tab.masked() == mask.masked.tolist()
    assert_same(tab.canvas("#picture"), image)
    assert_same(tab.figure("pasted"), expected_pasted(image, mask.masked))
    completed = expected_reconstruction(image[None], mask.visible[None], mask.masked[None])[0]
    assert_same(tab.figure("completion"), np.rint(completed * 255).astype(np.uint8))
    assert_same(tab.figure("skip"), np.rint(expected_skip(image) * 255).astype(np.uint8))
    seen = tab.figure("seen").reshape(3, 4, PATCH, 4, PATCH).transpose(1, 3, 0, 2, 4).reshape(16, -1)
    assert (seen[mask.masked] == 128).all()
    assert not (seen[mask.visible] == 128).all(axis=1).any()
    assert tab.page.locator("#facts li").all_inner_texts() == ["tiny", "4 × 4 patches of 8 px", "CPU", "float32"]
    assert tab.page.locator("#latency tbody th").all_inner_texts() == [
        "features",
        "pasted",
        "completion",
        "no regressor",
    ]
    assert "inference" in str(tab.page.locator("#latency .bar").first.get_attribute("aria-label"))


def test_a_picked_photograph_is_cropped_and_resized_as_the_model_sees_it(
    server: Server, open_tab: Open, tmp_path: Path
) -> None:
    tab = open_tab(server.url)
    tab.settle()
    rows, columns = np.mgrid[:200, :300]
    photo = np.stack([rows, columns * 2 // 3, (rows + columns) // 3]).astype(np.uint8)
    lying = Image.fromarray(photo.transpose(1, 2, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn to the right
    lying.save(tmp_path / "phone.jpg", quality=95, exif=exif)
    lying.save(tmp_path / "photo.png")
    size = Preprocessing(channels=3, height=32, width=32, crop_fraction=1.0, resample="bicubic")
    for name, sides in (("photo.png", "300 × 200"), ("phone.jpg", "200 × 300")):
        tab.pick(tmp_path / name)
        expect(tab.page.locator("#about-image")).to_contain_text(f"{name} · {sides} px, seen as 32 × 32 px")
        model_sees = prepare(decode((tmp_path / name).read_bytes(), max_pixels=10**6), size)
        # A browser resizes by another filter.
        assert np.abs(tab.canvas("#picture").astype(int) - model_sees).mean() < 1


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_a_file_can_be_dropped_or_pasted(server: Server, open_tab: Open, how: str) -> None:
    tab = open_tab(server.url)
    tab.settle()
    image = pixels_of(3)
    give = """([how, text]) => {
      const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
      const transfer = new DataTransfer();
      transfer.items.add(new File([bytes], "given.png", { type: "image/png" }));
      const event = how === "drop" ? new DragEvent(how, { dataTransfer: transfer, bubbles: true, cancelable: true })
        : new ClipboardEvent(how, { clipboardData: transfer, bubbles: true, cancelable: true });
      document.body.dispatchEvent(event);
    }"""
    with tab.page.expect_response(lambda answer: "skip_regressor" in answer.url):
        tab.page.evaluate(give, [how, base64.b64encode(encoded(image)).decode()])
    tab.idle()
    expect(tab.page.locator("#about-image")).to_contain_text("given.png")
    assert_same(tab.canvas("#picture"), image)


def test_a_mask_is_painted_with_the_mouse_and_filled_in(server: Server, open_tab: Open, examples: list[Pixels]) -> None:
    tab = open_tab(server.url)
    tab.settle()
    tab.page.get_by_role("button", name="Clear").click()
    expect(tab.page.locator('[data-figure="pasted"] .empty')).to_contain_text("Nothing is masked")
    box = tab.page.locator("#grid").bounding_box()
    assert box
    with tab.completing():
        tab.page.mouse.move(box["x"] + box["width"] / 8, box["y"] + box["height"] * 3 / 8)
        tab.page.mouse.down()
        # One jump over the whole row: the patches between belong to the stroke.
        tab.page.mouse.move(box["x"] + box["width"] * 7 / 8, box["y"] + box["height"] * 3 / 8)
        tab.page.mouse.up()
    assert tab.masked() == [4, 5, 6, 7]
    assert_same(tab.figure("pasted"), expected_pasted(examples[0], [4, 5, 6, 7]))
    expect(tab.page.locator("#ratio-text")).to_have_text("painted: 4 of 16 patches")
    with tab.completing():
        tab.page.mouse.click(box["x"] + box["width"] * 5 / 8, box["y"] + box["height"] * 3 / 8)
    assert tab.masked() == [4, 5, 7]


def test_a_finger_paints_and_does_not_scroll(server: Server, browser: Browser) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    tab = Tab(context.new_page())
    tab.page.goto(server.url)
    tab.settle()
    before = tab.masked()
    box = tab.page.locator("#grid").bounding_box()
    assert box
    with tab.completing():
        tab.page.touchscreen.tap(box["x"] + box["width"] / 8, box["y"] + box["height"] / 8)
    assert sorted(set(before) ^ set(tab.masked())) == [0]
    assert tab.page.eval_on_selector("#grid", "grid => getComputedStyle(grid).touchAction") == "none"
    context.close()


def test_a_mask_is_painted_with_the_keyboard_and_told(server: Server, open_tab: Open, examples: list[Pixels]) -> None:
    tab = open_tab(server.url)
    tab.settle()
    tab.page.get_by_role("button", name="Clear").click()
    # From the examples one TAB leads to the one patch that takes the focus.
    tab.page.get_by_role("button", name="Example 2").focus()
    tab.page.keyboard.press("Tab")
    for key in ("ArrowDown", "ArrowRight", "End", "ArrowRight"):
        tab.page.keyboard.press(key)
    with tab.completing():
        tab.page.keyboard.press("Space")
    assert tab.masked() == [7]
    expect(tab.page.locator("#live")).to_have_text("Row 2, column 4 masked. 1 of 16 masked.")
    cell = tab.page.get_by_role("gridcell", name="row 2, column 4, masked")
    expect(cell).to_be_focused()
    assert cell.evaluate("cell => getComputedStyle(cell).outlineStyle") == "solid"
    assert_same(tab.figure("pasted"), expected_pasted(examples[0], [7]))
    expect(tab.page.locator('[data-figure="similarity"] .reading')).to_contain_text("row 2, column 4")


def test_masks_are_rolled_and_inverted(server: Server, open_tab: Open) -> None:
    tab = open_tab(server.url)
    tab.settle()
    with tab.completing():
        tab.page.get_by_label("Masked share").fill("25")
    assert tab.masked() == random_mask(16, 0.25, 0).masked.tolist()
    with tab.completing():
        tab.page.get_by_role("button", name="Roll a new mask").click()
    seed = int(tab.page.get_by_label("Seed").input_value())
    assert tab.masked() == random_mask(16, 0.25, seed).masked.tolist()
    with tab.completing():
        tab.page.get_by_text("Blocks", exact=True).click()
    blocks = tab.masked()
    assert len(blocks) == 4
    with tab.completing():
        tab.page.get_by_role("button", name="Invert").click()
    assert tab.masked() == sorted(set(range(16)) - set(blocks))


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
@pytest.mark.parametrize("name", ["Example 2", 'it\'s a "photo" of $HOME.png'])
def test_a_copied_curl_gives_what_is_shown(server: Server, open_tab: Open, tmp_path: Path, name: str) -> None:
    tab = open_tab(server.url)
    tab.settle()
    if name.startswith("Example"):
        with tab.page.expect_response(lambda answer: "skip_regressor" in answer.url):
            tab.page.get_by_role("button", name=name).click()
        tab.idle()
    else:
        tab.pick(saved(tmp_path, name, encoded(pixels_of(4))))
    for figure, label in (("pasted", "Pasted"), ("completion", "Bare completion"), ("skip", "Without regressor")):
        shell(tab.copied(f"Copy curl: {label}"), tmp_path)
        made = np.asarray(Image.open(tmp_path / f"{figure}.png")).transpose(2, 0, 1)
        assert (made == tab.figure(figure)).all()
    with tab.completing():
        tab.page.get_by_role("gridcell").first.click()
    command = tab.copied("Copy curl: Pasted")
    assert f"masked={','.join(map(str, tab.masked()))}&" in command
    shell(command, tmp_path)
    assert (np.asarray(Image.open(tmp_path / "pasted.png")).transpose(2, 0, 1) == tab.figure("pasted")).all()
    shell(tab.copied("Copy curl of these features"), tmp_path)
    features = safetensors.numpy.load_file(tmp_path / "features.safetensors")
    expected = expected_features(tab.canvas("#picture")[None])
    np.testing.assert_allclose(features["patches"], expected["patches"], atol=1e-6)
    np.testing.assert_allclose(features["attention"], expected["class_attention"], atol=1e-6)


def test_where_the_browser_copies_nothing_the_command_is_shown_and_selected(server: Server, open_tab: Open) -> None:
    tab = open_tab(server.url.replace("127.0.0.1", "cae.test"))
    tab.settle()
    tab.page.get_by_role("button", name="Copy curl: Pasted").click()
    expect(tab.page.locator("#command")).to_contain_text("Press Ctrl+C")
    command = tab.page.locator("#command code").inner_text()
    assert "view=pasted" in command
    assert tab.page.evaluate("String(getSelection())").strip() == command
    tab.page.keyboard.press("Escape")
    expect(tab.page.locator("#command")).to_be_hidden()


def shell(command: str, folder: Path, **variables: str) -> None:
    subprocess.run(
        ["sh", "-c", command], cwd=folder, env=os.environ | variables, check=True, capture_output=True, timeout=60
    )


def test_similarity_components_and_attention_are_those_of_numpy(
    server: Server, open_tab: Open, tmp_path: Path, examples: list[Pixels]
) -> None:
    tab = open_tab(server.url)
    tab.settle()
    features = expected_features(examples[0][None])
    patches = features["patches"][0]
    unit = patches / np.linalg.norm(patches, axis=1, keepdims=True)
    box = tab.page.locator('[data-figure="similarity"] .frame').bounding_box()
    assert box
    for anchor in (0, 6):
        row, column = divmod(anchor, 4)
        tab.page.mouse.move(box["x"] + box["width"] * (column + 0.5) / 4, box["y"] + box["height"] * (row + 0.5) / 4)
        expect(tab.page.locator('[data-figure="similarity"] .reading')).to_contain_text(
            f"row {row + 1}, column {column + 1}"
        )
        cosines = unit @ unit[anchor]
        shown = tab.values("similarity", cosines.min(), 1)
        np.testing.assert_allclose(shown, cosines, atol=(1 - cosines.min()) / 254)
        legend = tab.page.locator('[data-figure="similarity"] .legend span').all_inner_texts()
        assert legend == [f"{cosines.min():.2f}", "1.00"]

    centred = patches - patches.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    scores = left * singular
    scores *= np.sign(scores[np.abs(scores).argmax(axis=0), range(3)])
    spread = np.ptp(scores, axis=0)
    expected = np.rint(255 * (scores - scores.min(axis=0)) / spread).astype(np.uint8)
    assert_same(tab.figure("pca"), expected.T.reshape(3, 4, 4))
    shares = singular**2 / (singular**2).sum()
    assert tab.page.locator(".shares li").all_inner_texts()[:3] == [
        f"{colour} {100 * share:.0f} %" for colour, share in zip(("red", "green", "blue"), shares, strict=True)
    ]

    attention = features["class_attention"][0]
    for label, head in (("mean", attention.mean(axis=0)), (f"head {NUM_HEADS}", attention[-1])):
        tab.page.locator("#heads").get_by_text(label, exact=True).click()
        np.testing.assert_allclose(tab.values("attention", 0, head.max()), head, atol=head.max() / 254)
        expect(tab.page.locator('[data-figure="attention"] .reading')).to_contain_text(f"{100 * head[6]:.1f} %")


@pytest.mark.parametrize(("rows", "columns", "rank"), [(12, 40, 12), (40, 12, 12), (196, 384, 196), (20, 8, 2)])
def test_components_of_any_shape_are_those_of_numpy(
    server: Server, open_tab: Open, rows: int, columns: int, rank: int
) -> None:
    tab = open_tab(server.url)
    rng = np.random.default_rng(5)
    # Variances as features have them: a few large ones and a long tail.
    features = (rng.normal(size=(rows, rank)) / np.arange(1, rank + 1)) @ rng.normal(size=(rank, columns))
    code = """async ([values, rows, columns]) => {
      const { principalComponents } = await import("./page/pca.js");
      const { scores, shares } = principalComponents(values, rows, columns, 3);
      return [scores.map((row) => [...row]), shares];
    }"""
    scores, shares = tab.page.evaluate(code, [features.reshape(-1).tolist(), rows, columns])
    left, singular, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    expected = (left * singular)[:, :3]
    expected *= np.sign(expected[np.abs(expected).argmax(axis=0), range(3)])
    np.testing.assert_allclose(np.transpose(scores), expected, atol=1e-6 * singular[0])
    np.testing.assert_allclose(shares, (singular**2 / (singular**2).sum())[:3], atol=1e-8)


def test_alike_patches_have_no_components(server: Server, open_tab: Open) -> None:
    tab = open_tab(server.url)
    code = """async () => {
      const { principalComponents } = await import("./page/pca.js");
      return principalComponents(new Float64Array(21).fill(0.1), 7, 3, 3).shares;
    }"""
    assert tab.page.evaluate(code) == [0, 0, 0]


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
            pass

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
    assert httpx.get(server.url + "/page/../app.py").status_code == 404
