"""Requests made to break the server: each gets a short answer, costs little, and the next caller notices nothing."""

from __future__ import annotations

import base64
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from running_server import Server, running
from tiny_bundle import write_tiny_bundle
from traffic import encoded, form_body, gauges, peak_mib, refused, spoken

JSON = {"Content-Type": "application/json"}
UPGRADE = (
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)

pytestmark = pytest.mark.usefixtures("the_next_caller_notices_nothing")


# Bodies


def test_json_of_millions_of_elements_costs_little(server: Server, http: httpx.Client) -> None:
    before = peak_mib(server.process.pid)
    for body in (
        b'{"images": [' + b"1," * 4_000_000 + b"1]}",
        b'{"images": [' + b"[]," * 4_000_000 + b"1]}",
        b'{"images": ["a"], "masked": [' + b"null," * 3_000_000 + b"1]}",
        b"{" + b",".join(b'"%d":0' % number for number in range(1_000_000)) + b"}",
    ):
        started = time.monotonic()
        for path in ("/embed", "/reconstruct"):
            refused(http.post(path, content=body, headers=JSON), 413, 422)
        assert time.monotonic() - started < 4
    assert peak_mib(server.process.pid) - before < 200


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1_000_000,
        b'{"images":' * 100_000,
        b'{"images": [' + b"[" * 10_000 + b"]" * 10_000 + b"]}",
        b'{"images": ["' + b"A" * 15_000_000 + b'"]}',
        b'{"images": ["\\ud800"]}',
        b'{"images": ["\xff\xfe"]}',
        '{"images": ["é"]}'.encode(),
        b'{"images": ["AAA"]}',
        b'{"images": [""]}',
        b'{"\\ud800": 1}',
        b'{"%s": 1}' % (b"k" * 5_000_000),
        b"null",
        b'"images"',
        b"{}",
        b"\0",
        b'{"images": {"a": "b"}}',
        b'{"images": ["AAAA"], "masked": [%s]}' % (b"9" * 4000),
        b'{"images": ["AAAA"], "masked": [1e400]}',
    ],
    ids=lambda body: body[:30].decode("latin-1"),
)
@pytest.mark.parametrize("path", ["/embed", "/reconstruct"])
def test_hostile_json_is_refused(http: httpx.Client, path: str, body: bytes) -> None:
    refused(http.post(path, content=body, headers=JSON), 400, 413, 415, 422)


def test_json_of_a_huge_index_is_a_bad_field(http: httpx.Client, png: bytes) -> None:
    for index in ("9" * 4000, "-1", "16", "1.5", "true", "9" * 30):
        body = f'{{"images": ["{base64.b64encode(png).decode()}"], "masked": [{index}]}}'
        response = http.post("/reconstruct", content=body, headers=JSON)
        assert response.status_code == 422, index


def test_a_form_of_thousands_of_parts_is_refused(http: httpx.Client, png: bytes) -> None:
    for count in (65, 1001, 20_000):
        body, media_type = form_body([("images", b"x")] * count)
        refused(http.post("/embed", content=body, headers={"Content-Type": media_type}), 400, 422)


@pytest.mark.parametrize(
    "charset", ["undefined", "idna", "punycode", "hex", "utf-16", "unicode_escape", "rot13", "x" * 99]
)
def test_the_charset_of_a_form_breaks_nothing(http: httpx.Client, png: bytes, charset: str) -> None:
    body, media_type = form_body([("images", png)])
    headers = {"Content-Type": f"{media_type}; charset={charset}"}
    response = http.post("/embed", content=body, headers=headers)
    assert response.status_code in (200, 400, 422), response.text
    name = b"\xff" + b"a" * 70 + b"."
    response = http.post("/embed", content=body.replace(b"images", name), headers=headers)
    refused(response, 400, 422)


