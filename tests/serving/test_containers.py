"""The container files keep their promises; building and running the image is not done here."""

from __future__ import annotations

import re
from typing import Any

import pytest
from ruamel.yaml import YAML
from running_server import ROOT

from serving.settings import Settings


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    loaded: dict[str, Any] = YAML(typ="safe").load(ROOT / "compose.yaml")["services"]["serving"]
    return loaded


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "docker/serving.Dockerfile").read_text().replace("\\\n", " ")


def test_compose_builds_from_a_file_that_exists(service: dict[str, Any]) -> None:
    assert (ROOT / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_compose_mounts_the_bundle_read_only_and_makes_no_folder(service: dict[str, Any]) -> None:
    (volume,) = service["volumes"]
    assert volume == {
        "type": "bind",
        "source": f"./{Settings.model_fields['bundle'].default}",
        "target": "/bundle",
        "read_only": True,
        "bind": {"create_host_path": False},
    }


def test_compose_takes_away_what_the_server_does_not_need(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert service["init"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert service["stop_grace_period"] == "30s"


def test_compose_is_reached_from_this_machine_only(service: dict[str, Any]) -> None:
    assert service["ports"] == ["127.0.0.1:8000:8000"]


def test_the_image_installs_locked_hashes_before_the_source(dockerfile: str) -> None:
    install = dockerfile.index("--require-hashes -r /tmp/serving.lock")
    assert dockerfile.index("COPY docker/serving-cpu.lock") < install < dockerfile.index("COPY serving/")


def test_the_image_runs_as_a_number_and_stops_on_sigterm(dockerfile: str) -> None:
    assert "\nUSER 10001:10001\n" in dockerfile
    assert "\nSTOPSIGNAL SIGTERM\n" in dockerfile
    assert dockerfile.rstrip().endswith('ENTRYPOINT ["python", "-m", "serving"]')


def test_the_variables_of_the_image_are_settings(dockerfile: str) -> None:
    names = re.findall(r"CAE_SERVING_([A-Z_]+)=", dockerfile)
    assert names
    assert {name.lower() for name in names} <= set(Settings.model_fields)


def test_the_health_check_asks_for_a_path_that_exists(dockerfile: str) -> None:
    assert "HEALTHCHECK" in dockerfile
    assert "/health/ready" in dockerfile


def test_the_build_context_holds_what_the_image_copies_and_nothing_else(dockerfile: str) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    copied = re.findall(r"^COPY (\S+)", dockerfile, re.MULTILINE)
    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == set(copied)
