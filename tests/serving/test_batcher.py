"""The batch threads, with lanes whose work the tests hold up and let go."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from serving.batcher import Batcher, ExpiredError, Lane, StoppedError, Times

WAIT_S = 10.0
Answer = asyncio.Task[tuple[int, Times]]
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """The batcher is made for this one."""
    return "asyncio"


class Work:
    """Doubles numbers, in batches that can be held up; it keeps what it was given."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        self.begun.set()
        assert self.gate.wait(WAIT_S)
        if 13 in numbers:
            raise ValueError("13 is bad luck")
        if 99 in numbers:
            raise SystemExit
        return [2 * number for number in numbers]


@pytest.fixture
def work() -> Work:
    return Work()


def lane(work: Work, *sizes: int, name: str = "test") -> Lane[int, int]:
    return Lane(name, work, lambda size, seconds: None, sizes)


@asynccontextmanager
async def batching(*lanes: Lane[Any, Any], delay_s: float = 0) -> AsyncIterator[Batcher]:
    batcher = Batcher(lanes, delay_s)
    batcher.start()
    try:
        async with asyncio.timeout(WAIT_S):
            yield batcher
    finally:
        batcher.stop()


def submit(batcher: Batcher, to: Lane[int, int], number: int, key: object = 0, patience_s: float = WAIT_S) -> Answer:
    return asyncio.create_task(batcher.submit(to, number, key, time.monotonic() + patience_s))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def queued(to: Lane[int, int], count: int) -> None:
    """Wait until so many items are in the queue."""
    await until(lambda: len(to.items) == count)


@asynccontextmanager
async def held(work: Work, batcher: Batcher, to: Lane[int, int], number: int) -> AsyncIterator[Answer]:
    """A batch of one number that is at work until the end of the context."""
    work.gate.clear()
    try:
        first = submit(batcher, to, number)
        await until(work.begun.is_set)
        yield first
    finally:
        work.gate.set()


async def test_what_waits_is_run_at_once_in_the_largest_batch_that_it_fills(work: Work) -> None:
    numbers = lane(work, 1, 2, 4)
    async with batching(numbers) as batcher:
        async with held(work, batcher, numbers, 0) as first:
            rest = [submit(batcher, numbers, number) for number in range(1, 8)]
            await queued(numbers, 7)
        results = [await task for task in (first, *rest)]
    assert [result for result, _ in results] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert work.batches == [[0], [1, 2, 3, 4], [5, 6], [7]]
    assert results[1][1].queue > 0


async def test_only_items_of_one_key_share_a_batch_and_none_is_forgotten(work: Work) -> None:
    numbers = lane(work, 1, 2, 4, 8)
    async with batching(numbers) as batcher:
        async with held(work, batcher, numbers, 0) as first:
            rest = [submit(batcher, numbers, number, key=number % 2) for number in range(1, 7)]
            await queued(numbers, 6)
        assert [(await task)[0] for task in (first, *rest)] == [0, 2, 4, 6, 8, 10, 12]
    assert work.batches == [[0], [1, 3], [2, 4], [5], [6]]


async def test_lanes_take_turns(work: Work) -> None:
    many, few = lane(work, 1, name="many"), lane(work, 1, name="few")
    async with batching(many, few) as batcher:
        async with held(work, batcher, many, 0) as first:
            rest = [submit(batcher, many, number) for number in (1, 2, 3)] + [submit(batcher, few, 10)]
            await queued(few, 1)
        await asyncio.gather(first, *rest)
    assert work.batches == [[0], [10], [1], [2], [3]]


async def test_who_has_gone_or_waited_too_long_is_dropped_unseen(work: Work) -> None:
    numbers = lane(work, 1, 2, 4)
    async with batching(numbers) as batcher:
        async with held(work, batcher, numbers, 0) as first:
            gone = submit(batcher, numbers, 1)
            late = submit(batcher, numbers, 2, patience_s=0.01)
            good = submit(batcher, numbers, 3)
            await queued(numbers, 3)
            gone.cancel()
            await asyncio.sleep(0.05)
        assert (await first)[0] == 0
        assert (await good)[0] == 6
        with pytest.raises(ExpiredError):
            await late
    assert work.batches == [[0], [3]]


