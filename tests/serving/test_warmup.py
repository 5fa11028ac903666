"""Which batch sizes are found worth it, with work whose cost the tests choose."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from serving.warmup import LARGEST_TRIAL, batch_sizes


def costing(seconds: Callable[[int], float], seen: list[int]) -> Callable[[int], None]:
    def run(size: int) -> None:
        seen.append(size)
        time.sleep(seconds(size))

    return run


def test_where_a_batch_costs_as_much_as_its_images_one_at_a_time_is_best() -> None:
    seen: list[int] = []
    assert batch_sizes(costing(lambda size: 0.01 * size, seen), None) == (1,)
    assert max(seen) == 4


def test_where_an_image_costs_next_to_nothing_the_largest_trial_wins() -> None:
    sizes = batch_sizes(costing(lambda size: 0.01 + 0.0001 * size, []), None)
    assert sizes == tuple(2**power for power in range(LARGEST_TRIAL.bit_length()))


def test_beyond_what_pays_nothing_larger_is_kept() -> None:
    assert batch_sizes(costing(lambda size: 0.01 if size <= 4 else 0.01 * size, []), None) == (1, 2, 4)


@pytest.mark.parametrize(("limit", "sizes"), [(1, (1,)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_with_a_limit_every_size_up_to_it_is_warmed(limit: int, sizes: tuple[int, ...]) -> None:
    seen: list[int] = []
    assert batch_sizes(costing(lambda size: 0, seen), limit) == sizes
    assert set(seen) == set(sizes)
