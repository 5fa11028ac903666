"""Shards at a URL: read as if they lay on the disk, kept within a limit, refused where they are damaged."""

import functools
import gc
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from cae.data import remote
from cae.data.loader import TrainDataset, train_loader
from cae.data.order import EpochBatches, SampleOrder
from cae.data.remote import FetchAhead, ShardCache, filesystem, open_shards, upload
from cae.data.shards import ImageShards, Index, Picture, file_sha256
from cae.data.transforms import to_array
from cae.errors import UserError
from tests.cae.test_data import NUM_IMAGES, write_folder
from tests.pipeline.command import environment, is_running
from tests.tiny import ROOT
from tests.waiting import wait_for

NO_LIMIT = 10**9


class Counting(SimpleHTTPRequestHandler):
    """Files of a folder; every shard that is asked for is noted."""

    def __init__(self, asked: list[str], *args: Any, **options: Any) -> None:
        self.asked = asked
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "local")


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def url(local: Path, asked: list[str]) -> Iterator[str]:
    """The folder `local` over HTTP."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Counting, asked, directory=str(local)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES_S", (0, 0, None))


def index_only(local: Path, folder: Path, url: str) -> Path:
    """What `prepare` leaves on the disk when the shards of `local` lie at `url`."""
    folder.mkdir()
    Index.read(local).model_copy(update={"shards_at": url}).write(folder)
    return folder


def pixels(picture: Picture, _rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"images": to_array(picture)}


def epochs(shards: ImageShards, num_workers: int) -> list[torch.Tensor]:
    """Two epochs of images, a batch each step."""
    order = SampleOrder(shards.counts, 0, window=10)
    batches = EpochBatches(order, 5, 0, 2 * NUM_IMAGES // 5)
    loader = train_loader(TrainDataset(shards, pixels, 0), batches, num_workers, torch.device("cpu"))
    return [batch["images"] for batch in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_epochs_over_http_are_those_of_the_disk(
    num_workers: int, tmp_path: Path, local: Path, url: str, asked: list[str]
) -> None:
    away = open_shards(index_only(local, tmp_path / "away", url), "train", tmp_path / "cache")
    near = ImageShards(local, "train")
    for got, expected in zip(epochs(away, num_workers), epochs(near, 0), strict=True):
        assert torch.equal(got, expected)
    # Whoever fetches it, a shard is fetched once.
    assert sorted(asked) == [f"/{info.file}" for info in near.infos]


def fetching_process() -> BaseProcess:
    (process,) = [child for child in multiprocessing.active_children() if child.name == "fetch-ahead"]
    return process


def test_shards_are_fetched_ahead_and_a_fault_is_left_to_the_loader(
    tmp_path: Path, local: Path, url: str, asked: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    away = open_shards(index_only(local, tmp_path / "away", url), "train", tmp_path / "cache")
    first, missing, *others = away.infos
    (local / missing.file).unlink()
    away.files.open(first)
    ahead = FetchAhead(away)
    everything = list(range(len(away.infos)))
    ahead(everything)
    wait_for(lambda: all(away.files.has(info) for info in others))
    assert not away.files.has(missing)
    assert asked.count(f"/{first.file}") == 1
    # It is killed, and the training goes on: the loss is noticed, then another takes its place.
    fetching_process().kill()
    (local / missing.file).write_bytes(b"")
    wait_for(lambda: not multiprocessing.active_children())
    ahead(everything)
    ahead(everything)
    assert "is gone" in caplog.text
    process = fetching_process()
    del ahead
    gc.collect()
    process.join(60)
    assert process.exitcode == 0


ORPHANED = """
import os, sys
from pathlib import Path
from cae.data.remote import FetchAhead, open_shards

