"""The room of a call, counted in images and bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.admission import Admission, QueueFullError
from serving.bundle import Bundle
from serving.service import Service
from serving.settings import Settings


def room_for(max_images: int, max_bytes: int) -> Admission:
    return Admission(max_images, max_bytes, lambda: 7.0)


def test_what_was_taken_comes_back_when_the_request_ends() -> None:
    room = room_for(4, 100)
    ticket = room.admit(60)
    ticket.add(images=2, num_bytes=10)
    assert (room.images, room.bytes) == (3, 70)
    ticket.give_back()
    assert (room.images, room.bytes) == (0, 0)


def test_both_limits_are_inclusive_and_a_refusal_takes_nothing() -> None:
    room = room_for(2, 100)
    first, second = room.admit(60), room.admit(40)
    with pytest.raises(QueueFullError, match="2 images") as caught:
        room.admit(0)
    assert caught.value.retry_after_s == 7
    assert (room.images, room.bytes) == (2, 100)
    second.give_back()
    with pytest.raises(QueueFullError, match="60 bytes"):
        room.admit(41)
    assert (room.images, room.bytes) == (1, 60)
    first.give_back()


def test_a_body_that_grows_beyond_the_room_is_refused() -> None:
    room = room_for(3, 100)
    ticket = room.admit(0)
    ticket.add(num_bytes=100)
    for more in ({"num_bytes": 1}, {"images": 3}):
        with pytest.raises(QueueFullError):
            ticket.add(**more)
    assert (room.images, room.bytes) == (1, 100)
    ticket.give_back()
    assert (room.images, room.bytes) == (0, 0)


def test_an_answer_counts_even_beyond_the_limit_until_it_is_taken() -> None:
    room = room_for(3, 100)
    ticket = room.admit(50)
    ticket.charge_answer(500)
    with pytest.raises(QueueFullError, match="550 bytes"):
        room.admit(0)
    ticket.give_back()
    assert (room.images, room.bytes) == (0, 0)


def test_who_is_refused_waits_for_the_work_of_both_calls(tiny_bundle: Path) -> None:
    service = Service(Bundle.open(tiny_bundle, "cpu"), Settings(bundle=tiny_bundle, max_queued_images=2))
    seconds_of_an_image = {service.embedding: 0.5, service.reconstruction: 3.0}
    for call, seconds in seconds_of_an_image.items():
        call.lane.on_batch(4, 4 * seconds)
        call.admission.admit(0)
    service.embedding.admission.admit(0)
    with pytest.raises(QueueFullError) as caught:
        service.embedding.admission.admit(0)
    assert caught.value.retry_after_s == 2 * 0.5 + 3.0
    service.reconstruction.lane.on_batch(1, 10_000)
    with pytest.raises(QueueFullError) as caught:
        service.embedding.admission.admit(0)
    assert caught.value.retry_after_s == 60