def test_a_form_that_is_cut_off_is_refused(http: httpx.Client, png: bytes) -> None:
    body, media_type = form_body([("images", png), ("images", png)])
    for end in (len(body) - 8, len(body) - 30, len(body) // 2 + 100, len(body) // 2, 100, 10):
        response = http.post("/embed", content=body[:end], headers={"Content-Type": media_type})
        refused(response, 400, 422)


@pytest.mark.parametrize(
    "filler", [b"\r", b"\r\n", b"\r\n--", b"\r\n--7c9e6679f3b04c1", b"-", b"\r\n--7c9e6679f3b04c1d-"]
)
def test_others_are_answered_while_a_long_form_is_read(http: httpx.Client, server: Server, filler: bytes) -> None:
    body, media_type = form_body([("images", filler * (19_000_000 // len(filler)))])
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(http.post, "/embed", content=body, headers={"Content-Type": media_type})
        slowest, started = 0.0, time.monotonic()
        while not long.done():
            asked = time.monotonic()
            assert httpx.get(server.url + "/health/live", timeout=60).status_code == 200
            slowest = max(slowest, time.monotonic() - asked)
        took = time.monotonic() - started
    refused(long.result(), 400, 415, 422)
    assert slowest < 1.5, slowest
    assert took < 10, took


@pytest.mark.parametrize(
    "head",
    [
        b"name=images; filename=x",
        b'form-data; name="images"',
        b"form-data; name=\"images\"; filename*=utf-8''%ff%fe",
        b'form-data; name*0="im"; name*1="ages"; filename="x"',
        b'form-data; name="\xff\xfe"; filename="x"',
        b"form-data; filename=x",
        b"form-data" + b"; a=b" * 20_000,
        b"\x00\x01\x02",
    ],
)
def test_hostile_heads_of_parts_are_refused(http: httpx.Client, png: bytes, head: bytes) -> None:
    body = b"--x\r\nContent-Disposition: " + head + b"\r\n\r\n" + png + b"\r\n--x--\r\n"
    response = http.post("/embed", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
    if response.status_code != 200:
        refused(response, 400, 422)


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary="',
        f"multipart/form-data; boundary={'b' * 5000}",
        "multipart/form-data; boundary=\xff",
        "application/json; charset=utf-16",
        "application/json;" * 100,
        ";",
        "/",
        "image/",
        "IMAGE/PNG",
    ],
)
def test_odd_content_types_break_nothing(http: httpx.Client, png: bytes, content_type: str) -> None:
    response = http.post("/embed", content=png, headers={"Content-Type": content_type.encode("latin-1")})
    assert response.status_code in (200, 400, 415, 422), response.text


def test_a_huge_body_gets_its_refusal(server: Server) -> None:
    """Not a broken connection, though the server reads no more of it."""
    for declared in (True, False):
        for _ in range(5):
            with httpx.Client(base_url=server.url, timeout=30) as client:
                body = b"\0" * 60_000_000
                content = body if declared else (body[start : start + 10**6] for start in range(0, len(body), 10**6))
                refused(client.post("/embed", content=content), 413)


def test_slow_bodies_are_given_up_and_hold_no_room(server: Server, png: bytes) -> None:
    def slowly(kind: bytes) -> bytes:
        head = b"POST /embed HTTP/1.1\r\nHost: test\r\n" + kind + b"\r\n"
        return spoken(server.url, head, *(png[i : i + 1] for i in range(2)), pause_s=0.2)

    with ThreadPoolExecutor(16) as pool:
        kinds = [b"Content-Length: 5000\r\n"] * 16
        answers = list(pool.map(slowly, kinds))
    assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in answers), answers[0][:100]
    assert set(gauges(server.url).values()) == {0.0}


def test_a_chunked_body_in_single_bytes_is_read(server: Server, png: bytes) -> None:
    file = encoded(np.zeros((3, 8, 8), np.uint8))
    chunks = [b"1\r\n" + file[i : i + 1] + b"\r\n" for i in range(len(file))]
    head = b"POST /embed HTTP/1.1\r\nHost: test\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert spoken(server.url, head, *chunks, b"0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


# Heads


@pytest.mark.parametrize(
    "accept",
    [
        "",
        ",",
        ";;;",
        "*",
        "*/*;q=nan",
        "application/json;q=-1",
        "application/json;q=1e999",
        "a/b/c",
        "\xff",
        "application/json;q=",
        "," * 30_000,
        "application/x-npy;q=0.1, */*;q=inf",
    ],
)
def test_odd_accept_headers_break_nothing(http: httpx.Client, png: bytes, accept: str) -> None:
    response = http.post("/embed", content=png, headers={"Accept": accept.encode("latin-1")})
    if response.status_code != 200:
        refused(response, 400, 406, 431)


@pytest.mark.parametrize("given", [b"a\tb", b"a b", b"\xff", b"x" * 10_000, b'"}', b"a;b", b"../..", b"%0d%0aX: y"])
def test_a_request_id_cannot_carry_anything_along(http: httpx.Client, given: bytes) -> None:
    returned = http.get("/nowhere", headers={"X-Request-Id": given}).headers["x-request-id"]
    assert returned.encode("latin-1") != given
    assert len(returned) <= 64


def test_a_line_break_in_a_request_id_is_no_header(server: Server) -> None:
    answer = spoken(
        server.url,
        b"GET /health/live HTTP/1.1\r\nHost: t\r\nConnection: close\r\nX-Request-Id: a\n b\r\nX-Evil: 1\r\n\r\n",
    )
    assert b"evil" not in answer.lower()


def test_requests_in_a_row_on_one_connection_are_answered_in_order(server: Server, png: bytes) -> None:
    one = b"POST /embed HTTP/1.1\r\nHost: t\r\nX-Request-Id: id-%%d\r\nContent-Length: %d\r\n\r\n" % len(
        png
    ) + png.replace(b"%", b"%%")
    last = b"GET /health/live HTTP/1.1\r\nHost: t\r\nX-Request-Id: id-20\r\nConnection: close\r\n\r\n"
    answer = spoken(server.url, b"".join(one % number for number in range(20)) + last)
    places = [answer.find(b"x-request-id: id-%d\r\n" % number) for number in range(21)]
    assert -1 not in places
    assert places == sorted(places)
    assert answer.count(b"HTTP/1.1 200 OK") == 21


@pytest.mark.parametrize(
    "head",
    [
        b"GET /\xff\xfe HTTP/1.1\r\nHost: t\r\n",
        b"GET /%ff%fe%00 HTTP/1.1\r\nHost: t\r\n",
        b"GET //evil/../../etc/passwd HTTP/1.1\r\nHost: t\r\n",
        b"GET /page/%2e%2e/app.py HTTP/1.1\r\nHost: t\r\n",
        b"GET /page/../../pyproject.toml HTTP/1.1\r\nHost: t\r\n",
        b"GET /page/%00 HTTP/1.1\r\nHost: t\r\n",
        b"GET /page/" + b"a" * 5000 + b" HTTP/1.1\r\nHost: t\r\n",
        b"GET /examples/..%2fbundle.json HTTP/1.1\r\nHost: t\r\n",
        b"GET http://other/health/live HTTP/1.1\r\nHost: t\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: t\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: t\r\n",
        b"POST /embed?%ff=%fe&=&&&;a HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\n",
        b"POST /embed HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"POST /embed HTTP/1.1\r\nHost: t\r\nContent-Length: -5\r\n",
        b"POST /embed HTTP/1.1\r\nHost: t\r\nContent-Length: 99999999999999999999999999\r\n",
        b"POST /embed HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\nContent-Length: 6\r\n",
        b"POST /embed HTTP/1.1\r\nHost: t\r\nContent-Length: \xb2\r\n",
        b"POST /embed HTTP/1.0\r\n",
        b"PRI * HTTP/2.0\r\n",
        b"GARBAGE\r\n",
        b"GET /health/live HTTP/1.1\r\nHost: t\r\n" + UPGRADE,
        b"GET /page/x HTTP/1.1\r\nHost: t\r\n" + UPGRADE,
    ],
    ids=lambda head: head[:60].decode("latin-1"),
)
def test_odd_heads_get_a_plain_answer(server: Server, head: bytes) -> None:
    answer = spoken(server.url, head + b"Connection: close\r\n\r\n" if b"Upgrade" not in head else head + b"\r\n")
    status = answer.split(b"\r\n")[0]
    # HTTP allows whole addresses, and to pass over an upgrade.
    allowed = head.startswith((b"GET http://other", b"GET /health"))
    assert status[9:10] == b"4" or (allowed and b" 200 " in status), answer[:300]
    assert b"[project]" not in answer
    assert b"import" not in answer


def test_a_head_without_end_is_given_up(server: Server) -> None:
    before = peak_mib(server.process.pid)
    line = b"X-%06d: " + b"y" * 60_000 + b"\r\n"
    answer = spoken(server.url, b"GET /health/live HTTP/1.1\r\nHost: t\r\n", *(line % number for number in range(2000)))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer[:100]
    assert peak_mib(server.process.pid) - before < 20


def test_a_query_of_thousands_of_fields_gets_a_short_answer(http: httpx.Client, png: bytes) -> None:
    query = "&".join(f"field{number}=1" for number in range(3000))
    refused(http.post(f"/embed?{query}", content=png), 400, 414, 422)


def test_an_answer_that_nobody_reads_is_not_kept(server: Server, png: bytes) -> None:
    """A caller that asks for much and reads nothing must not fill the memory."""
    body, media_type = form_body([("images", png)] * 64)
    head = f"POST /embed?outputs=patches,attention HTTP/1.1\r\nHost: t\r\nContent-Type: {media_type}\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        # A small window, so that the answers stay in the server.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(5)
        connection.connect((host, int(port)))
        with pytest.raises((ConnectionError, TimeoutError)):
            connection.sendall(request * 200)
        time.sleep(0.1)
        remote = f":{connection.getsockname()[1]:04X} 01 "
        assert remote not in Path(f"/proc/{server.process.pid}/net/tcp").read_text()


def test_an_answer_that_nobody_takes_holds_its_room_until_it_is_given_up(tmp_path: Path) -> None:
    # An answer of more than ten megabytes: the system's buffers take up to four.
    bundle = write_tiny_bundle(tmp_path / "bundle", size=(512, 512))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    body, media_type = form_body([("images", encoded(pixels))] * 64)
    head = f"POST /embed?outputs=patches,attention HTTP/1.1\r\nHost: t\r\nContent-Type: {media_type}\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with (
        running(bundle, tmp_path / "log", {"CAE_SERVING_BODY_TIMEOUT_S": "2"}) as server,
        socket.socket() as connection,
    ):
        host, port = server.url.removeprefix("http://").split(":")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(request)
        deadline = time.monotonic() + 20
        while (held := gauges(server.url))['cae_admitted_bytes{call="embed"}'] < 2**22 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert held['cae_admitted_images{call="embed"}'] == 64
        while sum(gauges(server.url).values()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert time.monotonic() < deadline


def test_the_rest_of_a_refused_body_is_not_read_for_ever(server: Server) -> None:
    """A byte every half second keeps any other timer from running out."""
    head = b"POST /embed?outputs=colour HTTP/1.1\r\nHost: t\r\nContent-Length: 5000\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head)
        assert connection.recv(20).startswith(b"HTTP/1.1 422")
        with pytest.raises(ConnectionError):
            drip(connection, for_s=15)


def drip(connection: socket.socket, for_s: float) -> None:
    started = time.monotonic()
    while time.monotonic() - started < for_s:
        connection.sendall(b"x")
        time.sleep(0.5)
