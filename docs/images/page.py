"""Draws page.png: the server's page with an example of the bundle that `make repro` made, masked by its own ratio.

python -m docs.images.page [BUNDLE]   (in the root of the project; needs Chromium, as tests/e2e/page)
"""

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from tests.e2e.page.tab import CHROMIUM, Tab
from tests.serving.running_server import running

OUT = Path(__file__).with_name("page.png")
EXAMPLE, SEED = 3, 3
# Row by row; it lies on the stroke of the digit.
PATCH = 18


def main(bundle: Path) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        running(bundle, Path(folder, "log"), {"CAE_SERVING_PRECISION": "float32"}) as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = Tab(browser.new_page(viewport={"width": 1280, "height": 1075}))
        tab.page.goto(server.url)
        tab.settle()
        with tab.completing():
            tab.page.locator("#examples button").nth(EXAMPLE).click()
        tab.page.get_by_label("Seed").fill(str(SEED))
        with tab.completing():
            tab.page.keyboard.press("Enter")
        tab.page.get_by_label("Seed").blur()
        tab.page.wait_for_load_state("networkidle")
        tab.idle()
        tab.page.locator("#grid [role=gridcell]").nth(PATCH).hover()
        expect(tab.page.locator('[data-figure="similarity"] .reading')).to_contain_text("mean cosine")
        tab.page.screenshot(path=OUT)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "models/bundle"))
