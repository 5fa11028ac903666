"""Which patches are masked: exactly M of N for every image, as index arrays, so that shapes are static.

Block-wise masks follow BEiT (rectangles of at least a stated area, aspect 0.3 to 1/0.3), repeated until exactly M
patches are masked. The caller gives the random generator, so a mask depends on nothing else.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

MIN_ASPECT = 0.3


@dataclass(frozen=True)
class MaskSampler:
    """Draws masks of `num_masked` patches on a `grid` of (rows, columns).

    `min_block` is the smallest rectangle as a share of the grid (16 of 196 in BEiT, 0.08); an absolute minimum would
    never fit a small grid.
    """

    grid: tuple[int, int]
    num_masked: int
    kind: Literal["block", "random"]
    min_block: float

    def __call__(self, rng: np.random.Generator) -> tuple[Int[np.ndarray, " v"], Int[np.ndarray, " m"]]:
        """Indices of the visible and of the masked patches, each ascending."""
        rows, columns = self.grid
        if self.kind == "random":
            order = rng.permutation(rows * columns)
            return np.sort(order[self.num_masked :]), np.sort(order[: self.num_masked])
        flat = self._blocks(rng).reshape(-1)
        return np.flatnonzero(~flat), np.flatnonzero(flat)

    def _blocks(self, rng: np.random.Generator) -> np.ndarray:
        rows, columns = self.grid
        mask = np.zeros(self.grid, dtype=bool)
        smallest = max(1, round(self.min_block * rows * columns))
        remaining = self.num_masked
        while remaining:
            # The last rectangles must fit what is left, however small, or the count would never be exact.
            area = rng.uniform(min(smallest, remaining), remaining)
            aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
            # Clamped, not rejected: on a grid of one row no rectangle of this aspect would ever fit.
            height = min(rows, max(1, round(math.sqrt(area * aspect))))
            width = min(columns, max(1, round(math.sqrt(area / aspect))))
            top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
            block = mask[top : top + height, left : left + width]
            added = block.size - int(block.sum())
            if 0 < added <= remaining:
                block[:] = True
                remaining -= added
        return mask
