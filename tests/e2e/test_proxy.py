"""docker/examples/nginx.conf keeps what docs/operations.md promises of it: TLS, balance, no failed answers."""

from __future__ import annotations

import io
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from serving.settings import Settings
from tests.e2e.fleet import Fleet, fleet
from tests.serving.http_answers import NPY, array, encoded, refused
from tests.serving.tiny_bundle import expected_features, write_tiny_bundle
from tests.waiting import wait_for

NUM_CALLERS = 8
MAX_BODY_BYTES = Settings.model_fields["max_body_bytes"].default


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def slow_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 10 ms for each image, so that there is always something under way."""
    return write_tiny_bundle(tmp_path_factory.mktemp("slow"), num_products=40)


@pytest.fixture(scope="module")
def two(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two replicas that no test stops."""
    # In containers the proxy has another address than this one, which uvicorn would believe what it says of TLS.
    environment = {"CAE_SERVING_MAX_PIXELS": "1000000", "FORWARDED_ALLOW_IPS": "192.0.2.1"}
    with fleet(bundle, tmp_path_factory.mktemp("two"), [environment] * 2) as started:
        yield started


@pytest.fixture
def outside(two: Fleet) -> Iterator[httpx.Client]:
    with two.client() as client:
        yield client


def pixels(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (3, 32, 32), dtype=np.uint8)


def embed(client: httpx.Client, seed: int) -> httpx.Response:
    """The answer for an image; where it is a success it holds the right numbers."""
    response = client.post("/embed", content=encoded(pixels(seed)), headers=NPY)
    if response.status_code == 200:
        assert np.allclose(array(response), expected_features(pixels(seed)[None])["pooled"], atol=1e-5)
    return response


@contextmanager
def callers(started: Fleet, num: int, pause_s: float = 0.0) -> Iterator[Callable[[], Counter[int]]]:
    """One call after another by each of so many callers, without retries, until the statuses are asked for."""
    over = threading.Event()

    def keep_asking(seed: int) -> Counter[int]:
        statuses: Counter[int] = Counter()
        with started.client() as client:
            while not over.is_set():
                response = embed(client, seed)
                statuses[response.status_code] += 1
                if response.status_code != 200:
                    assert response.headers["retry-after"]
                    assert set(response.json()) == {"error", "request_id"}
                time.sleep(pause_s)
        return statuses

    with ThreadPoolExecutor(num) as pool:
        running = [pool.submit(keep_asking, seed) for seed in range(num)]

        def statuses() -> Counter[int]:
            over.set()
            return sum((one.result() for one in running), Counter())

        try:
            yield statuses
        finally:
            over.set()


def test_calls_are_answered_through_tls(two: Fleet, outside: httpx.Client) -> None:
    assert embed(outside, 1).status_code == 200
    assert outside.post("/reconstruct", content=encoded(pixels(2))).headers["content-type"] == "image/png"
    assert "<html" in outside.get("/").text
    # Plain HTTP is not spoken, so no key travels in the clear.
    assert httpx.get(two.url.replace("https:", "http:") + "/info").status_code == 400


def test_the_callers_request_id_reaches_the_server_and_a_bad_one_is_replaced(outside: httpx.Client) -> None:
    assert outside.get("/info", headers={"X-Request-Id": "mine-1"}).headers.get_list("x-request-id") == ["mine-1"]
    (made,) = outside.get("/info", headers={"X-Request-Id": 'mine" 1'}).headers.get_list("x-request-id")
    assert len(made) == 32


def test_a_caller_who_is_sent_elsewhere_stays_with_tls(two: Fleet, outside: httpx.Client) -> None:
    assert outside.get("/info/").headers["location"] == f"{two.url}/info"


def test_every_replica_has_its_share_of_the_load(two: Fleet) -> None:
    series = 'cae_images_total{call="embed"}'
    before = np.array([replica.sample(series) for replica in two.replicas])
    with callers(two, NUM_CALLERS) as statuses:
        time.sleep(2)
        counted = statuses()
    assert set(counted) == {200}
    shares = np.array([replica.sample(series) for replica in two.replicas]) - before
    assert shares.sum() == counted[200]
    assert shares.min() > 0.3 * shares.sum(), shares


def test_a_killed_replica_fails_nobody(slow_bundle: Path, tmp_path: Path) -> None:
    with fleet(slow_bundle, tmp_path, [{}] * 3) as started, callers(started, NUM_CALLERS) as statuses:
        time.sleep(1)
        deadline = time.monotonic() + 30
        while started.replicas[0].sample('cae_admitted_images{call="embed"}') == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        started.replicas[0].process.send_signal(signal.SIGKILL)
        time.sleep(3)
        counted = statuses()
        assert set(counted) == {200}, counted
        # It died with calls in its hands, and these were asked again elsewhere.
        assert any(", " in entry["statuses"] for entry in started.entries())


def test_bundles_are_changed_and_changed_back_without_a_failed_answer(tmp_path: Path) -> None:
    """Replica by replica, each told to stop and started again while callers go on."""
    for version, num_products in (("1", 10), ("2", 11)):
        write_tiny_bundle(tmp_path / version, num_products=num_products)
    current = tmp_path / "current"
    current.symlink_to("1")

    def served(started: Fleet) -> set[str]:
        return {httpx.get(f"{replica.url}/info").json()["bundle_sha256"] for replica in started.replicas}

    with fleet(current, tmp_path, [{}] * 2) as started, callers(started, 4, pause_s=0.02) as statuses:
        (first,) = served(started)
        switch(current, "2")
        # Those that run keep what they have read.
        assert served(started) == {first}
        for replica in started.replicas:
            replica.restart()
        (second,) = served(started)
        assert second != first
        switch(current, "1")
        for replica in started.replicas:
            replica.restart()
        assert served(started) == {first}
        counted = statuses()
        assert set(counted) == {200}, counted
        # Callers met a replica that was stopping or not there, and another one answered.
        assert any(", 200" in entry["statuses"] for entry in started.entries())


