"""`python -m serving` as a command: how it starts, refuses and stops."""

from __future__ import annotations

import json
import os
import re
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
from serving.settings import Settings


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["bundle.json", "encoder.onnx"])
def test_a_bundle_of_somebody_elses_is_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    folder = write_tiny_bundle(tmp_path)
    (folder / name).chmod(0)
    assert "chmod -R a+rX" in refused("--bundle", str(folder))


def test_onnx_runtime_collects_nothing(tmp_path: Path) -> None:
    """It would keep an identity and what it has to send in the home of the user."""
    bundle, home = write_tiny_bundle(tmp_path / "bundle"), tmp_path / "home"
    home.mkdir()
    with running(bundle, tmp_path / "log", {"HOME": str(home)}) as server:
        httpx.post(server.url + "/embed", content=(ROOT / "docs/images/digit.png").read_bytes())
    assert list(home.iterdir()) == []


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


def test_a_file_holds_settings_and_variables_win_over_it(tmp_path: Path) -> None:
    folder = write_tiny_bundle(tmp_path / "bundle")
    (tmp_path / "serving.toml").write_text(
        'num_threads = 1\nmax_batch_size = 6\nmax_images = 3\nmax_pixels = 7\ncors_origins = ["*"]\n'
    )
    environment = {"CAE_SERVING_CONFIG": str(tmp_path / "serving.toml"), "CAE_SERVING_MAX_PIXELS": "5000"}
    with running(folder, tmp_path / "log", environment) as server:
        info = httpx.get(server.url + "/info").json()
    assert (info["device"]["num_threads"], info["device"]["batch_sizes"]) == (1, [1, 2, 4, 6])
    assert (info["limits"]["max_images"], info["limits"]["max_pixels"]) == (3, 5000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_imagse = 3\n", "max_imagse"),
        ("max_images = 0\n", "max_images (CAE_SERVING_MAX_IMAGES, or in the file of settings)"),
        ("max_images = \n", "serving.toml"),
    ],
)
def test_a_bad_file_of_settings_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "serving.toml").write_text(text)
    assert expected in refused("--config", str(tmp_path / "serving.toml"))


def test_a_file_of_settings_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "nowhere.toml: there is no such file" in refused("--config", str(tmp_path / "nowhere.toml"))


def test_a_key_is_not_repeated_even_if_it_will_not_do() -> None:
    line = refused(environment={"CAE_SERVING_API_KEY": "short"})
    assert "CAE_SERVING_API_KEY" in line
    assert "short" not in line.replace("shorter", "")
    assert "ASCII" in refused(environment={"CAE_SERVING_API_KEY": "schlüssel-wort"})


def test_a_list_that_is_no_json_is_refused() -> None:
    assert "cors_origins" in refused(environment={"CAE_SERVING_CORS_ORIGINS": "https://a.example"})


def test_a_bundle_whose_graphs_take_other_images_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_bundle(tmp_path / "bundle")
    info = json.loads((folder / "bundle.json").read_text())
    info["model"]["patch_size"] = 16
    info["preprocessing"] |= {"height": 64, "width": 64}
    (folder / "bundle.json").write_text(json.dumps(info))
    assert "takes images of [3, 32, 32], but bundle.json says [3, 64, 64]" in refused("--bundle", str(folder))


def test_the_manual_lists_every_setting_with_its_default() -> None:
    manual = (ROOT / "docs/operations.md").read_text()
    listed = dict(re.findall(r"^\| `CAE_SERVING_(\w+)` \| ([^|]+) \|", manual, re.MULTILINE))
    assert set(listed) == {name.upper() for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        if isinstance(field.default, int | float | str | Path) and field.default != "":
            assert listed[name.upper()] == f"`{field.default}`"
