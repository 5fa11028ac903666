"""The order of samples: every image once an epoch, whatever the sizes, processes, micro-batches and the start."""

import tracemalloc
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cae.data.order import EpochBatches, SampleId, SampleOrder, Share, steps_in, total_steps
from cae.data.shards import ImageShards, Index, ShardInfo
from cae.errors import UserError


class Case(NamedTuple):
    """A made-up training: images of each shard, how they are shuffled and shared out, and for how long."""

    counts: list[int]
    window: int
    num_ranks: int
    num_accumulated: int
    batch_size: int
    epochs: int
    start_step: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    counts = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda counts: sum(counts) > 0))
    parts = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (4, 1)]).filter(lambda p: p[0] * p[1] <= sum(counts)))
    part = draw(st.integers(1, sum(counts) // (parts[0] * parts[1])))
    batch_size, epochs = part * parts[0] * parts[1], draw(st.integers(1, 3))
    start = draw(st.integers(0, total_steps(sum(counts), batch_size, epochs)))
    return Case(counts, draw(st.integers(1, 40)), *parts, batch_size, epochs, start)


def stream(case: Case, start_step: int, share: Share) -> list[list[SampleId]]:
    order = SampleOrder(case.counts, 3, case.window)
    steps = total_steps(order.num_samples, case.batch_size, case.epochs)
    batches = EpochBatches(order, case.batch_size, start_step, steps, share)
    made = list(batches)
    assert len(made) == len(batches)
    return made


@given(cases())
def test_every_sample_comes_exactly_once_in_every_epoch(case: Case) -> None:
    num_samples = sum(case.counts)
    batches = stream(case, 0, Share())
    assert {len(batch) for batch in batches} == {case.batch_size}
    samples = [sample for batch in batches for sample in batch]
    assert 0 <= len(samples) - case.epochs * num_samples < case.batch_size
    for epoch in range(case.epochs):
        drawn = samples[epoch * num_samples : (epoch + 1) * num_samples]
        assert {sample.epoch for sample in drawn} == {epoch}
        assert sorted(sample.position for sample in drawn) == list(range(num_samples))


@given(cases())
def test_processes_and_micro_batches_share_the_same_batches_from_any_step(case: Case) -> None:
    whole = stream(case, 0, Share())
    mine = [
        stream(case, case.start_step, Share(rank, case.num_ranks, case.num_accumulated))
        for rank in range(case.num_ranks)
    ]
    for number, batch in enumerate(whole[case.start_step :]):
        parts = [
            mine[rank][number * case.num_accumulated + accumulated]
            for accumulated in range(case.num_accumulated)
            for rank in range(case.num_ranks)
        ]
        assert [sample for part in parts for sample in part] == batch
        assert len({len(part) for part in parts}) == 1


def drawn(order: SampleOrder, epoch: int) -> list[int]:
    return [sample.position for sample in order.take(epoch * order.num_samples, order.num_samples)]


@pytest.mark.parametrize("window", [100, 10])
def test_epochs_and_seeds_have_orders_of_their_own(window: int) -> None:
    first, second = (SampleOrder([5] * 8, seed, window) for seed in (0, 1))
    orders = [drawn(first, 0), drawn(first, 1), drawn(second, 0), list(range(40))]
    assert len({tuple(order) for order in orders}) == 4
    assert drawn(first, 0) == orders[0], "going back gives the same"


def test_a_set_of_one_window_is_shuffled_whole_whatever_its_shards() -> None:
    expected = np.random.default_rng([7, 2]).permutation(30).tolist()
    assert drawn(SampleOrder([30], 7), 2) == drawn(SampleOrder([11, 0, 19], 7), 2) == expected


def test_a_larger_set_is_read_a_window_of_shards_at_a_time() -> None:
    order = drawn(SampleOrder([5] * 8, 0, window=12), 0)
    windows = [{position // 5 for position in order[start : start + 10]} for start in range(0, 40, 10)]
    assert [len(shards) for shards in windows] == [2] * 4
    assert set().union(*windows) == set(range(8))
    assert windows != [{0, 1}, {2, 3}, {4, 5}, {6, 7}], "the shards are permuted"
    assert order[:10] != sorted(order[:10]), "and the images of a window"


def test_a_shard_larger_than_the_window_is_a_window_of_its_own() -> None:
    order = drawn(SampleOrder([50, 3, 3], 0, window=6), 0)
    large = [number for number, position in enumerate(order) if position < 50]
    assert max(large) - min(large) == 49
    assert sorted(order) == list(range(56))


@pytest.mark.parametrize("window", [10, 100])
def test_the_shards_of_a_window_and_of_the_next_are_announced_before_its_first_batch(window: int) -> None:
    order = SampleOrder([4, 6, 3, 7, 5, 5, 8], 0, window=window)
    announced: list[list[int]] = []
    shards_of_windows: dict[tuple[int, int], set[int]] = {}
    batches = EpochBatches(order, 2, 0, 3 * order.num_samples // 2, announce=announced.append)
    for number, sample in enumerate(chain.from_iterable(batches)):
        shard = int(np.searchsorted(order.starts, sample.position, side="right")) - 1
        shards_of_windows.setdefault(order.window_of(number), set()).add(shard)
        assert shard in announced[-1]
    shards = list(shards_of_windows.values())
    assert len(shards) == (3 if window == 100 else len(announced)) > 2
    # Nothing is announced that the training does not come to.
    assert [set(numbers) for numbers in announced] == [a | b for a, b in zip(shards, [*shards[1:], set()], strict=True)]


def test_steps_are_counted_up_to_the_last_sample() -> None:
    assert total_steps(11, 4, 1) == 3
    assert total_steps(12, 4, 5) == 15
    assert total_steps(10, 4, 2) == 5, "an epoch may end inside a batch"
    assert steps_in(2.5, 11, 4) == 7
    assert steps_in(0.3, 10, 1) == 3
    assert steps_in(0, 10, 1) == 0
    assert steps_in(1.1, 10, 11) == 1
    assert steps_in(800, 10**9, 1) == 800 * 10**9


def test_too_large_a_batch_is_refused_by_key() -> None:
    message = "batch_size: 12 is more than the 11 training images; choose at most 11"
    with pytest.raises(UserError, match=message):
        total_steps(11, 12, 1)
    with pytest.raises(UserError, match=message):
        EpochBatches(SampleOrder([11], 0), 12, 0, 1)
    assert total_steps(11, 11, 1) == 1


@pytest.mark.parametrize(("batch_size", "nearest"), [(10, 8), (3, 4), (9, 8), (11, 12)])
def test_a_batch_that_cannot_be_shared_out_equally_is_refused_with_the_nearest_that_can(
    batch_size: int, nearest: int
) -> None:
    message = rf"batch_size: {batch_size} cannot .*2 processes, runtime.accumulate_steps 2.* fits is {nearest}$"
    with pytest.raises(UserError, match=message):
        EpochBatches(SampleOrder([100], 0), batch_size, 0, 1, Share(0, 2, 2))


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
def test_ten_million_images_start_from_their_index_alone_in_bounded_memory(tmp_path: Path) -> None:
    shards = [
        ShardInfo(file=f"train-{n:05d}.arrow", split="train", count=5_000, bytes=1, sha256="0" * 64)
        for n in range(2_000)
    ]
    Index(
        source="test",
        count={"train": 10**7, "val": 0},
        classes=[],
        channels=3,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        shards=shards,
        hash="0",
    ).write(tmp_path)
    tracemalloc.reset_peak()
    images = ImageShards(tmp_path, "train")
    order = SampleOrder(images.counts, 0)
    batches = EpochBatches(order, 1024, 12_345, 30_000, Share(1, 4, 2))
    first = next(iter(batches))
    assert len(images) == order.num_samples == 10**7
    assert len(set(first)) == 128
    assert tracemalloc.get_traced_memory()[1] < 100e6


@pytest.mark.usefixtures("traced")
def test_a_billion_images_start_at_any_step_with_the_memory_of_a_window() -> None:
    order = SampleOrder(np.full(200_000, 5_000), 0)
    middle, last = EpochBatches(order, 4096, 10**5, 10**6), EpochBatches(order, 4096, 10**6, 10**7)
    assert {sample.epoch for sample in next(iter(middle))} == {0}
    assert {sample.epoch for sample in next(iter(last))} == {4}
    assert tracemalloc.get_traced_memory()[1] < 100e6
