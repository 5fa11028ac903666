"""`python -m serving` as a command: how it starts, refuses and stops."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from running_server import ROOT, START_S, running
from tiny_bundle import write_tiny_bundle

from serving.machine import has_nvidia_device


def refused(*arguments: str, environment: dict[str, str] | None = None, code: int = 2) -> str:
    """The one line on stderr of a start that must end with this exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "serving", *arguments],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert done.returncode == code
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_missing_bundle_is_refused_with_the_remedy(tmp_path: Path) -> None:
    assert "make repro" in refused("--bundle", str(tmp_path / "nowhere"), code=5)


def test_a_damaged_bundle_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_bundle(tmp_path)
    with (folder / "encoder.onnx").open("ab") as file:
        file.write(b"\0")
    assert "encoder.onnx: damaged" in refused("--bundle", str(folder))


def test_a_bundle_whose_images_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    assert "preprocessing.channels: Input should be less" in refused(
        "--bundle", str(write_tiny_bundle(tmp_path, channels=17))
    )


@pytest.mark.skipif(has_nvidia_device(), reason="needs a machine without an NVIDIA device")
def test_cuda_without_cuda_is_refused(tmp_path: Path) -> None:
    assert "device=cuda" in refused("--bundle", str(write_tiny_bundle(tmp_path)), "--device", "cuda")


def test_a_bad_setting_is_named_with_its_variable() -> None:
    assert "CAE_SERVING_MAX_PIXELS" in refused(environment={"CAE_SERVING_MAX_PIXELS": "many"})
    assert "--port, CAE_SERVING_PORT" in refused("--port", "99999")


def test_flags_win_over_the_environment_and_sigterm_ends_with_0(tmp_path: Path) -> None:
    folder = write_tiny_bundle(tmp_path / "bundle")
    environment = {"CAE_SERVING_BUNDLE": str(tmp_path / "nowhere"), "CAE_SERVING_NUM_THREADS": "1"}
    with running(folder, tmp_path / "log", environment) as server:
        assert httpx.get(server.url + "/info").json()["device"]["num_threads"] == 1
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=START_S) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_ctrl_c_ends_with_0_too(tmp_path: Path) -> None:
    with running(write_tiny_bundle(tmp_path / "bundle"), tmp_path / "log", {}) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=START_S) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_port_in_use_ends_with_an_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = subprocess.run(
            [sys.executable, "-m", "serving", "--port", str(taken.getsockname()[1])],
            env=os.environ | {"CAE_SERVING_BUNDLE": str(write_tiny_bundle(tmp_path))},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=START_S,
        )
    assert done.returncode != 0
    assert "address already in use" in done.stderr


def test_serving_needs_neither_torch_nor_the_other_packages() -> None:
    code = "import sys, serving.app, serving.__main__; print({'torch', 'cae', 'pipeline', 'onnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=START_S)
    assert done.stdout.strip() == "set()", done.stderr
