"""The serving benchmark still runs, and says whether its limits are kept."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import fixtures, load, processes, serving
from tests.serving.tiny_bundle import write_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bench") / "tiny")


def test_the_three_are_measured_in_turn(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    serving.main(["--rounds", "1", "--seconds", "0.3", "--bundle", str(bundle), "--out", str(out)])
    shown = capsys.readouterr()
    (contest,) = json.loads(out.read_text())["contests"]
    assert [item["num_clients"] for item in contest["rounds"]] == [1, 8, 32]
    for item in contest["rounds"]:
        for figures in (*item["raw"].values(), item["litserve"], item["ours"]):
            assert figures["images_per_s"] > 0
            assert figures["p50_ms"] > 0
    assert "c8 LitServe" in shown.out
    assert "has no encoder.int8.onnx" in shown.err


def test_the_contenders_give_the_same_features(bundle: Path, tmp_path: Path) -> None:
    with serving.contenders(bundle, "float32", tmp_path) as (_, servers):
        ours, theirs = (features(servers[name]) for name in ("ours", "litserve"))
    assert ours.shape == (1, 3)
    np.testing.assert_allclose(theirs, ours, atol=1e-6)


def features(server: processes.Server) -> np.ndarray:
    async def ask() -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        answer = await load.exchange(reader, writer, server.request.read_bytes())
        writer.close()
        return answer

    status, body = asyncio.run(ask())
    assert status == 200
    return np.load(io.BytesIO(body))


def a_round(num_clients: int, raw: float, litserve: float, ours: float, ours_ms: float = 70) -> serving.Round:
    def figures(speed: float, p50_ms: float) -> dict[str, float]:
        return {"images_per_s": speed, "p50_ms": p50_ms, "p99_ms": p50_ms, "others_cpu": 0.0}

    return serving.Round(
        num_clients, {1: figures(raw, 60), 8: figures(raw / 2, 600)}, figures(litserve, 80), figures(ours, ours_ms)
    )


@pytest.mark.parametrize(
    ("precision", "rounds", "missed"),
    [
        ("float32", [a_round(8, 100, 90, 91)], []),
        ("float32", [a_round(8, 100, 80, 89)], ["8 clients: ours / raw"]),
        ("float32", [a_round(32, 100, 96, 95)], ["32 clients: ours / LitServe"]),
        ("float32", [a_round(32, 100, 90, speed) for speed in (50, 91, 92)], []),
        ("float32", [a_round(1, 16, 12, 15, ours_ms=73)], []),
        ("float32", [a_round(1, 16, 12, 13, ours_ms=74)], ["1 client: latency / (raw + 4 ms)"]),
        ("int8", [a_round(8, 200, 90, 154)], []),
        ("int8", [a_round(8, 100, 90, 152)], ["8 clients: ours int8 / LitServe float32"]),
    ],
)
def test_the_median_of_the_rounds_is_held_against_the_limits(
    precision: serving.Precision, rounds: list[serving.Round], missed: list[str]
) -> None:
    result = serving.Contest("bundle", precision, {}, rounds)
    assert [check.name for check in result.checks() if not check.met] == missed
    assert all(name in serving.table(result) for name in missed)


def test_a_round_beside_other_work_is_told() -> None:
    quiet = a_round(8, 100, 90, 95)
    loud = dataclasses.replace(quiet, ours=quiet.ours | {"others_cpu": 0.5})
    assert "beside 1 of 2 rounds" in serving.table(serving.Contest("bundle", "float32", {}, [quiet, loud]))
    assert "beside" not in serving.table(serving.Contest("bundle", "float32", {}, [quiet]))


def test_the_picture_has_the_size_that_was_promised() -> None:
    content = fixtures.jpeg()
    assert 50_000 <= len(content) <= fixtures.JPEG_BYTES
    assert Image.open(io.BytesIO(content)).size == (640, 480)
    assert content == fixtures.jpeg()


def test_a_paused_server_uses_no_processor(tmp_path: Path) -> None:
    request = tmp_path / "request"
    request.write_bytes(load.request("/", b"x", "text/plain", "*/*"))
    with processes.server("benchmarks.trivial_server", ["{port}"], "/", request, tmp_path / "log", {}) as server:
        with server.paused():
            time.sleep(0.1)
            assert Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        assert processes.load(server, 2, 0.05, 0.2)["num_failed"] == 0
