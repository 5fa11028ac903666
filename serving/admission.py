"""Who is let in: requests of one call, counted in images and in bytes, before any of their body is read."""

from __future__ import annotations

from collections.abc import Callable


class QueueFullError(Exception):
    """There is no room for the images or the bytes; the message says which limit was met."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Admission:
    """The room that one call has. To be used from the event loop alone."""

    def __init__(self, max_images: int, max_bytes: int, retry_after_s: Callable[[], float]) -> None:
        self.images = 0
        self.bytes = 0
        self._max_images = max_images
        self._max_bytes = max_bytes
        self._retry_after_s = retry_after_s

    def admit(self, num_bytes: int) -> Ticket:
        """Room for one image and a body of `num_bytes`, until the ticket is given back. Errors: QueueFullError."""
        ticket = Ticket(self)
        ticket.add(images=1, num_bytes=num_bytes)
        return ticket

    def check(self, images: int, num_bytes: int) -> None:
        """Errors: QueueFullError where there is no room for so much more."""
        if self.images + images > self._max_images:
            message = f"{self.images} images are being worked on; at most {self._max_images} are admitted"
            raise QueueFullError(message, self._retry_after_s())
        if self.bytes + num_bytes > self._max_bytes:
            message = f"bodies of {self.bytes} bytes are being worked on; at most {self._max_bytes} are admitted"
            raise QueueFullError(message, self._retry_after_s())


class Ticket:
    """What one request holds of the room, from its head until its answer is sent."""

    def __init__(self, admission: Admission) -> None:
        self.images = 0
        self.bytes = 0
        self._answer_bytes = 0
        self._admission = admission

    def add(self, images: int = 0, num_bytes: int = 0) -> None:
        """Ask for more, where a body turns out to hold more than its head says. Errors: QueueFullError."""
        self._admission.check(images, num_bytes)
        self.images += images
        self.bytes += num_bytes
        self._admission.images += images
        self._admission.bytes += num_bytes

    def charge_answer(self, num_bytes: int) -> None:
        """Count an answer that is there already, even beyond the limit: those who come later find less room."""
        self._answer_bytes += num_bytes
        self._admission.bytes += num_bytes

    def give_back(self) -> None:
        """To be called once, in the end."""
        self._admission.images -= self.images
        self._admission.bytes -= self.bytes + self._answer_bytes
