"""The room of a call, counted in images and bytes."""

from __future__ import annotations

import pytest

from serving.admission import Admission, QueueFullError


def test_what_was_taken_comes_back_when_the_request_ends() -> None:
    room = Admission(max_images=4, max_bytes=100)
    with room.admit(60) as ticket:
        ticket.add(images=2, num_bytes=10)
        assert (room.images, room.bytes) == (3, 70)
    assert (room.images, room.bytes) == (0, 0)
    with pytest.raises(ZeroDivisionError), room.admit(10):
        raise ZeroDivisionError
    assert (room.images, room.bytes) == (0, 0)


def test_both_limits_are_inclusive_and_a_refusal_takes_nothing() -> None:
    room = Admission(max_images=2, max_bytes=100)
    with room.admit(60), room.admit(40):
        with pytest.raises(QueueFullError, match="2 images"), room.admit(0):
            pass
        assert (room.images, room.bytes) == (2, 100)
    with room.admit(60):
        with pytest.raises(QueueFullError, match="60 bytes"), room.admit(41):
            pass
        assert (room.images, room.bytes) == (1, 60)


def test_a_body_that_grows_beyond_the_room_is_refused() -> None:
    room = Admission(max_images=3, max_bytes=100)
    with room.admit(0) as ticket:
        ticket.add(num_bytes=100)
        with pytest.raises(QueueFullError):
            ticket.add(num_bytes=1)
        with pytest.raises(QueueFullError):
            ticket.add(images=3)
        assert (room.images, room.bytes) == (1, 100)
    assert (room.images, room.bytes) == (0, 0)
