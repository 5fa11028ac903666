"""The server's images: what is in them, what they may do, and that they answer as the server does outside."""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image as Picture

from benchmarks.fixtures import jpeg, vit_small_bundle
from tests.containers.conftest import readable
from tests.containers.container import HARDENED, Image
from tests.containers.container import serving as serving_from
from tests.containers.engine import Engine
from tests.serving.running_server import running as running_outside
from tests.serving.tiny_bundle import write_tiny_bundle
from tests.tiny import ROOT

logger = logging.getLogger(__name__)

NPY = {"Accept": "application/x-npy"}
MOST_MB = 600
SECRET = "do-not-ship-5d1c"


@pytest.fixture(scope="module")
def picture() -> bytes:
    pixels = np.random.default_rng(3).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Picture.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_the_cpu_image_is_small(serving: Image) -> None:
    logger.info("cae-serving: %.0f MB", serving.size_mb)
    assert serving.size_mb < MOST_MB


@pytest.mark.parametrize("name", ["serving", "serving_cuda"])
def test_only_what_serves_is_in_it(name: str, request: pytest.FixtureRequest) -> None:
    image: Image = request.getfixturevalue(name)
    assert not {"torch", "timm", "dvc", "pip", "setuptools"} & set(
        image.shell("ls /opt/venv/lib/python3*/site-packages").split()
    )
    assert programs(image, "gcc", "cc", "c++", "ld", "make", "git") == []


def programs(image: Image, *names: str) -> list[str]:
    """Those of them that are there."""
    return image.shell(f"for name in {' '.join(names)}; do command -v $name; done; true").split()


def test_the_pipeline_has_no_compiler(pipeline: Image) -> None:
    assert programs(pipeline, "gcc", "cc", "c++", "ld", "make") == []
    assert programs(pipeline, "git") == ["/usr/bin/git"]


@pytest.mark.parametrize("name", ["serving", "serving_cuda", "pipeline"])
def test_the_image_says_what_it_is(name: str, images: str, request: pytest.FixtureRequest) -> None:
    image: Image = request.getfixturevalue(name)
    logger.info("%s: %.0f MB", image.name, image.size_mb)
    configuration = image.inspect()["Config"]
    labels = configuration["Labels"]
    assert labels["org.opencontainers.image.revision"].removesuffix("-dirty") == images
    assert f'version = "{labels["org.opencontainers.image.version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert configuration["User"] == "10001:10001"


@pytest.mark.parametrize("name", ["serving", "serving_cuda", "pipeline"])
def test_the_inventory_lists_every_package_and_its_licence(name: str, request: pytest.FixtureRequest) -> None:
    image: Image = request.getfixturevalue(name)
    bill = json.loads(image.shell("cat /opt/sbom.cdx.json"))
    assert bill["bomFormat"] == "CycloneDX"
    listed = {f"{part['name']}=={part['version']}" for part in bill["components"]}
    script = "import importlib.metadata as m; print(*{f'{d.name}=={d.version}' for d in m.distributions()})"
    installed = set(image.shell(f'/opt/venv/bin/python -c "{script}"').split())
    # The project itself is put in after the list is made.
    assert {part for part in installed if not part.startswith("cae-pipe==")} <= listed
    licences = image.shell("cat /opt/licenses.txt")
    assert all(part.split("==")[0] in licences for part in listed)


def test_it_answers_as_it_does_outside(
    serving: Image, serving_cuda: Image, tiny_bundle: Path, picture: bytes, tmp_path: Path
) -> None:
    calls = ["/embed?outputs=patches", "/embed?outputs=class", "/reconstruct?mask_ratio=0.5&seed=3"]
    with running_outside(tiny_bundle, tmp_path / "log", {}) as outside:
        expected = [httpx.post(outside.url + call, content=picture, headers=NPY).content for call in calls]
    for image in (serving, serving_cuda):
        with serving_from(image, tiny_bundle) as server:
            for call, wanted in zip(calls, expected, strict=True):
                answer = server.client.post(call, content=picture, headers=NPY)
                assert answer.status_code == 200, answer.text
                np.testing.assert_allclose(
                    np.load(io.BytesIO(answer.content)), np.load(io.BytesIO(wanted)), atol=1e-6, rtol=0
                )


def test_it_may_do_nothing_but_serve(serving: Image, tiny_bundle: Path, picture: bytes) -> None:
    with serving_from(serving, tiny_bundle) as server:
        assert server.client.post("/embed", content=picture).status_code == 200
        container = server.container
        assert container.execute("id", "-u")[1].strip() == "10001"
        status = dict(
            line.split(":\t", 1) for line in container.execute("cat", "/proc/1/status")[1].splitlines() if ":\t" in line
        )
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"].strip() == "1"
        for path in ("/app/x", "/opt/venv/x", "/bundle/x", "/var/tmp/x", "/x"):
            assert container.execute("touch", path)[0] != 0, path
        assert container.execute("touch", "/tmp/x")[0] == 0
        # What changed in the container's own layer; mounts do not count.
        changed = serving.engine.run("docker", "diff", container.identity).split()
        assert [path for path in changed if path.startswith("/") and path not in ("/bundle", "/tmp")] == []


