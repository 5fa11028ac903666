"""docker/examples/alerts.yaml asks for what the server really tells, and fires when it should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_answers import refused
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML
from running_server import ROOT

RULES = ROOT / "docker/examples/alerts.yaml"
# Of Prometheus itself, and labels that it adds to every series of a scrape.
OF_PROMETHEUS, ADDED = {"up"}, {"job", "instance"}
METRIC = re.compile(r"\b((?:cae|process)_\w+|up)(?:\{([^}]*)\})?")
CALLS = '{job="cae-serving", instance="a", path="/embed", status="%s"}'
LABELS = 'job="cae-serving", instance="a"'
# What each alert must see to fire within half an hour, in the words of promtool: a series, and its values each minute.
FIRING: dict[str, dict[str, str]] = {
    "CaeUnreachable": {f"up{{{LABELS}}}": "0x30"},
    "CaeNoReplicaReady": {f'cae_up{{{LABELS}, state="ready"}}': "0x30"},
    "CaeNotReady": {
        f'cae_up{{{LABELS}, state="ready"}}': "0x30",
        'cae_up{job="cae-serving", instance="b", state="ready"}': "1x30",
    },
    "CaeRestarts": {f"process_start_time_seconds{{{LABELS}}}": "1+100x30"},
    "CaeFull": {
        f'cae_rejected_total{{{LABELS}, path="/embed", reason="queue_full"}}': "0+2x30",
        f"cae_requests_total{CALLS % 200}": "0+100x30",
    },
    "CaeDropped": {f'cae_rejected_total{{{LABELS}, path="/embed", reason="expired"}}': "_x27 1x3"},
    "CaeErrors": {f"cae_requests_total{CALLS % 500}": "_x27 1x3"},
    "CaeSlow": {
        f'cae_request_seconds_bucket{{{LABELS}, path="/embed", le="2.5"}}': "0+90x30",
        f'cae_request_seconds_bucket{{{LABELS}, path="/embed", le="5.0"}}': "0+100x30",
        f'cae_request_seconds_bucket{{{LABELS}, path="/embed", le="+Inf"}}': "0+100x30",
    },
    "CaeQueueing": {
        f'cae_stage_seconds_bucket{{{LABELS}, call="embed", stage="queue", le="1.0"}}': "0+90x30",
        f'cae_stage_seconds_bucket{{{LABELS}, call="embed", stage="queue", le="2.5"}}': "0+100x30",
        f'cae_stage_seconds_bucket{{{LABELS}, call="embed", stage="queue", le="+Inf"}}': "0+100x30",
    },
    "CaeOnCpu": {
        f'cae_runs_on{{{LABELS}, asked="auto", provider="CPUExecutionProvider", precision="float32"}}': "1x30"
    },
    "CaeMemory": {f"process_resident_memory_bytes{{{LABELS}}}": f"{int(3.5 * 2**30)}x30"},
    "CaeCallersHangUp": {
        f"cae_requests_total{CALLS % 499}": "0+10x30",
        f"cae_requests_total{CALLS % 200}": "0+90x30",
    },
    "CaeWrongKeys": {f'cae_rejected_total{{{LABELS}, path="/embed", reason="unauthorized"}}': "0+120x30"},
}
# Calls that are answered in 20 ms, now and then one that finds the queue full or hangs up.
HEALTHY = {
    f"up{{{LABELS}}}": "1x30",
    f'cae_up{{{LABELS}, state="ready"}}': "1x30",
    f'cae_up{{{LABELS}, state="live"}}': "1x30",
    f"process_start_time_seconds{{{LABELS}}}": "1x30",
    f"process_resident_memory_bytes{{{LABELS}}}": f"{2**30}x30",
    f"cae_requests_total{CALLS % 200}": "0+1000x30",
    f"cae_requests_total{CALLS % 429}": "0+1x30",
    f"cae_requests_total{CALLS % 499}": "0+1x30",
    f'cae_rejected_total{{{LABELS}, path="/embed", reason="queue_full"}}': "0+1x30",
    f'cae_request_seconds_bucket{{{LABELS}, path="/embed", le="0.025"}}': "0+1000x30",
    f'cae_request_seconds_bucket{{{LABELS}, path="/embed", le="+Inf"}}': "0+1000x30",
    f'cae_stage_seconds_bucket{{{LABELS}, call="embed", stage="queue", le="0.01"}}': "0+1000x30",
    f'cae_stage_seconds_bucket{{{LABELS}, call="embed", stage="queue", le="+Inf"}}': "0+1000x30",
    f'cae_runs_on{{{LABELS}, asked="cpu", provider="CPUExecutionProvider", precision="float32"}}': "1x30",
}


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = YAML(typ="safe").load(RULES)["groups"][0]["rules"]
    return loaded


def test_every_metric_and_label_of_the_rules_is_in_the_servers_metrics(
    http: httpx.Client, png: bytes, rules: list[dict[str, Any]]
) -> None:
    assert http.post("/embed", content=png).status_code == 200
    refused(http.post("/embed", content=b"no image"), 415, "image_unsupported")
    told: dict[str, set[str]] = {}
    values: set[str] = set()
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            told.setdefault(sample.name, set()).update(sample.labels)
            values.update(sample.labels.values())
    for rule in rules:
        used = [(name, matchers) for name, matchers in METRIC.findall(rule["expr"]) if name not in OF_PROMETHEUS]
        assert used or rule["alert"] == "CaeUnreachable"
        for name, matchers in used:
            assert name in told, rule["alert"]
            asked = re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', matchers)
            assert {label for label, _, _ in asked} - ADDED <= told[name], rule["alert"]
            for label, sign, pattern in asked:
                # Others, such as the reasons of refusals, show only once they have happened.
                if label in {"path", "state", "stage", "provider"} and sign != "!=":
                    # A server that was never asked to reconstruct has no series of it.
                    assert set(pattern.split("|")) - {"/reconstruct"} <= values, rule["alert"]
        for kept in re.findall(r"by \(([^)]*)\)", rule["expr"]):
            assert set(re.split(r",\s*", kept)) - ADDED <= set().union(*(told[name] for name, _ in used)), rule["alert"]


def test_the_reasons_in_the_rules_are_codes_of_the_server(rules: list[dict[str, Any]]) -> None:
    source = "".join(path.read_text() for path in (ROOT / "serving").glob("*.py"))
    patterns = re.findall(r'reason=~?"([^"]*)"', " ".join(rule["expr"] for rule in rules))
    reasons = [reason for pattern in patterns for reason in pattern.split("|")]
    assert len(reasons) >= 4
    assert all(f'"{reason}"' in source for reason in reasons)


def test_every_alert_stands_in_the_manual(rules: list[dict[str, Any]]) -> None:
    manual = (ROOT / "docs/operations.md").read_text()
    assert re.findall(r"^\| `(Cae\w+)` \|", manual, re.MULTILINE) == [rule["alert"] for rule in rules]


def test_alerts_fire_when_they_should_and_are_silent_for_a_healthy_server(
    rules: list[dict[str, Any]], tmp_path: Path
) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("there is no promtool (Debian's package prometheus has it)")
    assert set(FIRING) == {rule["alert"] for rule in rules}
    cases = [case(series, f'alertname="{name}"', [name]) for name, series in FIRING.items()]
    cases.append(case(HEALTHY, "", []))
    file = tmp_path / "tests.yaml"
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": cases}))
    result = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def case(series: dict[str, str], among: str, firing: list[str]) -> dict[str, Any]:
    """A test in promtool's words: after half an hour of the series `firing` are those that fire."""
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f'group by (alertname) (ALERTS{{alertstate="firing",{among}}})',
                "eval_time": "30m",
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in firing],
            }
        ],
    }
