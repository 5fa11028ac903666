"""Shards at a URL: whatever fsspec opens, s3://, gs://, https:// or a folder as file://.

They are fetched whole, ahead of their use, into a folder that every process of a machine shares. It holds a window of
the order (cae.data.order) and the next, so a larger set is fetched once an epoch and a smaller one once in all.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import fsspec
import pyarrow as pa
from filelock import FileLock

from cae.data.order import WINDOW
from cae.data.shards import ImageShards, Index, LocalFiles, ShardInfo, Split, file_sha256
from cae.errors import UserError

logger = logging.getLogger(__name__)

NUM_STREAMS = 4  # that fetch ahead at a time
PAUSES_S = (1, 4, None)  # after each failed attempt; None: no other follows


class ShardCache:
    """The files of shards at `url`, those used last in `folder`, together at most `limit_bytes` and what is on its way.

    A file is named by its hash and takes that name when it is whole and right, so several preparations can share the
    folder. The shard asked for is never evicted, however small the limit.
    """

    def __init__(self, url: str, folder: Path, limit_bytes: int) -> None:
        self.url, self.folder, self.limit_bytes = url, folder, limit_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def open(self, info: ShardInfo) -> pa.MemoryMappedFile:
        """The mapped file, fetched where it is not there.

        Raises UserError where it cannot be fetched or is not the file that was prepared.
        """
        if found := self._find(info):
            return found
        # One lock for the shards that share two digits bounds the number of lock files and of partial ones.
        group = info.sha256[:2]
        with self._lock(group):
            if found := self._find(info):  # another process has fetched it meanwhile
                return found
            arriving = self.folder / f"{group}.partial"
            fetch(f"{self.url}/{info.file}", arriving, info.sha256)
            with self._lock("all"):
                self._make_room(info.bytes)
                arriving.replace(self._path(info))
                return pa.memory_map(str(self._path(info)))

    def has(self, info: ShardInfo) -> bool:
        return self._path(info).exists()

    def _find(self, info: ShardInfo) -> pa.MemoryMappedFile | None:
        path = self._path(info)
        # No other process may evict it between the look and the map.
        with self._lock("all"):
            # A machine that lost power may have kept the name and not the bytes.
            if not path.exists() or path.stat().st_size != info.bytes:
                return None
            path.touch()
            return pa.memory_map(str(path))

    def _make_room(self, num_bytes: int) -> None:
        """Evict the files longest unused until `num_bytes` more fit; a process that has one mapped reads on."""
        found = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in self.folder.glob("*.arrow"))
        held = sum(size for _, size, _ in found)
        for _, size, path in found:
            if held + num_bytes <= self.limit_bytes:
                return
            path.unlink()
            held -= size

    def _path(self, info: ShardInfo) -> Path:
        return self.folder / f"{info.sha256}.arrow"

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / f"{name}.lock")


class FetchAhead:
    """Fetches the shards that come next while others are trained on.

    In a process of its own, which ends with this one: the loader forks its workers, and a fork would inherit the locks
    that a thread holds.
    """

    def __init__(self, shards: ImageShards) -> None:
        self.infos, self.cache = shards.infos, shards.files
        self._sender: Connection | None = None

    def __call__(self, numbers: Sequence[int]) -> None:
        """These shards next, by their place among all, in this order; returns at once."""
        try:
            self._start().send(numbers)
        except OSError as error:
            # The loader fetches what it needs itself.
            logger.warning(
                "the process that fetches shards ahead is gone (%s); the next window starts another", error.strerror
            )
            self._sender = None

    def _start(self) -> Connection:
        if self._sender is None:
            context = multiprocessing.get_context("spawn")
            receiver, self._sender = context.Pipe(duplex=False)
            arguments = self.cache, self.infos, receiver, os.getpid()
            context.Process(target=_fetch_ahead, args=arguments, name="fetch-ahead", daemon=True).start()
            receiver.close()
        return self._sender


def _fetch_ahead(cache: ShardCache, infos: Sequence[ShardInfo], receiver: Connection, parent: int) -> None:
    """Until the sender or the process `parent` is gone."""
    # A signal to the group lets the trainer finish and save; SIGTERM is also how a process ends its daemons.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()

    def fetch_one(number: int) -> None:
        try:
            # One that is there is used again soon, which `open` notes.
            cache.open(infos[number]).close()
        except Exception as error:
            logger.warning("%s: not fetched ahead (%s)", infos[number].file, error)

    with ThreadPoolExecutor(NUM_STREAMS) as pool, suppress(EOFError):
        while True:
            list(pool.map(fetch_one, receiver.recv()))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def open_shards(folder: Path, split: Split, cache: Path) -> ImageShards:
    """The images of a split; where the index in `folder` names a URL, their files come by way of the folder `cache`."""
    index = Index.read(folder)
    if index.shards_at is None:
        return ImageShards(folder, split, LocalFiles(folder))
    return ImageShards(folder, split, ShardCache(index.shards_at, cache, cache_limit(index.shards)))


def cache_limit(shards: Iterable[ShardInfo]) -> int:
    """Bytes of two windows of images of average size, and some more, for windows and images differ."""
    sizes = [(shard.bytes, shard.count) for shard in shards]
    num_bytes, num_images = (sum(column) for column in zip(*sizes, strict=True))
    return round(2.25 * WINDOW * num_bytes / num_images)


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """What reads `url`, and the path there; raises UserError for no URL, or one that needs a package to install."""
    if "://" not in url:
        raise UserError(
            f"prepare.shards_at: {url} is no URL; expected one such as s3://bucket/folder or file:///folder"
        )
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"prepare.shards_at: {url} needs a package that is not installed ({error})") from None
    except ValueError as error:
        known = ", ".join(name for name in ("s3", "gs", "https", "file") if name in fsspec.available_protocols())
        raise UserError(f"prepare.shards_at: {url} cannot be opened ({error}); expected {known}") from None


def fetch(url: str, path: Path, sha256: str) -> None:
    """Copy the file at `url` to `path`; raises UserError where that fails or its hash is another."""
    files, source = filesystem(url)
    _attempt(f"{url}: cannot be read", partial(files.get_file, source, str(path)))
    found = file_sha256(path)
    if found != sha256:
        path.unlink()
        raise UserError(
            f"{url}: is not the shard that was prepared (expected SHA-256 {sha256}, found {found}); delete it there "
            "and run `dvc repro --force prepare` to write it again"
        )


def upload(folder: Path, shards: Iterable[ShardInfo], url: str) -> None:
    """Copy to `url` the shards in `folder` that it does not hold in their size; raises UserError where that fails."""
    files, base = filesystem(url)

    def put(shard: ShardInfo) -> None:
        target = f"{base}/{shard.file}"
        if not files.exists(target) or files.size(target) != shard.bytes:
            files.put_file(str(folder / shard.file), target)

    _attempt(f"{url}: cannot be written", partial(files.makedirs, base, exist_ok=True))
    for shard in shards:
        _attempt(f"{url}/{shard.file}: cannot be written", partial(put, shard))


def _attempt(failure: str, action: Callable[[], object]) -> None:
    for pause_s in PAUSES_S:
        try:
            action()
            return
        # Every file system has exceptions of its own for a network that fails or a right that is missing.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if pause_s is None or isinstance(error, FileNotFoundError | PermissionError):
                break
            logger.warning("%s (%s); trying again in %d s", failure, reason, pause_s)
            time.sleep(pause_s)
    raise UserError(
        f"{failure} ({reason}); check the URL (prepare.shards_at), the network and your rights there, and run again"
    )
