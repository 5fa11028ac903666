"""Masks: exact counts, dependence on the generator alone, rectangles."""

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cae.masking import MaskSampler

GRIDS = [(14, 14), (7, 7), (6, 10), (10, 6), (1, 20), (20, 1), (2, 2), (1, 2)]
Kind = Literal["block", "random"]


def masks_of(sampler: MaskSampler, count: int) -> np.ndarray:
    """`count` masks as booleans [count, rows, columns]."""
    masks = np.zeros((count, sampler.grid[0] * sampler.grid[1]), dtype=bool)
    for i in range(count):
        masks[i, sampler(np.random.default_rng(i))[1]] = True
    return masks.reshape(count, *sampler.grid)


def largest_rectangles(masks: np.ndarray) -> np.ndarray:
    """Area of the largest fully masked rectangle of every mask."""
    count, rows, columns = masks.shape
    sums = np.zeros((count, rows + 1, columns + 1), dtype=int)
    sums[:, 1:, 1:] = masks.cumsum(1).cumsum(2)
    largest = np.zeros(count, dtype=int)
    for height in range(1, rows + 1):
        for width in range(1, columns + 1):
            inside = sums[:, height:, width:] - sums[:, :-height, width:] - sums[:, height:, :-width]
            full = (inside + sums[:, :-height, :-width] == height * width).any(axis=(1, 2))
            largest[full] = np.maximum(largest[full], height * width)
    return largest


def masked_neighbors(masks: np.ndarray) -> float:
    """Mean number of masked patches among the up to four neighbours of a masked patch."""
    pairs = (masks[:, 1:] & masks[:, :-1]).sum() + (masks[:, :, 1:] & masks[:, :, :-1]).sum()
    return 2 * pairs / masks.sum()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["block", "random"])
@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.5, 0.75, 0.95])
def test_a_mask_splits_the_patches_with_an_exact_count(grid: tuple[int, int], kind: Kind, ratio: float) -> None:
    num_patches = grid[0] * grid[1]
    num_masked = min(max(1, round(ratio * num_patches)), num_patches - 1)
    for seed in range(20):
        visible, masked = MaskSampler(grid, num_masked, kind, 0.08)(np.random.default_rng(seed))
        assert len(masked) == num_masked
        assert sorted([*visible, *masked]) == list(range(num_patches))
        assert (np.diff(visible) > 0).all()
        assert (np.diff(masked) > 0).all()
        assert visible.dtype == masked.dtype == np.int64


@pytest.mark.parametrize("kind", ["block", "random"])
def test_a_mask_depends_on_the_generator_and_on_nothing_else(kind: Kind) -> None:
    sampler = MaskSampler((6, 10), 30, kind, 0.08)
    np.random.seed(1)
    first = sampler(np.random.default_rng(3))[1].tolist()
    np.random.seed(2)
    assert sampler(np.random.default_rng(3))[1].tolist() == first
    assert sampler(np.random.default_rng(4))[1].tolist() != first


@pytest.mark.parametrize("kind", ["block", "random"])
def test_every_patch_is_sometimes_masked_and_sometimes_visible(kind: Kind) -> None:
    share = masks_of(MaskSampler((7, 7), 24, kind, 0.08), 400).mean(axis=0)
    assert share.min() > 0.1
    assert share.max() < 0.9


def test_random_masks_hide_every_patch_equally_often() -> None:
    counts = masks_of(MaskSampler((4, 5), 10, "random", 0.08), 1000).sum(axis=0)
    # 1000 draws with probability 1/2: five standard deviations are 79.
    assert np.abs(counts - 500).max() < 79


def test_block_masks_hang_together_where_random_ones_do_not() -> None:
    block, random = (masks_of(MaskSampler((14, 14), 98, kind, 0.08), 100) for kind in ("block", "random"))
    # Half of up to four neighbours, at random; most of them inside rectangles.
    assert masked_neighbors(random) < 2
    assert masked_neighbors(block) > 2.8


def test_the_first_rectangle_has_the_smallest_area_or_more() -> None:
    # 0.08 of 196 patches is 16; rounding both sides of such a rectangle leaves 12 of them at least.
    honoured = largest_rectangles(masks_of(MaskSampler((14, 14), 24, "block", 0.08), 300))
    assert honoured.min() >= 12
    free = largest_rectangles(masks_of(MaskSampler((14, 14), 24, "block", 0.005), 300))
    assert (free < 12).mean() > 0.1


def test_rectangles_are_up_to_about_three_times_as_long_as_wide_both_ways() -> None:
    shapes = set()
    for mask in masks_of(MaskSampler((14, 14), 12, "block", 12 / 196), 500):
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        if height * width == 12:
            shapes.add((int(height), int(width)))
    assert shapes == {(2, 6), (3, 4), (4, 3), (6, 2)}


@settings(deadline=2000, max_examples=150)
@given(st.integers(1, 16), st.integers(1, 16), st.data())
def test_any_count_on_any_grid_comes_to_an_end(rows: int, columns: int, data: st.DataObject) -> None:
    num_patches = rows * columns
    num_masked = data.draw(st.integers(0, num_patches))
    min_block = data.draw(st.floats(0.001, 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    visible, masked = MaskSampler((rows, columns), num_masked, "block", min_block)(rng)
    assert len(masked) == num_masked
    assert sorted([*visible, *masked]) == list(range(num_patches))
