"""Fixed 2-D sin-cos positions: a formula, so any grid is computed and none is interpolated."""

import torch
from jaxtyping import Float
from torch import Tensor

TEMPERATURE = 10_000.0


def sincos_positions(grid: tuple[int, int], width: int) -> Float[Tensor, "1+n d"]:
    """Position of the class token (row 0, zero) and of every patch in row-major order.

    Channels are [sin row, cos row, sin column, cos column] with `width // 4` frequencies each.

    Raises ValueError when `width` is not a multiple of 4. Source: official `modeling_finetune.py`,
    `build_2d_sincos_position_embedding`.
    """
    if width % 4:
        raise ValueError(f"2-D sin-cos positions need a width that is a multiple of 4, not {width}")
    rows, columns = grid
    quarter = width // 4
    frequency = TEMPERATURE ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    row_angle = row.reshape(-1, 1) * frequency
    column_angle = column.reshape(-1, 1) * frequency
    table = torch.cat([row_angle.sin(), row_angle.cos(), column_angle.sin(), column_angle.cos()], dim=1)
    return torch.cat([table.new_zeros(1, width), table]).float()
