"""compose.yaml and its overrides, by Compose itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from ruamel.yaml import YAML

from tests.containers.container import Image
from tests.containers.engine import Engine
from tests.tiny import ROOT

FILES = ("compose.yaml", "compose.gpu.yaml", "compose.host-network.yaml")
URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def compose(engine: Engine) -> tuple[str, ...]:
    if not engine.has_compose():
        (pytest.fail if os.environ["CAE_CONTAINERS"] == "strict" else pytest.skip)("no `docker compose` here")
    override = () if engine.has_bridge else ("-f", "compose.yaml", "-f", "compose.host-network.yaml")
    return ("docker", "compose", *override)


@pytest.mark.parametrize("files", [FILES[:1], FILES[:2], FILES[::2], FILES], ids=lambda files: "+".join(files))
@pytest.mark.parametrize("profile", [(), ("--profile", "pipeline")], ids=["serving", "pipeline"])
def test_every_combination_is_valid(
    engine: Engine, compose: tuple[str, ...], files: tuple[str, ...], profile: tuple[str, ...]
) -> None:
    chosen = [option for file in files for option in ("-f", file)]
    services = engine.run("docker", "compose", *chosen, *profile, "config", "--services", cwd=ROOT).split()
    assert sorted(services) == (["pipeline", "serving"] if profile else ["serving"])


def test_the_replicas_are_valid_and_only_their_proxy_is_open(engine: Engine, compose: tuple[str, ...]) -> None:
    files = ("-f", "compose.yaml", "-f", "docker/examples/compose.replicas.yaml")
    merged = engine.run("docker", "compose", *files, "config", cwd=ROOT, environment={"CAE_TLS": "/etc/ssl"})
    services = YAML(typ="safe").load(merged)["services"]
    assert services["serving"]["deploy"]["replicas"] == 3
    assert "ports" not in services["serving"]
    assert [port["published"] for port in services["proxy"]["ports"]] == ["443"]


@pytest.mark.parametrize("override", [(), ("-f", "compose.gpu.yaml"), ("-f", "compose.host-network.yaml")], ids=str)
def test_settings_in_a_file_hold_with_every_override(
    engine: Engine, compose: tuple[str, ...], override: tuple[str, ...], checkout: Callable[[str], Path]
) -> None:
    clone = checkout("settings")
    (clone / "serving.env").write_text("CAE_SERVING_API_KEY=not-to-be-lost\n")
    merged = engine.run("docker", "compose", "-f", "compose.yaml", *override, "config", cwd=clone)
    serving = YAML(typ="safe").load(merged)["services"]["serving"]
    assert serving["environment"]["CAE_SERVING_API_KEY"] == "not-to-be-lost"
    assert serving["environment"]["CAE_SERVING_DEVICE"] == ("cuda" if "compose.gpu.yaml" in override else "cpu")


def test_without_a_bundle_it_says_what_to_run_and_leaves_nothing_behind(
    engine: Engine, compose: tuple[str, ...], serving: Image, checkout: Callable[[str], Path]
) -> None:
    clone = checkout("no_bundle")
    before = sorted(clone.rglob("*"))
    try:
        _, output = engine.outcome(*compose, "up", "--no-build", "serving", cwd=clone)
    finally:
        engine.run(*compose, "down", "--timeout", "0", cwd=clone)
    assert "make repro" in output
    assert sorted(clone.rglob("*")) == before


def test_up_serving_answers_each_call(
    engine: Engine, compose: tuple[str, ...], serving: Image, checkout: Callable[[str], Path], tiny_bundle: Path
) -> None:
    clone = checkout("up")
    shutil.copytree(tiny_bundle, clone / "models/bundle")
    engine.run(*compose, "up", "--no-build", "--detach", "--wait", "serving", cwd=clone)
    try:
        image = (clone / "docs/images/digit.png").read_bytes()
        assert len(httpx.post(f"{URL}/embed", content=image).json()["pooled"]) > 0
        assert httpx.post(f"{URL}/reconstruct?mask_ratio=0.5&seed=1", content=image).content.startswith(b"\x89PNG")
        assert httpx.get(f"{URL}/info").json()["device"]["provider"] == "CPUExecutionProvider"
    finally:
        logs = engine.run(*compose, "logs", "serving", cwd=clone)
        engine.run(*compose, "down", cwd=clone)
    assert "Traceback" not in logs


def test_run_pipeline_takes_any_command(
    engine: Engine, compose: tuple[str, ...], pipeline: Image, checkout: Callable[[str], Path]
) -> None:
    clone = checkout("run")
    owner = clone.stat()
    user = {"CAE_UID": str(owner.st_uid), "CAE_GID": str(owner.st_gid)}
    run = (*compose, "run", "--rm", "--no-TTY", "pipeline")
    try:
        assert engine.run(*run, "cae-pipe", "profile", "list", cwd=clone, environment=user)
        stages = engine.run(*run, "dvc", "stage", "list", "--name-only", cwd=clone, environment=user)
        assert {"prepare", "report"} <= set(stages.split())
    finally:
        engine.run(*compose, "--profile", "pipeline", "down", cwd=clone)
    if owner.st_uid == 0:
        code, output = engine.outcome(*run, "true", cwd=clone)
        assert code == 2
        assert "CAE_UID=0 CAE_GID=0" in output
