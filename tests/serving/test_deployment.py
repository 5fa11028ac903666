"""The examples in docker/examples fit the server's settings and paths; nginx.conf is run in tests/e2e/test_proxy.py."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from ruamel.yaml import YAML
from running_server import ROOT

from serving.settings import PREFIX, Settings

EXAMPLES = ROOT / "docker/examples"
DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}


@pytest.fixture(scope="module")
def kubernetes() -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in YAML(typ="safe").load_all(EXAMPLES / "kubernetes.yaml")}


@pytest.fixture(scope="module")
def pod(kubernetes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = kubernetes["Deployment"]["spec"]["template"]["spec"]
    return spec


def test_the_limits_of_nginx_are_in_line_with_the_servers() -> None:
    config = (EXAMPLES / "nginx.conf").read_text()
    values = dict(re.findall(r"^\s+(\w+) (\d+)[ms];", config, re.MULTILINE))
    assert int(values["client_max_body_size"]) * 2**20 == DEFAULTS["max_body_bytes"]
    assert int(values["client_body_timeout"]) == DEFAULTS["body_timeout_s"]
    assert int(values["proxy_read_timeout"]) > DEFAULTS["request_timeout_s"]
    # Nobody who waited in vain is sent to wait again.
    assert int(values["proxy_next_upstream_timeout"]) < DEFAULTS["request_timeout_s"]


def test_kubernetes_sets_what_the_server_knows_and_waits_for_its_end(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    environment = {one["name"]: one for one in container["env"]}
    assert all(name.removeprefix(PREFIX).lower() in DEFAULTS for name in environment)
    _, pause_s = container["lifecycle"]["preStop"]["exec"]["command"]
    grace_s = float(environment["CAE_SERVING_GRACE_S"]["value"])
    assert pod["terminationGracePeriodSeconds"] > int(pause_s) + grace_s


def test_kubernetes_asks_for_paths_of_the_server(pod: dict[str, Any], http: httpx.Client) -> None:
    (container,) = pod["containers"]
    probes = [container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    assert [probe["path"] for probe in probes] == ["/health/ready", "/health/ready", "/health/live"]
    (port,) = container["ports"]
    assert {probe["port"] for probe in probes} == {port["name"]}
    assert all(http.get(probe["path"]).status_code == 200 for probe in probes)


def test_kubernetes_takes_away_what_the_server_does_not_need(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"]["memory"]


def test_the_parts_in_kubernetes_mean_each_other(kubernetes: dict[str, dict[str, Any]]) -> None:
    labels = kubernetes["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert kubernetes["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert kubernetes["Service"]["spec"]["selector"] == labels
    assert kubernetes["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    scaled = kubernetes["HorizontalPodAutoscaler"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == kubernetes["Deployment"]["metadata"]["name"]
    # Set here, too, every `apply` would undo what the autoscaler did.
    assert "replicas" not in kubernetes["Deployment"]["spec"]
    assert scaled["minReplicas"] == 2


def test_nginx_asks_the_replicas_under_their_name_and_port() -> None:
    text = (EXAMPLES / "compose.replicas.yaml").read_text()
    # Tags of Compose that YAML does not know.
    services = YAML(typ="safe").load(re.sub(r"!(reset|override)", "", text))["services"]
    assert services["serving"]["ports"] == []
    config = (EXAMPLES / "nginx.conf").read_text()
    (port,) = set(re.findall(r"server serving:(\d+) ", config))
    assert int(port) == DEFAULTS["port"]
    (listened,) = re.findall(r"listen (\d+) ssl;", config)
    assert [one.split(":")[1] for one in services["proxy"]["ports"]] == [listened]
    targets = {volume["target"] for volume in services["proxy"]["volumes"]}
    assert targets == {"/etc/nginx/nginx.conf", "/etc/nginx/tls"}
    assert set(re.findall(r"ssl_certificate(?:_key)? (\S+)/tls\.(?:crt|key);", config)) <= targets
