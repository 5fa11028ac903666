"""The report of a real run: one page that needs nothing else, with every picture and figure that it promises."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import figures, pretrain, report, seeds
from pipeline.pictures import Studio, half_mass, psnr_db
from pipeline.workspace import Workspace
from tests.pipeline.conftest import STAGES, MakeWorkspace
from tests.tiny import with_values, write_digits

CHROMIUM = Path("/usr/bin/chromium")
FIGURES = {
    "accuracy.png",
    "curves.png",
    "tokenizer.png",
    "completions.png",
    "without_regressor.png",
    "class_attention.png",
    "probe_attention.png",
    "patches.png",
    "neighbors.png",
}


@pytest.fixture(scope="module")
def page(finished: Workspace) -> str:
    return (finished.report / "index.html").read_text()


def test_the_page_needs_nothing_from_elsewhere(page: str) -> None:
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(addresses) > len(FIGURES)
    # The paper is a link to follow, nothing that the page needs.
    needed = [address for address in addresses if address != "https://arxiv.org/abs/2202.03026"]
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in needed)
    assert "url(" not in page
    assert "<script" not in page


def test_every_figure_is_drawn_and_lies_beside_the_page(finished: Workspace, page: str) -> None:
    drawn = {path.name for path in (finished.report / "figures").iterdir()}
    assert drawn == FIGURES
    assert page.count("data:image/png;base64,") == len(FIGURES)
    for name in FIGURES:
        with Image.open(finished.report / "figures" / name) as picture:
            assert picture.convert("L").getextrema()[0] < picture.convert("L").getextrema()[1], name


def test_every_link_of_the_contents_leads_somewhere(page: str) -> None:
    for target in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{target}"' in page


def test_the_figures_of_the_page_are_those_of_the_metrics(finished: Workspace, page: str) -> None:
    linear = json.loads((finished.metrics / "probe_linear.json").read_text())
    assert f"{linear['top1']:.1%}" in page
    assert f"{linear['random_init_top1']:.1%}" in page
    assert "(params.yaml)" in page
    assert "alignment_weight" in page


def test_images_without_labels_have_a_report_too(
    make_workspace: MakeWorkspace, tiny_params: dict[str, Any], tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    write_digits(tmp_path / "digits")
    for path in (tmp_path / "digits").glob("*/*.png"):
        (flat / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    workspace = make_workspace(tmp_path / "run", with_values(tiny_params, {"prepare.source": f"folder:{flat}"}))
    for run in STAGES.values():
        run(workspace)
    page = (workspace.report / "index.html").read_text()
    assert "no labels" in page
    assert 'id="accuracy"' not in page
    assert 'id="probe-attention"' not in page
    assert 'id="neighbors"' in page


def test_a_collapsed_representation_stands_at_the_top(finished: Workspace, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    for path in finished.metrics.glob("*.json"):
        (metrics / path.name).write_bytes(path.read_bytes())
    values = json.loads((metrics / "pretrain.json").read_text())
    (metrics / "pretrain.json").write_text(json.dumps({**values, "latent_variance": 0.001}))
    for name in ("data", "models"):
        (tmp_path / name).symlink_to(finished.root / name)
    (tmp_path / "params.yaml").write_bytes(finished.params_file.read_bytes())
    workspace = Workspace(tmp_path, tmp_path / "params.yaml")
    assert "has collapsed" in report.render(workspace, [], tmp_path)
    assert "has collapsed" not in report.render(finished, [], tmp_path)


def test_a_collapse_is_told_while_it_happens(
    make_workspace: MakeWorkspace,
    finished: Workspace,
    tmp_path: Path,
    tiny_params: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # No run of a second collapses for certain; with the floor above every run it must sound in each.
    monkeypatch.setattr(pretrain, "COLLAPSED_VARIANCE", 1e6)
    workspace = make_workspace(tmp_path, tiny_params)
    for name in ("data", "models/tokenizer"):
        (workspace.root / name).parent.mkdir(exist_ok=True)
        (workspace.root / name).symlink_to(finished.root / name)
    with caplog.at_level(logging.WARNING):
        pretrain.run(workspace)
    assert any("ALARM" in record.getMessage() for record in caplog.records)


def test_half_mass_takes_the_fewest_patches_that_hold_half() -> None:
    attention = np.array([[0.1, 0.4], [0.2, 0.3]])
    assert half_mass(attention).tolist() == [[False, True], [False, True]]
    assert half_mass(np.full((2, 2), 0.25)).sum() == 2


def test_hidden_patches_of_a_completion_are_grey_and_the_others_untouched(finished: Workspace) -> None:
    studio = Studio(finished)
    images = studio.sample("val", 3).images
    unit = images.float() / 255
    for completion in studio.completions(images):
        visible = (completion.seen == unit) & (completion.completed == unit)
        assert bool((visible | (completion.seen == 0.5)).all())
        assert bool((completion.completed != unit).any())


def test_rows_are_as_tall_as_their_images(tmp_path: Path) -> None:
    heights = []
    for height, width in ((32, 64), (32, 32), (64, 32)):
        cells = [figures.Cell(np.zeros((5, height, width), np.uint8), "name")] * 3
        figures.sheet(tmp_path / "sheet.png", [("row", cells)] * 4)
        with Image.open(tmp_path / "sheet.png") as picture:
            heights.append(picture.height)
    assert heights[0] < 0.7 * heights[1] < 0.7 * 0.7 * heights[2]


def test_a_sample_takes_the_classes_in_turn(finished: Workspace) -> None:
    assert Studio(finished).sample("val", 6).labels == ["0", "1", "2", "3", "0", "1"]


def test_the_nearest_image_of_a_training_image_is_itself(finished: Workspace) -> None:
    studio = Studio(finished)
    queries = studio.sample("train", 4)
    neighbors = studio.neighbors(queries.images, 3)
    for number, nearest in enumerate(neighbors.nearest):
        assert torch.equal(nearest.images[0], queries.images[number])
        assert neighbors.similarity[number][0] == pytest.approx(1, abs=1e-5)


def test_psnr_of_a_known_error() -> None:
    assert psnr_db(torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.1)) == pytest.approx(20, abs=1e-4)


def record_seed(workspace: Workspace, tmp_path: Path, seed: int, top1: float) -> Workspace:
    """A workspace in tmp_path whose metrics claim `top1`, recorded in its seeds.json."""
    text = workspace.params_file.read_text()
    (tmp_path / "params.yaml").write_text(re.sub(r"^seed: \d+", f"seed: {seed}", text, flags=re.MULTILINE))
    (tmp_path / "metrics").mkdir(exist_ok=True)
    (tmp_path / "metrics/probe_linear.json").write_text(json.dumps({"top1": top1, "random_init_top1": 0.5}))
    other = Workspace(tmp_path, tmp_path / "params.yaml")
    seeds.record(other, 1.0)
    return other


def test_seeds_are_compared_only_where_nothing_else_differs(finished: Workspace, tmp_path: Path) -> None:
    for seed, top1 in ((0, 0.8), (1, 0.9), (1, 0.9)):
        workspace = record_seed(finished, tmp_path, seed, top1)
    runs = seeds.comparable(workspace)
    assert [run["params"]["seed"] for run in runs] == [0, 1]
    mean, deviation = seeds.spread(runs, "probe_linear", "top1") or (0, 0)
    assert mean == pytest.approx(0.85)
    assert deviation == pytest.approx(0.0707, abs=1e-3)

    text = workspace.params_file.read_text()
    workspace.params_file.write_text(text.replace("alignment_weight: ", "alignment_weight: 1"))
    assert seeds.comparable(Workspace(tmp_path, tmp_path / "params.yaml")) == []


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}; apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_nothing_sticks_out_and_every_picture_is_shown(finished: Workspace, width: int) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        tab = browser.new_page(viewport={"width": width, "height": 800})
        problems: list[str] = []
        tab.on("console", lambda message: problems.append(message.text))
        tab.goto((finished.report / "index.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        shown = tab.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)")
        browser.close()
    assert len(shown) == len(FIGURES)
    assert all(shown)
    assert problems == []
