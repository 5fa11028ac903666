"""2-D sin-cos positions: which channel says what, on any grid."""

import math

import pytest
import torch

from cae.positions import sincos_positions


def at(row: int, column: int, width: int) -> list[float]:
    """The position of one patch, number by number."""
    quarter = width // 4
    frequencies = [1 / 10_000 ** (i / quarter) for i in range(quarter)]
    return [wave(place * f) for place in (row, column) for wave in (math.sin, math.cos) for f in frequencies]


@pytest.mark.parametrize("grid", [(1, 1), (3, 3), (2, 5), (5, 2), (1, 7)])
@pytest.mark.parametrize("width", [4, 8, 24])
def test_every_value_follows_the_formula_row_first(grid: tuple[int, int], width: int) -> None:
    rows, columns = grid
    table = sincos_positions(grid, width)
    assert table.shape == (1 + rows * columns, width)
    assert table.dtype == torch.float32
    expected = [at(row, column, width) for row in range(rows) for column in range(columns)]
    torch.testing.assert_close(table[1:], torch.tensor(expected), rtol=0, atol=1e-6)


def test_the_class_token_has_no_position() -> None:
    assert (sincos_positions((3, 4), 16)[0] == 0).all()


def test_the_first_half_tells_the_row_and_the_second_the_column() -> None:
    table = sincos_positions((3, 5), 16)[1:].unflatten(0, (3, 5))
    row_half, column_half = table[..., :8], table[..., 8:]
    assert (row_half == row_half[:, :1]).all()
    assert (column_half == column_half[:1]).all()
    assert not (row_half[0] == row_half[1]).all()
    assert not (column_half[:, 0] == column_half[:, 1]).all()


def test_a_bigger_grid_extends_a_smaller_one() -> None:
    small = sincos_positions((3, 5), 16)[1:].unflatten(0, (3, 5))
    big = sincos_positions((9, 6), 16)[1:].unflatten(0, (9, 6))
    assert (big[:3, :5] == small).all()


def test_no_two_patches_share_a_position() -> None:
    table = sincos_positions((14, 14), 32)[1:]
    distance = torch.cdist(table, table) + 10 * torch.eye(len(table))
    assert distance.min() > 0.1


@pytest.mark.parametrize("width", [1, 2, 6, 130])
def test_a_width_that_is_no_multiple_of_four_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 4, not {width}"):
        sincos_positions((2, 2), width)