async def test_of_a_batch_that_fails_only_the_one_at_fault_fails(work: Work) -> None:
    numbers = lane(work, 1, 2, 4)
    async with batching(numbers) as batcher:
        async with held(work, batcher, numbers, 0) as first:
            tasks = [submit(batcher, numbers, number) for number in (12, 13, 14, 15)]
            await queued(numbers, 4)
        await first
        good, bad, *others = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(bad, ValueError)
        assert [outcome[0] for outcome in (good, *others)] == [24, 28, 30]
        assert batcher.silence_s() < WAIT_S


async def test_a_delay_waits_for_company_and_a_full_batch_does_not_wait(work: Work) -> None:
    numbers = lane(work, 1, 2)
    async with batching(numbers, delay_s=2 * WAIT_S) as batcher:
        # Two fill a batch: with the long delay this would otherwise not end in time.
        await asyncio.gather(submit(batcher, numbers, 1), submit(batcher, numbers, 2))
    async with batching(numbers, delay_s=0.05) as batcher:
        (_, times) = await submit(batcher, numbers, 3)
    assert times.queue >= 0.04
    assert work.batches == [[1, 2], [3]]


async def test_a_batch_waits_a_moment_for_what_is_being_made_ready(work: Work) -> None:
    numbers = lane(work, 1, 2, 4)
    async with batching(numbers) as batcher:
        numbers.expected = 1
        first = submit(batcher, numbers, 1)
        await queued(numbers, 1)
        second = submit(batcher, numbers, 2)
        numbers.expected = 0
        await asyncio.gather(first, second)
        assert work.batches == [[1, 2]]
        # What never comes holds up nobody.
        numbers.expected = 1
        await submit(batcher, numbers, 3)


async def test_a_lane_that_waits_does_not_hold_up_a_full_one(work: Work) -> None:
    waiting, full = lane(work, 1, 2, name="waiting"), lane(work, 1, name="full")
    async with batching(waiting, full, delay_s=2 * WAIT_S) as batcher:
        slow = submit(batcher, waiting, 1)
        await queued(waiting, 1)
        await submit(batcher, full, 2)
        assert work.batches == [[2]]
        slow.cancel()


async def test_when_the_thread_dies_everybody_is_told_and_it_shows(work: Work) -> None:
    numbers = lane(work, 1)
    async with batching(numbers) as batcher:
        assert batcher.silence_s() < WAIT_S
        async with held(work, batcher, numbers, 99) as deadly:
            waiting = submit(batcher, numbers, 1)
            await queued(numbers, 1)
        for task in (deadly, waiting, submit(batcher, numbers, 2)):
            with pytest.raises(StoppedError):
                await task
        await until(lambda: batcher.silence_s() == float("inf"))


async def test_a_batch_that_hangs_shows_as_silence(work: Work) -> None:
    numbers = lane(work, 1)
    async with batching(numbers) as batcher:
        async with held(work, batcher, numbers, 1) as task:
            await asyncio.sleep(0.1)
            assert batcher.silence_s() >= 0.1
        await task


async def test_an_idle_thread_keeps_showing_that_it_lives(work: Work) -> None:
    async with batching(lane(work, 1)) as batcher:
        await asyncio.sleep(1.2)
        assert batcher.silence_s() < 1


async def test_stopping_answers_what_is_queued_and_ends_the_batch_at_work(work: Work) -> None:
    numbers = lane(work, 1)
    async with batching(numbers) as batcher:
        async with held(work, batcher, numbers, 1) as first:
            second = submit(batcher, numbers, 2)
            await queued(numbers, 1)
            stopping = asyncio.create_task(asyncio.to_thread(batcher.stop))
            await asyncio.sleep(0.02)
        await stopping
        assert (await first)[0] == 2
        with pytest.raises(StoppedError):
            await second
