"""What can be seen of the images without building them; the rest is `make test-containers`."""

from __future__ import annotations

import re
from typing import Any

import pytest
from ruamel.yaml import YAML

from serving.settings import Settings
from tests.tiny import ROOT

SERVICES = ("serving", "pipeline")


def service(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = YAML(typ="safe").load(ROOT / "compose.yaml")["services"][name]
    return loaded


def dockerfile(name: str) -> str:
    return (ROOT / f"docker/{name}.Dockerfile").read_text().replace("\\\n", " ")


@pytest.mark.parametrize("name", SERVICES)
def test_compose_takes_away_what_is_not_needed(name: str) -> None:
    asked = service(name)
    assert asked["read_only"] is True
    assert "/tmp" in asked["tmpfs"]
    assert asked["cap_drop"] == ["ALL"]
    assert asked["security_opt"] == ["no-new-privileges:true"]
    assert asked["mem_limit"]
    assert asked["pids_limit"]
    (volume,) = asked["volumes"]
    # The engine must not make a folder of root's where one is missing.
    assert volume["bind"] == {"create_host_path": False}


def test_compose_gives_the_server_nothing_to_write_to_and_only_this_machine_to_talk_to() -> None:
    asked = service("serving")
    assert asked["volumes"][0]["read_only"] is True
    assert asked["ports"] == ["127.0.0.1:8000:8000"]


def test_compose_waits_until_the_server_has_drained() -> None:
    grace_s = Settings.model_fields["grace_s"].default
    assert float(service("serving")["stop_grace_period"].removesuffix("s")) > grace_s


def test_the_folder_that_compose_mounts_is_in_every_clone() -> None:
    assert service("serving")["volumes"][0]["source"] == "${CAE_BUNDLES:-./models}"
    assert (ROOT / "models/README.md").is_file()


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_installs_locked_hashes_before_the_source(name: str) -> None:
    text = dockerfile(name)
    install = text.index(f"--require-hashes -r /tmp/{name}.lock")
    assert text.index(f"COPY docker/{name}-${{VARIANT}}.lock") < install < text.index("COPY serving/")


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_runs_as_a_number(name: str) -> None:
    assert "\nUSER 10001:10001\n" in dockerfile(name)


def test_the_variables_of_the_image_are_settings() -> None:
    names = re.findall(r"CAE_SERVING_([A-Z_]+)=", dockerfile("serving"))
    assert names
    assert {name.lower() for name in names} <= set(Settings.model_fields)


def test_the_build_context_holds_what_the_images_copy_and_nothing_else() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    let_in = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied: set[str] = set()
    for name in SERVICES:
        for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile(name), re.MULTILINE):
            copied |= set(sources.split())
    locks_and_scripts = {path for path in copied if path.endswith((".lock", ".sh"))}
    assert rules[0] == "*"
    assert copied - locks_and_scripts - {"${BUNDLE}/"} == let_in - {
        "docker/*.lock",
        "docker/*.sh",
        "docker/bundle/",
        "models/bundle/",
    }
    assert rules[-2:] == ["**/__pycache__/", "**/.*"]
