"""Loader processes that die, and images that cannot be read: both are reported with the image that was being read."""

import atexit
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from cae.data.shards import ImageShards
from cae.errors import UserError, WorkerDied, signal_name

NOTHING = -1
ADVICE = {
    signal.SIGKILL: "the system does so when memory runs out: lower runtime.num_workers or the stage's batch_size",
    signal.SIGBUS: "shared memory ran out: lower runtime.num_workers, or docker run --shm-size=2g",
}
OTHER_ADVICE = (
    "a library failed on that image: take it out and prepare again, or look at it with runtime.num_workers: 0"
)


class Reading:
    """Which image each worker is reading, in memory that all processes share."""

    def __init__(self, shards: ImageShards, num_workers: int) -> None:
        self.shards = shards
        self._positions: Tensor = torch.full((max(1, num_workers),), NOTHING).share_memory_()

    @contextmanager
    def image(self, position: int) -> Iterator[None]:
        """Around the reading of an image; an error in it becomes one that names the image."""
        worker = get_worker_info()
        number = worker.id if worker else 0
        self._positions[number] = position
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.shards.place(position)}: cannot be read ({type(error).__name__}: {error}); run `dvc repro "
                "--force prepare` to make it again"
            ) from error
        self._positions[number] = NOTHING

    def of_worker(self, number: int) -> str:
        """What a worker was reading when it was last seen."""
        position = int(self._positions[number])
        return "nothing" if position == NOTHING else self.shards.place(position)


class WatchedLoader(Iterable[dict[str, Tensor]]):
    """A DataLoader whose workers' deaths name the image that they were reading."""

    def __init__(self, loader: DataLoader[Any], reading: Reading) -> None:
        self.loader, self.reading = loader, reading
        self._iterator: Any = None
        _loaders.add(self)

    @property
    def num_workers(self) -> int:
        return self.loader.num_workers

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self._iterator = iter(self.loader)
        _workers[:] = [worker for worker in _workers if worker.is_alive()]
        _workers.extend(getattr(self._iterator, "_workers", []))
        with named_deaths():
            yield from self._iterator

    def __len__(self) -> int:
        return len(self.loader)

    def death(self) -> WorkerDied | None:
        """What to say of a worker of this loader that has died; None where none has."""
        for number, worker in enumerate(getattr(self._iterator, "_workers", [])):
            if worker.is_alive() or not worker.exitcode:
                continue
            code = worker.exitcode
            how = signal_name(-code) if code < 0 else f"code {code}"
            advice = ADVICE.get(-code, OTHER_ADVICE)
            # The others may wait for a lock that the dead one held.
            self.kill_workers()
            return WorkerDied(
                f"loader process {worker.pid} (number {number}) died ({how}) while it read "
                f"{self.reading.of_worker(number)}; {advice}. The run goes on from its last checkpoint"
            )
        return None

    def kill_workers(self) -> None:
        """End them by force, for they leave gentler signals to the trainer."""
        for worker in getattr(self._iterator, "_workers", []):
            worker.kill()
            worker.join()
        self._iterator = None


@contextmanager
def named_deaths() -> Iterator[None]:
    """Torch raises the death of a worker wherever the main process is just then; here it becomes a WorkerDied."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        for loader in list(_loaders):
            if died := loader.death():
                raise died from error
        raise
    except UserError as error:
        # What comes from a worker carries the worker's traceback in its text.
        _, from_worker, message = str(error).rpartition("cae.errors.UserError: ")
        if not from_worker:
            raise
        raise UserError(message.strip()) from None


_loaders: "WeakSet[WatchedLoader]" = WeakSet()


# Held beyond their loader, whose own end may have come without theirs.
_workers: list[Any] = []


@atexit.register
def _kill_all_workers() -> None:
    """Before multiprocessing's own end, which would send SIGTERM and wait for workers that ignore it."""
    for worker in _workers:
        if worker.is_alive():
            worker.kill()
