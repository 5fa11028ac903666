"""The page in a real Chromium against a real server: images, masks, completions, and the commands for them."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from playwright.sync_api import Browser, expect

from serving.masks import random_mask
from serving.preprocess import Preprocessing, decode, prepare
from tests.e2e.page.pictures import PATCH, Pixels, assert_same, encoded, expected_pasted, pixels_of, saved
from tests.e2e.page.tab import Open, Tab, shell
from tests.serving.running_server import Server
from tests.serving.tiny_bundle import expected_features, expected_reconstruction, expected_skip


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
