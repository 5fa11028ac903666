"""How much is decoded at the same time."""

from __future__ import annotations

import threading

import pytest

from serving.pixel_budget import PixelBudget

WAIT_S = 10.0


def hold(budget: PixelBudget, pixels: int) -> tuple[threading.Event, threading.Event, threading.Thread]:
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with budget.room(pixels):
            inside.set()
            leave.wait(WAIT_S)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return inside, leave, thread


def test_pictures_wait_until_together_they_fit() -> None:
    budget = PixelBudget(100)
    first, second, third = hold(budget, 60), None, None
    assert first[0].wait(WAIT_S)
    second = hold(budget, 40)
    assert second[0].wait(WAIT_S)
    third = hold(budget, 41)
    assert not third[0].wait(0.05)
    second[1].set()
    assert not third[0].wait(0.05)
    first[1].set()
    assert third[0].wait(WAIT_S)
    third[1].set()
    for _, _, thread in (first, second, third):
        thread.join(WAIT_S)


def test_a_picture_beyond_the_budget_is_decoded_alone() -> None:
    budget = PixelBudget(100)
    large = hold(budget, 500)
    assert large[0].wait(WAIT_S)
    small = hold(budget, 1)
    assert not small[0].wait(0.05)
    large[1].set()
    assert small[0].wait(WAIT_S)
    small[1].set()
    for _, _, thread in (large, small):
        thread.join(WAIT_S)


def test_room_comes_back_after_a_failure() -> None:
    budget = PixelBudget(100)
    with pytest.raises(ZeroDivisionError), budget.room(100):
        raise ZeroDivisionError
    inside, leave, thread = hold(budget, 100)
    assert inside.wait(WAIT_S)
    leave.set()
    thread.join(WAIT_S)
