"""Masks and the pictures of reconstructions."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from cae.masking import MaskSampler
from serving.masks import block_mask, draw, given_mask, painted_mask, paste, png, random_mask

Pixels = Callable[..., NDArray[np.uint8]]


@given(st.integers(2, 400), st.floats(0.001, 0.999), st.integers(0, 2**32 - 1))
def test_a_mask_splits_the_patches_with_an_exact_count(num_patches: int, mask_ratio: float, seed: int) -> None:
    visible, masked = random_mask(num_patches, mask_ratio, seed)
    assert visible.dtype == masked.dtype == np.int64
    assert sorted([*visible, *masked]) == list(range(num_patches))
    assert (np.diff(visible) > 0).all()
    assert (np.diff(masked) > 0).all()
    assert len(masked) == min(max(round(mask_ratio * num_patches), 1), num_patches - 1)


def test_a_mask_depends_on_its_seed_and_on_nothing_else() -> None:
    masks = [random_mask(196, 0.5, seed)[1].tolist() for seed in (0, 0, 1)]
    assert masks[0] == masks[1] != masks[2]


def test_every_patch_is_hidden_equally_often() -> None:
    counts = np.bincount(np.concatenate([random_mask(16, 0.5, seed)[1] for seed in range(2000)]), minlength=16)
    # 2000 draws with probability 1/2: five standard deviations are 112.
    assert np.abs(counts - 1000).max() < 112


@pytest.mark.parametrize(("num_patches", "mask_ratio"), [(1, 0.5), (16, 0.0), (16, 1.0), (16, -0.1)])
def test_impossible_masks_are_refused(num_patches: int, mask_ratio: float) -> None:
    with pytest.raises(ValueError, match=r"num_patches is 1|mask_ratio is"):
        random_mask(num_patches, mask_ratio, 0)


MASKED = np.array([1, 2])


@pytest.fixture
def image(random_pixels: Pixels) -> NDArray[np.uint8]:
    """3 x 8 x 12: patches of 4 px, 2 rows of 3."""
    return random_pixels(3, 8, 12)


@pytest.fixture
def reconstruction(random_pixels: Pixels) -> NDArray[np.float32]:
    return (random_pixels(3, 8, 13)[..., 1:] / np.float32(255)).astype(np.float32)


def test_only_masked_patches_come_from_the_reconstruction(
    image: NDArray[np.uint8], reconstruction: NDArray[np.float32]
) -> None:
    expected = image.copy()
    expected[:, 0:4, 4:12] = np.rint(reconstruction * 255)[:, 0:4, 4:12]
    np.testing.assert_array_equal(paste(image, reconstruction, MASKED, 4), expected)


def test_values_outside_0_to_1_are_clipped(image: NDArray[np.uint8]) -> None:
    values = np.where(np.arange(12) < 6, np.float32(-0.3), np.float32(1.7)) * np.ones_like(image, dtype=np.float32)
    completion = np.asarray(draw("completion", image, values, MASKED, 4))
    assert completion[0, :, 0].tolist() == [0] * 6 + [255] * 6


def test_the_views_show_what_they_say(image: NDArray[np.uint8], reconstruction: NDArray[np.float32]) -> None:
    seen = {
        view: np.asarray(draw(view, image, reconstruction, MASKED, 4)).transpose(2, 0, 1)
        for view in ("completion", "pasted", "side_by_side")
    }
    pasted = paste(image, reconstruction, MASKED, 4)
    greyed = image.copy()
    greyed[:, 0:4, 4:12] = 128
    np.testing.assert_array_equal(seen["completion"], np.rint(reconstruction * 255))
    np.testing.assert_array_equal(seen["pasted"], pasted)
    np.testing.assert_array_equal(seen["side_by_side"], np.concatenate([image, greyed, pasted], axis=2))


def test_without_a_mask_every_patch_is_predicted(image: NDArray[np.uint8], reconstruction: NDArray[np.float32]) -> None:
    completion = np.rint(reconstruction * 255)
    pasted = np.asarray(draw("pasted", image, reconstruction, None, 4)).transpose(2, 0, 1)
    both = np.asarray(draw("side_by_side", image, reconstruction, None, 4)).transpose(2, 0, 1)
    np.testing.assert_array_equal(pasted, completion)
    np.testing.assert_array_equal(both, np.concatenate([image, completion], axis=2))


def test_grey_stays_grey_and_png_is_lossless(image: NDArray[np.uint8], reconstruction: NDArray[np.float32]) -> None:
    picture = draw("pasted", image[:1], reconstruction[:1], MASKED, 4)
    read = Image.open(io.BytesIO(png(picture)))
    assert (read.mode, read.format, read.size) == ("L", "PNG", (12, 8))
    np.testing.assert_array_equal(np.asarray(read), paste(image[:1], reconstruction[:1], MASKED, 4)[0])


# Other masks


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (6, 10), (1, 12)])
@pytest.mark.parametrize("mask_ratio", [0.1, 0.5, 0.75])
def test_blocks_are_those_of_pretraining(grid: tuple[int, int], mask_ratio: float) -> None:
    num_masked = round(mask_ratio * grid[0] * grid[1])
    sampler = MaskSampler(grid, num_masked, "block", min_block=16 / 196)
    for seed in range(5):
        visible, masked = sampler(np.random.default_rng(seed))
        ours = block_mask(grid, mask_ratio, seed)
        np.testing.assert_array_equal(ours.visible, visible)
        np.testing.assert_array_equal(ours.masked, masked)
        assert ours.visible.dtype == ours.masked.dtype == np.int64


def test_a_mask_that_is_given_hides_just_that() -> None:
    visible, masked = given_mask(6, (4, 1))
    assert (visible.tolist(), masked.tolist()) == ([0, 2, 3, 5], [1, 4])
    for indices, text in (
        ((6,), "6 is not a patch"),
        ((-1,), "-1 is not"),
        ((1, 1), "1 is there twice"),
        ((), "0 of 6"),
    ):
        with pytest.raises(ValueError, match=text):
            given_mask(6, indices)
    with pytest.raises(ValueError, match="6 of 6"):
        given_mask(6, range(6))


def test_a_patch_is_hidden_where_most_of_it_is_painted_white() -> None:
    paint = np.zeros((40, 60), np.uint8)
    paint[:20, :20] = 255
    paint[20:, 20:29] = 255
    paint[20:, 40:51] = 255
    visible, masked = painted_mask(Image.fromarray(paint), (2, 3))
    assert (visible.tolist(), masked.tolist()) == ([1, 2, 3, 4], [0, 5])