if __name__ == "__main__":
    FetchAhead(open_shards(Path(sys.argv[1]), "train", Path(sys.argv[2])))([0, 1])
    import multiprocessing, signal, time
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(60)
"""


def test_what_fetches_ahead_ends_with_its_killed_parent_in_the_middle_of_a_file(tmp_path: Path, local: Path) -> None:
    asked = threading.Event()

    class Silent(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            time.sleep(30)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    away = index_only(local, tmp_path / "away", f"http://127.0.0.1:{server.server_port}")
    script = tmp_path / "orphaned.py"
    script.write_text(ORPHANED)
    command = [sys.executable, str(script), str(away), str(tmp_path / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        assert asked.wait(60)
        parent.kill()
        wait_for(lambda: not is_running(child))
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_what_was_uploaded_is_read_back(kind: str, tmp_path: Path, local: Path) -> None:
    url = f"{kind}://{tmp_path}/store/one"
    index = Index.read(local)
    upload(local, index.shards, url)
    away = open_shards(index_only(local, tmp_path / "away", url), "val", tmp_path / "cache")
    near = ImageShards(local, "val")
    assert [to_array(away.image(i)).tobytes() for i in range(4)] == [
        to_array(near.image(i)).tobytes() for i in range(4)
    ]


def test_an_upload_writes_only_what_is_not_there_in_its_size(tmp_path: Path, local: Path) -> None:
    store = tmp_path / "store"
    whole, cut, *_ = infos = Index.read(local).shards
    upload(local, infos, f"file://{store}")
    before = (store / whole.file).stat().st_mtime_ns
    (store / cut.file).write_bytes(b"half")
    upload(local, infos, f"file://{store}")
    assert (store / whole.file).stat().st_mtime_ns == before
    assert file_sha256(store / cut.file) == cut.sha256


def test_the_cache_stays_within_its_limit_and_evicts_what_was_used_longest_ago(tmp_path: Path, local: Path) -> None:
    first, second, third, *_ = Index.read(local).shards
    cache = ShardCache(f"file://{local}", tmp_path / "cache", first.bytes + second.bytes + third.bytes - 1)
    for info in (first, second, first, third):
        cache.open(info)
    assert [cache.has(info) for info in (first, second, third)] == [True, False, True]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= cache.limit_bytes


def test_the_shard_just_fetched_stays_and_a_mapped_one_is_readable_after_its_eviction(
    tmp_path: Path, local: Path
) -> None:
    infos = [info for info in Index.read(local).shards if info.split == "train"]
    cache = ShardCache(f"file://{local}", tmp_path / "cache", 1)
    mapped = cache.open(infos[0])
    cache.open(infos[1])
    assert [cache.has(info) for info in infos[:2]] == [False, True]
    assert mapped.read() == (local / infos[0].file).read_bytes()
    shards = ImageShards(local, "train", cache)
    near = ImageShards(local, "train")
    for position in np.random.default_rng(0).permutation(NUM_IMAGES).tolist():
        assert shards.key(position) == near.key(position)
        # An evicted file that stays mapped would take up disk beyond the limit.
        assert len(shards._batches) == 1


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: data[:300] + b"!" + data[301:]])
def test_a_shard_that_is_not_the_prepared_one_is_refused(damage: Any, tmp_path: Path, local: Path, url: str) -> None:
    info = Index.read(local).shards[0]
    (local / info.file).write_bytes(damage((local / info.file).read_bytes()))
    found = file_sha256(local / info.file)
    cache = ShardCache(url, tmp_path / "cache", NO_LIMIT)
    with pytest.raises(
        UserError, match=f"{url}/{info.file}: .*{info.sha256}, found {found}.*dvc repro --force prepare"
    ):
        cache.open(info)
    assert not cache.has(info)


def test_a_file_cut_short_in_the_cache_is_fetched_again(tmp_path: Path, local: Path, url: str) -> None:
    info = Index.read(local).shards[0]
    cache = ShardCache(url, tmp_path / "cache", NO_LIMIT)
    cache.open(info)
    (kept,) = (tmp_path / "cache").glob("*.arrow")
    kept.write_bytes(b"half")
    assert cache.open(info).read() == (local / info.file).read_bytes()


@pytest.mark.usefixtures("impatient")
def test_a_server_that_does_not_answer_is_named(tmp_path: Path, local: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        port = server.server_port
    cache = ShardCache(f"http://127.0.0.1:{port}", tmp_path / "cache", NO_LIMIT)
    with pytest.raises(UserError, match=rf"http://127\.0\.0\.1:{port}/train-00000\.arrow: cannot be read \(.*onnect"):
        cache.open(Index.read(local).shards[0])


def test_a_shard_that_is_not_there_is_named(tmp_path: Path, local: Path, url: str) -> None:
    info = Index.read(local).shards[0]
    (local / info.file).unlink()
    with pytest.raises(UserError, match=f"{url}/{info.file}: cannot be read.*FileNotFoundError"):
        ShardCache(url, tmp_path / "cache", NO_LIMIT).open(info)


@pytest.mark.usefixtures("impatient")
def test_a_failure_that_passes_is_survived(tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = Index.read(local).shards[0]
    files = fsspec.filesystem("file")
    failures = iter([TimeoutError("slow"), ConnectionResetError("gone")])
    get_file = type(files).get_file

    def failing(*args: Any, **options: Any) -> None:
        if failure := next(failures, None):
            raise failure
        get_file(*args, **options)

    monkeypatch.setattr(type(files), "get_file", failing)
    cache = ShardCache(f"file://{local}", tmp_path / "cache", NO_LIMIT)
    assert cache.open(info).read() == (local / info.file).read_bytes()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/folder", "s3://bucket/folder needs a package .*[Ii]nstall s3fs"),
        ("nonsense://bucket", "nonsense://bucket cannot be opened .*nonsense.*expected s3, gs, https, file"),
        ("some/folder", "some/folder is no URL; expected one such as s3://"),
    ],
)
def test_a_url_that_nothing_opens_says_what_to_do(url: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"prepare\.shards_at: {message}"):
        filesystem(url)


def _open_all(cache: ShardCache, infos: list[Any], barrier: Any) -> None:
    barrier.wait()
    for info in infos:
        cache.open(info)


def test_processes_that_want_the_same_shards_at_once_fetch_each_once(
    tmp_path: Path, local: Path, url: str, asked: list[str]
) -> None:
    infos = Index.read(local).shards
    cache = ShardCache(url, tmp_path / "cache", NO_LIMIT)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_open_all, args=(cache, infos, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(asked) == sorted(f"/{info.file}" for info in infos)
    kept = {path.stem: file_sha256(path) for path in (tmp_path / "cache").glob("*.arrow")}
    assert kept == {info.sha256: info.sha256 for info in infos}
    assert not list((tmp_path / "cache").glob("*.partial"))
