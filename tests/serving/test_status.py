"""Ids, health, information, metrics and the documentation of the server."""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import httpx
import numpy as np
import pytest
from http_answers import JSON, MAX_BODY_BYTES, MAX_PIXELS, refused
from numpy.typing import NDArray
from running_server import running
from tiny_bundle import write_tiny_bundle

from serving.app import create_app
from serving.bundle import Bundle
from serving.service import Service
from serving.settings import Settings

Pixels = Callable[..., NDArray[np.uint8]]


@pytest.mark.parametrize(("given", "kept"), [("job-7.a_B", True), ("x" * 65, False), ("a b", False), ("", False)])
def test_a_request_id_is_kept_if_it_is_harmless(http: httpx.Client, given: str, kept: bool) -> None:
    returned = http.get("/health/live", headers={"X-Request-Id": given}).headers["x-request-id"]
    assert (returned == given) is kept
    assert returned


def test_a_warmed_server_is_live_and_ready(http: httpx.Client) -> None:
    assert http.get("/health/live").json() == {"status": "live"}
    assert http.get("/health/ready").json() == {"status": "ready"}


def test_before_it_is_warmed_it_is_live_and_refuses(tiny_bundle: Path, png: bytes) -> None:
    service = Service(Bundle.open(tiny_bundle, "cpu"), Settings(bundle=tiny_bundle))
    app = create_app(service)

    async def ask() -> None:
        transport = httpx.ASGITransport(app)
        async with service.running(), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.get("/health/live")).status_code == 200
            refused(await client.get("/health/ready"), 503, "not_ready")
            refused(await client.post("/embed", content=png), 503, "not_ready")

    anyio.run(ask)


