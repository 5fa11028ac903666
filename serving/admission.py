"""Who is let in: requests of one call, counted in images and in bytes, before any of their body is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class QueueFullError(Exception):
    """There is no room for the images or the bytes; the message says which limit was met."""


class Admission:
    """The room that one call has. To be used from the event loop alone."""

    def __init__(self, max_images: int, max_bytes: int) -> None:
        self.images = 0
        self.bytes = 0
        self._max_images = max_images
        self._max_bytes = max_bytes

    @contextmanager
    def admit(self, num_bytes: int) -> Iterator[Ticket]:
        """Room for one image and a body of `num_bytes` while the context lasts. Errors: QueueFullError."""
        ticket = Ticket(self)
        try:
            ticket.add(1, num_bytes)
            yield ticket
        finally:
            self.images -= ticket.images
            self.bytes -= ticket.bytes

    def take(self, images: int, num_bytes: int) -> None:
        """Errors: QueueFullError, and nothing is taken."""
        if self.images + images > self._max_images:
            raise QueueFullError(f"{self.images} images are being worked on; at most {self._max_images} are admitted")
        if self.bytes + num_bytes > self._max_bytes:
            raise QueueFullError(
                f"bodies of {self.bytes} bytes are being worked on; at most {self._max_bytes} are admitted"
            )
        self.images += images
        self.bytes += num_bytes


class Ticket:
    """What one request holds of the room; it may ask for more as its body turns out to be larger than declared."""

    def __init__(self, admission: Admission) -> None:
        self.images = 0
        self.bytes = 0
        self._admission = admission

    def add(self, images: int = 0, num_bytes: int = 0) -> None:
        """Errors: QueueFullError."""
        self._admission.take(images, num_bytes)
        self.images += images
        self.bytes += num_bytes