def switch(current: Path, version: str) -> None:
    """As `ln -sfn` and `mv -T` do: there is no moment without a bundle."""
    new = current.with_name("new")
    new.symlink_to(version)
    new.replace(current)


def test_what_one_replica_is_too_full_for_another_one_answers(slow_bundle: Path, tmp_path: Path) -> None:
    with fleet(slow_bundle, tmp_path, [{"CAE_SERVING_MAX_QUEUED_IMAGES": "1"}, {}]) as started:
        with callers(started, NUM_CALLERS) as statuses:
            time.sleep(3)
            counted = statuses()
        assert set(counted) == {200}, counted
        passed_on = [entry for entry in started.entries() if entry["statuses"].startswith("429")]
        assert len(passed_on) > 10
        # A replica that was full is asked again at once when it has room.
        assert started.replicas[0].sample('cae_images_total{call="embed"}') > 20


def test_where_all_are_full_callers_hear_so_and_nothing_else(slow_bundle: Path, tmp_path: Path) -> None:
    with fleet(slow_bundle, tmp_path, [{"CAE_SERVING_MAX_QUEUED_IMAGES": "1"}] * 2) as started:
        with callers(started, NUM_CALLERS) as statuses:
            time.sleep(3)
            counted = statuses()
        assert set(counted) == {200, 429}, counted
        assert counted[200] > 50


def test_where_no_replica_is_left_callers_are_told_when_to_come_again(bundle: Path, tmp_path: Path) -> None:
    with fleet(bundle, tmp_path, [{}] * 2) as started, started.client() as client:
        for replica in started.replicas:
            replica.process.kill()
            replica.process.wait()
        for _ in range(3):
            refused(embed(client, 0), 503, "no_replica")
        for replica in started.replicas:
            replica.start_again()
        assert embed(client, 0).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_refused_in_the_servers_form(outside: httpx.Client, chunked: bool) -> None:
    body = bytes(MAX_BODY_BYTES + 1)
    response = outside.post("/embed", content=iter([body]) if chunked else body)
    refused(response, 413, "body_too_large")


def test_a_body_at_the_limit_reaches_the_server(outside: httpx.Client) -> None:
    refused(outside.post("/embed", content=bytes(MAX_BODY_BYTES)), 415, "image_unsupported")


def test_the_servers_own_413_comes_through_in_its_words(outside: httpx.Client) -> None:
    big = encoded(np.zeros((3, 1000, 1001), dtype=np.uint8))
    assert "1001 x 1000" in refused(outside.post("/embed", content=big), 413, "image_too_large")["message"]


def test_metrics_are_not_for_the_outside(outside: httpx.Client, two: Fleet) -> None:
    assert httpx.get(f"{two.replicas[0].url}/metrics").status_code == 200
    spellings = [
        "metrics",
        "metrics/",
        "/metrics",
        "%6detrics",
        "metrics%0a",
        "info/../metrics",
        "metrics?a",
        "cae/metrics",
    ]
    for spelling in spellings:
        refused(outside.get(f"{two.url}/{spelling}"), 404, "not_found")


def test_below_a_path_of_a_site(bundle: Path, tmp_path: Path) -> None:
    with (
        fleet(bundle, tmp_path, [{"CAE_SERVING_ROOT_PATH": "/cae"}] * 2, "location /cae/ {") as started,
        started.client() as client,
    ):
        below = httpx.Client(base_url=f"{started.url}/cae", verify=started.trust)
        assert embed(below, 3).status_code == 200
        assert "<html" in below.get("/").text
        assert below.get("/openapi.json").json()["servers"] == [{"url": "/cae"}]
        refused(below.get("/metrics"), 404, "not_found")
        assert client.get("/info").status_code == 404


def test_a_caller_who_takes_no_answer_holds_no_room_in_a_replica(tmp_path: Path) -> None:
    # 50 MB, far more than the buffers of two connections hold.
    large = write_tiny_bundle(tmp_path / "bundle", size=(1024, 1024), patch_size=4)
    body = form_of_many(64, 1024)
    with fleet(large, tmp_path, [{"CAE_SERVING_MAX_PIXELS": "100000000"}]) as started:
        head = (
            f"POST /embed?outputs=patches HTTP/1.1\r\nHost: t\r\nAccept: application/x-npy\r\n"
            f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        port = int(started.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as plain:
            started.trust.check_hostname = False
            with started.trust.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
                connection.sendall(head.encode() + body)
                replica = started.replicas[0]
                wait_for(lambda: replica.sample('cae_images_total{call="embed"}') >= 64, 60)
                # Before anybody loses patience, after 30 s.
                wait_for(lambda: replica.sample('cae_admitted_bytes{call="embed"}') == 0, 15)


def form_of_many(count: int, side_px: int) -> bytes:
    """A form with so many grey pictures: small as files, large as answers."""
    picture = encoded(np.full((3, side_px, side_px), 127, dtype=np.uint8))
    buffer = io.BytesIO()
    for index in range(count):
        buffer.write(
            f'--b\r\nContent-Disposition: form-data; name="images"; filename="{index}"\r\n'
            "Content-Type: image/png\r\n\r\n".encode()
        )
        buffer.write(picture + b"\r\n")
    buffer.write(b"--b--\r\n")
    return buffer.getvalue()
