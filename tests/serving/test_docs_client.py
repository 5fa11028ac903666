"""The examples of docs/client.md, run against a real server."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running_server import ROOT, Server, running
from tiny_bundle import write_tiny_bundle

TEXT = (ROOT / "docs/client.md").read_text()
URL = "http://127.0.0.1:8000"
API_KEY = "a key of the tests"
# A command goes on after a backslash or a pipe.
COMMANDS = [
    command
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for command in re.findall(r"(?:[^\n]*[\\|]\n)*[^\n]+\n", block)
]
(PYTHON,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
FIRST_BYTES = {".png": b"\x89PNG", ".npy": b"\x93NUMPY"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with an example image."""
    folder = write_tiny_bundle(tmp_path_factory.mktemp("bundle"))
    info = json.loads((folder / "bundle.json").read_text())
    Image.new("RGB", (32, 32)).save(folder / "example_0.png")
    content = (folder / "example_0.png").read_bytes()
    info["files"]["example_0.png"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (folder / "bundle.json").write_text(json.dumps(info | {"examples": ["example_0.png"]}))
    return folder


@pytest.fixture(scope="module")
def open_server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(bundle, tmp_path_factory.mktemp("server") / "log", {}) as server:
        yield server


@pytest.fixture(scope="module")
def keyed_server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(bundle, tmp_path_factory.mktemp("server") / "log", {"CAE_SERVING_API_KEY": API_KEY}) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that the examples name."""
    pixels = np.random.default_rng(7).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "photo.png", "photos/a.jpg", "photos/b.jpg"):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / name)
    np.save(tmp_path / "image.npy", pixels)
    diagonal = Image.fromarray(np.eye(4, dtype=np.uint8) * 255)
    diagonal.resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / "mask.png")
    # What every curl here is told beside its own options: to fail where the server refuses.
    (tmp_path / ".curlrc").write_text("fail\nsilent\nshow-error\n")
    return tmp_path


def test_every_call_has_an_example() -> None:
    calls = (
        "/embed",
        "/reconstruct",
        "/info",
        "/examples/",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/openapi.json",
    )
    assert [call for call in calls if not any(URL + call in command for command in COMMANDS)] == []


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split(URL)[-1].split("'")[0].strip())
def test_the_curl_example_is_answered(command: str, folder: Path, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue("keyed_server" if "$API_KEY" in command else "open_server")
    assert URL in command
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command.replace(URL, server.url)],
        cwd=folder,
        env=os.environ | {"CURL_HOME": str(folder), "API_KEY": API_KEY},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    if out := re.search(r"-o (\S+)", command):
        file = folder / out.group(1)
        assert file.read_bytes().startswith(FIRST_BYTES.get(file.suffix, b""))
        assert file.stat().st_size > 0
    else:
        assert done.stdout


def test_the_python_example_runs(folder: Path, open_server: Server) -> None:
    shapes = (
        "print(pooled.shape, {name: array.shape for name, array in several.items()}, completed.reconstruction.shape, "
        "completed.masked.shape, len(folder.paths), folder.features.shape, folder.failures, grid)"
    )
    done = subprocess.run(
        [sys.executable, "-c", PYTHON.replace(URL, open_server.url) + shapes],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("(1, 3) {'class': (1, 3), 'patches': (1, 16, 3)} (1, 3, 32, 32) (12,) 2 (2, 3) {} [4, 4]\n")
