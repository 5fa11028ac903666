"""The server on a bundle that the pipeline made answers what the command line writes."""

import io
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from tests.e2e.conftest import Clone

START_S = 60


@pytest.fixture(scope="module")
def server(reproduced: Clone) -> Iterator[httpx.Client]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = reproduced.start("cae-pipe", "serve", "--bundle", "models/bundle", "--port", str(port))
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
    try:
        _wait_ready(client, process)
        yield client
    finally:
        client.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def _wait_ready(client: httpx.Client, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        try:
            if client.get("/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise TimeoutError("the server did not become ready")


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """A colour JPEG of another size than the model's, turned by EXIF."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photograph.jpg"
    Image.fromarray(pixels).resize((120, 90), Image.Resampling.BICUBIC).save(path, exif=exif)
    return path


def test_embed_equals_the_command_line(
    server: httpx.Client, reproduced: Clone, photograph: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features.npz"
    reproduced.run("cae-pipe", "embed", str(photograph), "--out", str(out), "--outputs", "pooled,patches")
    written = np.load(out)
    for name in ("pooled", "patches"):
        answer = server.post(
            f"/embed?outputs={name}", content=photograph.read_bytes(), headers={"Accept": "application/x-npy"}
        )
        assert answer.status_code == 200, answer.text
        assert np.array_equal(np.load(io.BytesIO(answer.content)), written[name])
    as_json = server.post("/embed", content=photograph.read_bytes()).json()
    assert np.array_equal(np.array(as_json["pooled"], dtype=np.float32), written["pooled"])


def test_reconstruct_equals_the_command_line(
    server: httpx.Client, reproduced: Clone, photograph: Path, tmp_path: Path
) -> None:
    for options, query in (
        (["--mask-ratio", "0.75", "--seed", "7"], "mask_ratio=0.75&seed=7"),
        (["--skip-regressor", "--view", "side_by_side"], "skip_regressor=true&view=side_by_side"),
    ):
        out = tmp_path / "picture.png"
        reproduced.run("cae-pipe", "reconstruct", str(photograph), "--out", str(out), *options)
        answer = server.post(f"/reconstruct?{query}", content=photograph.read_bytes())
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "image/png"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), np.asarray(Image.open(out)))


def test_info_describes_the_bundle(server: httpx.Client) -> None:
    assert server.get("/info").json()["bundle"]["preprocessing"]["height"] == 28


def test_embed_writes_parquet_and_leaves_out_what_it_cannot_read(
    reproduced: Clone, photograph: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    out = tmp_path / "features.parquet"
    process = reproduced.start("cae-pipe", "embed", str(tmp_path), "--out", str(out))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    assert "broken.png is left out" in output
    table = parquet.read_table(out)
    assert table["path"].to_pylist() == [str(photograph)]
    assert len(table["pooled"][0]) == 32


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["embed", "nowhere.png", "--out", "x.npz"], "nowhere.png"),
        (["embed", "params.yaml", "--out", "x.csv"], ".parquet or .npz"),
        (["embed", "params.yaml", "--out", "x.npz", "--outputs", "pool"], "'pool'"),
        (["embed", "params.yaml", "--out", "x.npz"], "none of the 1 images"),
        (["reconstruct", "params.yaml", "--out", "x.png"], "params.yaml"),
        (["reconstruct", "params.yaml", "--out", "x.png", "--mask-ratio", "1.5"], "--mask-ratio"),
        (["export", "--checkpoint", "params.yaml", "--out", "x"], "params.yaml"),
    ],
)
def test_mistakes_are_named_without_a_traceback(reproduced: Clone, command: list[str], expected: str) -> None:
    process = reproduced.start("cae-pipe", *command)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert expected in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "command",
    [
        ["embed", "params.yaml", "--out", "x.npz", "--bundle", "nowhere"],
        ["serve", "--bundle", "nowhere"],
        ["export", "--checkpoint", "nowhere", "--out", "x"],
    ],
)
def test_what_is_not_there_yet_has_a_code_of_its_own(reproduced: Clone, command: list[str]) -> None:
    process = reproduced.start("cae-pipe", *command)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 5, output
    assert "nowhere" in output
    assert "Traceback" not in output