def test_a_failure_of_the_server_is_a_500_in_the_same_form(
    tiny_bundle: Path, png: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Bundle.open(tiny_bundle, "cpu")
    service = Service(bundle, Settings(bundle=tiny_bundle))
    app = create_app(service)
    service.warm()

    async def ask() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://t") as client,
        ):
            # As if the graph had broken after it was warmed.
            bundle._sessions.clear()
            failed = await client.post("/embed", content=png, headers={"X-Request-Id": "find-me"})
            assert "KeyError" not in str(refused(failed, 500, "internal"))

    with caplog.at_level(logging.ERROR):
        anyio.run(ask)
    (entry,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert entry.request_id == "find-me"  # type: ignore[attr-defined]
    assert entry.exc_info


def test_info_tells_what_runs_and_what_is_allowed(http: httpx.Client) -> None:
    info = http.get("/info").json()
    assert info["device"]["asked"] == "cpu"
    assert info["device"]["provider"] == "CPUExecutionProvider"
    assert info["device"]["precision"] == "float32"
    assert info["device"]["batch_sizes"] == [1, 2, 4, 8]
    assert info["limits"] == {
        "max_body_bytes": MAX_BODY_BYTES,
        "max_pixels": MAX_PIXELS,
        "min_side_px": 8,
        "max_images": 8,
        "max_queued_images": 128,
        "max_queued_bytes": 2**28,
    }
    assert info["bundle"]["preprocessing"]["height"] == 32
    assert info["bundle"]["capabilities"]["reconstruct"] is True
    assert {"python", "onnxruntime", "pillow", "numpy"} <= set(info["versions"])


def test_openapi_describes_raw_images_and_every_field(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/embed",
        "/reconstruct",
        "/info",
        "/metrics",
        "/examples/{name}",
        "/health/live",
        "/health/ready",
    }
    query = {
        "/embed": {"outputs", "dtype", "normalize"},
        "/reconstruct": {"mask_ratio", "seed", "mask_kind", "masked", "skip_regressor", "view"},
    }
    for path, fields in query.items():
        operation = paths[path]["post"]
        for body in ("image/*", "application/x-npy"):
            assert operation["requestBody"]["content"][body]["schema"] == {"type": "string", "format": "binary"}
        assert "[C, H, W]" in operation["requestBody"]["description"]
        assert {parameter["name"] for parameter in operation["parameters"]} == fields
        assert {"200", "400", "401", "404", "406", "408", "413", "415", "422", "429", "503"} <= set(
            operation["responses"]
        )
        assert "application/x-npy" in operation["responses"]["200"]["content"]


def test_the_example_of_the_documentation_gives_the_answer_that_stands_there(http: httpx.Client) -> None:
    operation = http.get("/openapi.json").json()["paths"]["/embed"]["post"]
    sent = operation["requestBody"]["content"]["application/json"]["example"]
    documented = operation["responses"]["200"]["content"]["application/json"]["example"]
    answered = http.post("/embed", json=sent).json()
    assert set(answered) == set(documented)
    assert answered["shapes"] == documented["shapes"]
    assert answered["bundle_sha256"] == documented["bundle_sha256"]
    np.testing.assert_allclose(answered["pooled"], documented["pooled"], atol=1e-6)


def test_the_example_of_a_completion_gives_the_answer_that_stands_there(http: httpx.Client) -> None:
    operation = http.get("/openapi.json").json()["paths"]["/reconstruct"]["post"]
    sent = operation["requestBody"]["content"]["application/json"]["example"]
    documented = operation["responses"]["200"]["content"]["application/json"]["examples"]["short"]["value"]
    answered = http.post("/reconstruct", json=sent, headers=JSON).json()
    first_rows = np.array(answered["reconstruction"])[:, :, :1]
    np.testing.assert_allclose(documented["reconstruction"], first_rows, atol=1e-6)
    own = {"request_id", "reconstruction"}
    assert documented.keys() == answered.keys()
    assert {name: documented[name] for name in documented if name not in own} == {
        name: answered[name] for name in answered if name not in own
    }


def test_the_headers_of_every_answer_are_those_that_are_documented(
    tiny_bundle: Path, tmp_path: Path, png: bytes
) -> None:
    key = {"X-Api-Key": "correct-horse"}
    limits = {"CAE_SERVING_API_KEY": "correct-horse", "CAE_SERVING_MAX_QUEUED_BYTES": str(len(png))}
    of_http = {"date", "server", "content-type", "content-length"}
    with (
        running(tiny_bundle, tmp_path / "log", limits) as server,
        httpx.Client(base_url=server.url, headers=key) as http,
    ):
        paths = http.get("/openapi.json").json()["paths"]

        def check(path: str, status: int, content: bytes, **headers: str) -> None:
            answer = http.post(path, content=content, headers=headers)
            assert answer.status_code == status
            documented = paths[path.partition("?")[0]]["post"]["responses"][str(status)]["headers"]
            found = set(answer.headers) - of_http
            assert found <= {name.lower() for name in documented}
            assert found >= {name.lower() for name, header in documented.items() if header["required"]}

        check("/embed", 200, png)
        check("/reconstruct", 200, png)
        check("/reconstruct?masked=1", 200, png)
        check("/reconstruct?skip_regressor=true", 200, png)
        check("/embed", 401, png, **{"X-Api-Key": "another-horse"})
        check("/embed", 415, b"hello")
        address = httpx.URL(server.url)
        with socket.create_connection((address.host, address.port)) as slow:
            head = f"POST /embed HTTP/1.1\r\nHost: t\r\nX-Api-Key: correct-horse\r\nContent-Length: {len(png)}\r\n\r\n"
            slow.sendall(head.encode())
            while not series(http)['cae_admitted_bytes{call="embed"}']:
                time.sleep(0.01)
            check("/embed", 429, png)


def series(http: httpx.Client) -> dict[str, float]:
    lines = http.get("/metrics").text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def test_metrics_count_what_happened(tiny_bundle: Path, tmp_path: Path, png: bytes) -> None:
    with running(tiny_bundle, tmp_path / "log", {}) as server, httpx.Client(base_url=server.url) as http:
        http.post("/embed", files=[("images", ("a", png))] * 3)
        http.post("/embed", content=png[:100])
        http.post("/embed?outputs=colour", content=png)
        http.post("/reconstruct", content=png)
        http.get("/no/such/path")
        found = series(http)
    assert found['cae_requests_total{path="/embed",status="200"}'] == 1
    assert found['cae_requests_total{path="/embed",status="415"}'] == 1
    assert found['cae_requests_total{path="other",status="404"}'] == 1
    assert found['cae_rejected_total{path="/embed",reason="image_truncated"}'] == 1
    assert found['cae_rejected_total{path="/embed",reason="bad_field"}'] == 1
    assert found['cae_images_total{call="embed"}'] == 3
    assert found['cae_images_total{call="reconstruct"}'] == 1
    assert found['cae_batch_size_sum{call="embed"}'] == 3
    for stage in ("read", "decode", "queue", "inference", "encode"):
        assert found[f'cae_stage_seconds_count{{call="reconstruct",stage="{stage}"}}'] == 1
    for gauge in ("cae_admitted_images", "cae_admitted_bytes", "cae_queue_images"):
        assert found[gauge + '{call="embed"}'] == 0
    assert found['cae_up{state="live"}'] == found['cae_up{state="ready"}'] == 1
    assert found['cae_runs_on{asked="cpu",precision="float32",provider="CPUExecutionProvider"}'] == 1
    assert found["process_resident_memory_bytes"] > 0


def test_each_request_has_a_line_in_the_log_and_none_tells_what_an_image_holds(
    tiny_bundle: Path, tmp_path: Path, png: bytes
) -> None:
    with running(tiny_bundle, tmp_path / "log", {}) as server, httpx.Client(base_url=server.url) as http:
        http.post("/embed", content=png, headers={"X-Request-Id": "good-1"})
        http.post("/embed", json={"images": ["c2VjcmV0"]}, headers={"X-Request-Id": "bad-1"})
    entries = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    by_id = {entry["request_id"]: entry for entry in entries if "request_id" in entry}
    good, bad = by_id["good-1"], by_id["bad-1"]
    assert (good["status"], good["path"], good["images"], good["bytes"]) == (200, "/embed", 1, len(png))
    assert {"ms", "read", "decode", "queue", "inference", "encode", "time", "level"} <= set(good)
    assert (bad["status"], bad["error"]) == (415, "image_unsupported")
    assert "secret" not in (tmp_path / "log").read_text()
    assert "c2VjcmV0" not in (tmp_path / "log").read_text()
    # Those who only watch are logged where they were refused.
    assert not any(entry["path"].startswith("/health") for entry in by_id.values() if entry["status"] == 200)


def test_a_key_guards_all_but_health_and_page(tiny_bundle: Path, tmp_path: Path, png: bytes) -> None:
    key = "correct-horse"
    with (
        running(tiny_bundle, tmp_path / "log", {"CAE_SERVING_API_KEY": key}) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        for path in ("/info", "/metrics", "/examples/x.png"):
            assert refused(http.get(path), 401, "unauthorized")
        for headers in ({}, {"X-Api-Key": "wrong-key"}, {"X-Api-Key": "schlüssel".encode()}, {"Authorization": key}):
            answer = http.post("/embed", content=png, headers=headers)
            refused(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        both = {"X-Api-Key": key, "Authorization": "Bearer of-a-proxy"}
        for headers in ({"X-Api-Key": key}, {"Authorization": f"Bearer {key}"}, both):
            assert http.post("/embed", content=png, headers=headers).status_code == 200
        for path in ("/", "/health/live", "/health/ready", "/openapi.json"):
            assert http.get(path).status_code == 200
    assert key not in (tmp_path / "log").read_text()


def test_pages_of_the_listed_origins_may_call(tiny_bundle: Path, tmp_path: Path, png: bytes) -> None:
    allowed = {"CAE_SERVING_CORS_ORIGINS": '["https://a.example"]'}
    with running(tiny_bundle, tmp_path / "log", allowed) as server, httpx.Client(base_url=server.url) as http:
        for origin, expected in (("https://a.example", "https://a.example"), ("https://b.example", None)):
            answer = http.post("/embed", content=png, headers={"Origin": origin})
            assert answer.headers.get("access-control-allow-origin") == expected
            asking = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            assert http.options("/embed", headers=asking).headers.get("access-control-allow-origin") == expected


def test_without_a_list_no_origin_is_allowed(http: httpx.Client, png: bytes) -> None:
    answer = http.post("/embed", content=png, headers={"Origin": "https://a.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_behind_a_proxy_the_documentation_names_the_path_outside(tiny_bundle: Path, tmp_path: Path) -> None:
    with running(tiny_bundle, tmp_path / "log", {"CAE_SERVING_ROOT_PATH": "/cae"}) as server:
        assert httpx.get(server.url + "/openapi.json").json()["servers"] == [{"url": "/cae"}]
        # A proxy may strip the path or leave it.
        assert httpx.get(server.url + "/cae/info").status_code == 200
        assert httpx.get(server.url + "/info").status_code == 200


def test_only_examples_that_the_bundle_lists_are_given_out(tmp_path: Path, png: bytes) -> None:
    folder = write_tiny_bundle(tmp_path / "bundle")
    (folder / "example_0.png").write_bytes(png)
    info = json.loads((folder / "bundle.json").read_text())
    info["examples"] = ["example_0.png"]
    info["files"]["example_0.png"] = {"sha256": hashlib.sha256(png).hexdigest(), "bytes": len(png)}
    (folder / "bundle.json").write_text(json.dumps(info))
    with running(folder, tmp_path / "log", {}) as server, httpx.Client(base_url=server.url) as http:
        answer = http.get("/examples/example_0.png")
        assert (answer.content, answer.headers["content-type"]) == (png, "image/png")
        for name in ("bundle.json", "encoder.onnx", "..%2Fbundle.json", "example_1.png"):
            refused(http.get(f"/examples/{name}"), 404, "not_found")
        (folder / "example_0.png").write_bytes(b"replaced")
        assert http.get("/examples/example_0.png").content == png
