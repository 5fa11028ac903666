"""Requests that schemathesis makes from GET /openapi.json: what the document says is what the server does."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from running_server import Server, running
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from sizes import FULL, SIZES
from traffic import connect, gauges, good_call, rss_mib

_log = logging.getLogger(__name__)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_bundle, tmp_path_factory.mktemp("server") / "log", {}) as running_server:
        yield running_server
        assert [line for line in running_server.log.read_text().splitlines() if "Traceback" in line] == []


def test_every_operation_does_what_the_document_says(server: Server) -> None:
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    statuses: Counter[tuple[str, int]] = Counter()
    before = rss_mib(server.process.pid)
    num_operations = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        num_operations += 1
        for mode in schemathesis.GenerationMode:

            def send(case: schemathesis.Case) -> None:
                response = case.call(timeout=30)
                statuses[case.path, response.status_code] += 1
                case.validate_response(response, checks=CHECKS)

            # An operation without fields has no bad ones.
            with suppress(Unsatisfiable):
                settings(
                    max_examples=SIZES.openapi_cases,
                    derandomize=not FULL,
                    deadline=None,
                    database=None,
                    phases=[Phase.explicit, Phase.generate],
                    suppress_health_check=[*HealthCheck],
                )(given(operation.as_strategy(generation_mode=mode))(send))()
    after = rss_mib(server.process.pid)
    _log.info("%d cases: %s; memory %.0f to %.0f MiB", statuses.total(), dict(statuses), before, after)
    assert len({path for path, _ in statuses}) == num_operations >= 7
    assert {status for _, status in statuses} <= {200, 400, 404, 406, 408, 413, 415, 422}
    assert after - before < 60
    rng = np.random.default_rng(0)
    with connect(server.url) as http:
        for _ in range(10):
            call = good_call(rng)
            call.verify(http.post(call.path, content=call.body, headers=call.headers))
    assert set(gauges(server.url).values()) == {0.0}
