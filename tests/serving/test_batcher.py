"""The batch threads, with lanes whose work the tests hold up and let go."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from serving.batcher import Batcher, ExpiredError, Lane, StoppedError

WAIT_S = 10.0


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


def lane(work: Work, *sizes: int, name: str = "test") -> Lane[int, int]:
    return Lane(name, work, lambda size, seconds: None, sizes)


def with_batcher(
    lanes: Sequence[Lane[int, int]], test: Callable[[Batcher], Coroutine[Any, Any, None]], delay_s: float = 0
) -> None:
    async def run() -> None:
        batcher = Batcher(lanes, delay_s)
        batcher.start()
        try:
            await asyncio.wait_for(test(batcher), WAIT_S)
        finally:
            batcher.stop()

    asyncio.run(run())


def submit(
    batcher: Batcher, to: Lane[int, int], number: int, key: object = 0, patience_s: float = WAIT_S
) -> asyncio.Task:
    return asyncio.create_task(batcher.submit(to, number, key, time.monotonic() + patience_s))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@contextmanager
def held(work: Work) -> Iterator[None]:
    """Hold up the batch that is at work until the end of the context."""
    work.gate.clear()
    try:
        yield
    finally:
        work.gate.set()


def test_what_waits_is_run_at_once_in_the_largest_batch_that_it_fills() -> None:
    work = Work()
    numbers = lane(work, 1, 2, 4)

    async def test(batcher: Batcher) -> None:
        with held(work):
            first = submit(batcher, numbers, 0)
            await until(work.begun.is_set)
            rest = [submit(batcher, numbers, number) for number in range(1, 8)]
            await until(lambda: len(numbers.items) == 7)
        results = [await task for task in (first, *rest)]
        assert [result for result, _ in results] == [0, 2, 4, 6, 8, 10, 12, 14]
        assert work.batches == [[0], [1, 2, 3, 4], [5, 6], [7]]
        assert results[1][1].queue > 0

    with_batcher([numbers], test)


def test_only_items_of_one_key_share_a_batch_and_none_is_forgotten() -> None:
    work = Work()
    numbers = lane(work, 1, 2, 4, 8)

    async def test(batcher: Batcher) -> None:
        with held(work):
            tasks = [submit(batcher, numbers, 0)]
            await until(work.begun.is_set)
            tasks += [submit(batcher, numbers, number, key=number % 2) for number in range(1, 7)]
            await until(lambda: len(numbers.items) == 6)
        assert [(await task)[0] for task in tasks] == [0, 2, 4, 6, 8, 10, 12]
        assert work.batches == [[0], [1, 3], [2, 4], [5], [6]]

    with_batcher([numbers], test)


def test_lanes_take_turns() -> None:
    work = Work()
    many, few = lane(work, 1, name="many"), lane(work, 1, name="few")

    async def test(batcher: Batcher) -> None:
        with held(work):
            tasks = [submit(batcher, many, 0)]
            await until(work.begun.is_set)
            tasks += [submit(batcher, many, number) for number in (1, 2, 3)] + [submit(batcher, few, 10)]
            await until(lambda: len(few.items) == 1)
        await asyncio.gather(*tasks)
        assert work.batches == [[0], [10], [1], [2], [3]]

    with_batcher([many, few], test)


def test_who_has_gone_or_waited_too_long_is_dropped_unseen() -> None:
    work = Work()
    numbers = lane(work, 1, 2, 4)

    async def test(batcher: Batcher) -> None:
        with held(work):
            first = submit(batcher, numbers, 0)
            await until(work.begun.is_set)
            gone, late, good = (
                submit(batcher, numbers, 1),
                submit(batcher, numbers, 2, patience_s=0.01),
                submit(batcher, numbers, 3),
            )
            await until(lambda: len(numbers.items) == 3)
            gone.cancel()
            await asyncio.sleep(0.05)
        assert (await first)[0] == 0
        assert (await good)[0] == 6
        with pytest.raises(ExpiredError):
            await late
        assert work.batches == [[0], [3]]

    with_batcher([numbers], test)


def test_of_a_batch_that_fails_only_the_one_at_fault_fails() -> None:
    work = Work()
    numbers = lane(work, 1, 2, 4)

    async def test(batcher: Batcher) -> None:
        with held(work):
            first = submit(batcher, numbers, 0)
            await until(work.begun.is_set)
            tasks = [submit(batcher, numbers, number) for number in (12, 13, 14, 15)]
            await until(lambda: len(numbers.items) == 4)
        await first
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(outcomes[1], ValueError)
        assert [outcomes[index][0] for index in (0, 2, 3)] == [24, 28, 30]
        assert batcher.silence_s() < WAIT_S

    with_batcher([numbers], test)


def test_a_delay_waits_for_company_and_a_full_batch_does_not_wait() -> None:
    work = Work()
    numbers = lane(work, 1, 2)

    async def test(batcher: Batcher) -> None:
        # Two fill a batch: with the long delay this would otherwise not end in time.
        await asyncio.gather(submit(batcher, numbers, 1), submit(batcher, numbers, 2))
        assert work.batches == [[1, 2]]

    with_batcher([numbers], test, delay_s=2 * WAIT_S)
    work.batches.clear()

    async def alone(batcher: Batcher) -> None:
        (_, times) = await submit(batcher, numbers, 3)
        assert times.queue >= 0.04
        assert work.batches == [[3]]

    with_batcher([numbers], alone, delay_s=0.05)


def test_a_batch_waits_a_moment_for_what_is_being_made_ready() -> None:
    work = Work()
    numbers = lane(work, 1, 2, 4)

    async def test(batcher: Batcher) -> None:
        numbers.expected = 1
        first = submit(batcher, numbers, 1)
        await until(lambda: len(numbers.items) == 1)
        second = submit(batcher, numbers, 2)
        numbers.expected = 0
        await asyncio.gather(first, second)
        assert work.batches == [[1, 2]]
        # What never comes holds up nobody.
        numbers.expected = 1
        await submit(batcher, numbers, 3)

    with_batcher([numbers], test)


def test_a_lane_that_waits_does_not_hold_up_a_full_one() -> None:
    work = Work()
    waiting, full = lane(work, 1, 2, name="waiting"), lane(work, 1, name="full")

    async def test(batcher: Batcher) -> None:
        slow = submit(batcher, waiting, 1)
        await until(lambda: len(waiting.items) == 1)
        await submit(batcher, full, 2)
        assert work.batches == [[2]]
        slow.cancel()

    with_batcher([waiting, full], test, delay_s=2 * WAIT_S)


def test_when_the_thread_dies_everybody_is_told_and_it_shows() -> None:
    work = Work()
    numbers = lane(work, 1)

    async def test(batcher: Batcher) -> None:
        assert batcher.silence_s() < WAIT_S
        with held(work):
            deadly = submit(batcher, numbers, 99)
            await until(work.begun.is_set)
            waiting = submit(batcher, numbers, 1)
            await until(lambda: len(numbers.items) == 1)
        for task in (deadly, waiting, submit(batcher, numbers, 2)):
            with pytest.raises(StoppedError):
                await task
        await until(lambda: batcher.silence_s() == float("inf"))

    with_batcher([numbers], test)


def test_a_batch_that_hangs_shows_as_silence() -> None:
    work = Work()
    numbers = lane(work, 1)

    async def test(batcher: Batcher) -> None:
        with held(work):
            task = submit(batcher, numbers, 1)
            await until(work.begun.is_set)
            await asyncio.sleep(0.1)
            assert batcher.silence_s() >= 0.1
        await task

    with_batcher([numbers], test)


def test_an_idle_thread_keeps_showing_that_it_lives() -> None:
    async def test(batcher: Batcher) -> None:
        await asyncio.sleep(1.2)
        assert batcher.silence_s() < 1

    with_batcher([lane(Work(), 1)], test)


def test_stopping_answers_what_is_queued_and_ends_the_batch_at_work() -> None:
    work = Work()
    numbers = lane(work, 1)

    async def test(batcher: Batcher) -> None:
        with held(work):
            first = submit(batcher, numbers, 1)
            await until(work.begun.is_set)
            second = submit(batcher, numbers, 2)
            await until(lambda: len(numbers.items) == 1)
            stopping = asyncio.create_task(asyncio.to_thread(batcher.stop))
            await asyncio.sleep(0.02)
        await stopping
        assert (await first)[0] == 2
        with pytest.raises(StoppedError):
            await second

    with_batcher([numbers], test)
