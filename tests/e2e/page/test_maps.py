"""The maps of the page against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.e2e.page.pictures import Pixels, assert_same
from tests.e2e.page.tab import Open
from tests.serving.running_server import Server
from tests.serving.tiny_bundle import NUM_HEADS, expected_features


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