def test_its_health_turns_healthy_and_the_check_fails_where_nothing_serves(serving: Image, tiny_bundle: Path) -> None:
    with serving_from(serving, tiny_bundle) as server:
        deadline = time.monotonic() + 40
        while (health := server.container.inspect()["State"]["Health"])["Status"] != "healthy":
            assert time.monotonic() < deadline, health
            time.sleep(0.5)
    check = serving.inspect()["Config"]["Healthcheck"]["Test"]
    assert check[0] == "CMD"
    # Where nothing serves, the same command fails.
    assert serving.outcome(*check[2:], options=("--entrypoint", check[1]))[0] != 0


def test_sigterm_drains(serving: Image, picture: bytes, tmp_path: Path) -> None:
    slow = write_tiny_bundle(readable(tmp_path), num_products=2000)
    with serving_from(serving, slow, {"CAE_SERVING_MAX_BATCH_SIZE": "1"}) as server, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(server.client.post, "/embed", content=picture) for _ in range(8)]
        _wait_until_admitted(server.client, 8)
        serving.engine.run("docker", "stop", "-t", "30", server.container.identity)
        assert [answer.result().status_code for answer in answers] == [200] * 8
        assert server.container.exit_code() == 0


def _wait_until_admitted(client: httpx.Client, num_images: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        text = client.get("/metrics").text
        if f'cae_admitted_images{{call="embed"}} {num_images}.0' in text:
            return
        time.sleep(0.02)
    raise AssertionError("not all were admitted")


def test_without_a_bundle_it_says_what_to_run(serving: Image) -> None:
    code, output = serving.outcome(options=HARDENED)
    assert code == 5
    assert "/bundle/bundle.json" in output
    assert "make repro" in output


def test_a_damaged_bundle_ends_the_start_with_the_name_of_the_file(serving: Image, tmp_path: Path) -> None:
    bundle = write_tiny_bundle(readable(tmp_path))
    graph = bundle / "encoder.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    code, output = serving.outcome(options=(*HARDENED, "--volume", f"{bundle}:/bundle:ro"))
    assert code == 2
    assert "/bundle/encoder.onnx" in output


@pytest.mark.parametrize("name", ["serving", "serving_cuda"])
def test_cuda_without_a_gpu_refuses_to_start(name: str, tiny_bundle: Path, request: pytest.FixtureRequest) -> None:
    image: Image = request.getfixturevalue(name)
    if image.outcome("-c", "test -e /dev/nvidiactl", options=("--entrypoint", "sh"))[0] == 0:
        pytest.skip("a GPU is here")
    code, output = image.outcome("--device", "cuda", options=(*HARDENED, "--volume", f"{tiny_bundle}:/bundle:ro"))
    assert code == 2
    assert "device=cuda" in output


def test_the_cuda_image_brings_every_library_but_the_driver(serving_cuda: Image) -> None:
    script = (
        "import onnxruntime as o, pathlib, ctypes; o.preload_dlls(); "
        "print(o.get_available_providers()); "
        "ctypes.CDLL(str(pathlib.Path(o.__file__).parent / 'capi/libonnxruntime_providers_shared.so')); "
        "ctypes.CDLL(str(pathlib.Path(o.__file__).parent / 'capi/libonnxruntime_providers_cuda.so'))"
    )
    code, output = serving_cuda.outcome("-c", script, options=("--entrypoint", "/opt/venv/bin/python"))
    assert "CUDAExecutionProvider" in output
    assert "Failed to load" not in output
    assert code == 0 or "libcuda.so.1" in output, output


def test_a_bundle_can_be_built_in_and_nothing_hidden_goes_along(
    engine: Engine, images: str, checkout: Callable[[str], Path], tiny_bundle: Path, picture: bytes
) -> None:
    context = checkout("context")
    shutil.copytree(tiny_bundle, context / "models/bundle")
    for hidden in (".env", "serving/.env", "models/bundle/.credentials", "docker/.netrc", "secrets.txt", "data/secret"):
        (context / hidden).parent.mkdir(parents=True, exist_ok=True)
        (context / hidden).write_text(SECRET)
    build = ["docker", "build", *engine.build_arguments, "--build-arg", "BUNDLE=models/bundle"]
    engine.run(*build, "-f", "docker/serving.Dockerfile", "-t", "cae-serving:with-bundle", ".", cwd=context)
    image = Image(engine, "cae-serving:with-bundle")
    with serving_from(image, None) as server:
        assert server.client.post("/embed", content=picture).status_code == 200
    saved = subprocess.run(["docker", "save", image.name], env=engine.variables, check=True, capture_output=True).stdout
    assert (tiny_bundle / "bundle.json").read_bytes() in saved
    assert SECRET.encode() not in saved


def test_memory_and_time_to_ready_with_vit_small(serving: Image, tmp_path: Path) -> None:
    bundle = readable(tmp_path) / "bundle"
    shutil.copytree(vit_small_bundle(ROOT), bundle)
    photograph = jpeg()
    with serving_from(serving, bundle) as server:
        with ThreadPoolExecutor(16) as pool:
            calls = [pool.submit(server.client.post, "/embed", content=photograph, headers=NPY) for _ in range(128)]
            assert {call.result().status_code for call in calls} == {200}
        status = server.container.execute("cat", "/proc/1/status")[1]
        peak_kib = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
        logger.info(
            "ViT-S/16, 224 px, in cae-serving: ready after %.1f s, peak memory %.0f MiB after 128 images, 16 at a time",
            server.ready_s,
            peak_kib / 1024,
        )
        # Of the 4 GB that compose.yaml gives it.
        assert peak_kib < 2**20
