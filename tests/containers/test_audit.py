"""`make audit` against an advisory service of this machine; the real ones say something else every day."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.tiny import ROOT

PYTHON = ROOT / ".venv-tools/bin/python"
ADVISORY: dict[str, Any] = {
    "id": "PYSEC-2000-1",
    "aliases": ["CVE-2000-0001"],
    "summary": "An image that burns.",
    "affected": [
        {
            "package": {"name": "pillow", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0.0"}]}],
            "versions": [],
        }
    ],
}

pytestmark = pytest.mark.skipif(not PYTHON.is_file(), reason="`make tools` makes .venv-tools, where pip-audit lives")


class OSV(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"vulns": [ADVISORY]} if query["package"]["name"] == "pillow" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: a line for each of hundreds of packages says nothing about the test."""


@pytest.fixture
def osv_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), OSV) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The script with locks of its own: pillow, and one package in two versions."""
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker/audit.py").write_text((ROOT / "docker/audit.py").read_text())
    (tmp_path / "docker/audit-ignore.txt").write_text("# nothing yet\n")
    (tmp_path / "docker/image.lock").write_text("pillow==12.3.0 \\\n    --hash=sha256:00\n")
    (tmp_path / "requirements.lock").write_text(
        "numpy==2.4.6 ; python_full_version < '3.12' \\\n    --hash=sha256:00\n"
        "numpy==2.5.5 ; python_full_version >= '3.12' \\\n    --hash=sha256:00\n"
    )
    return tmp_path


def audit(project: Path, osv_url: str, *options: str) -> tuple[int, str]:
    # No proxy listens at port 9: PyPI, the first service, is out of reach.
    environment = {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1", "PIP_AUDIT_OSV_URL": osv_url}
    done = subprocess.run(
        [PYTHON, project / "docker/audit.py", *options],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_finding_fails_until_it_is_explained(project: Path, osv_url: str) -> None:
    code, said = audit(project, osv_url)
    assert code == 1
    assert "pillow 12.3.0 (docker/image.lock): PYSEC-2000-1 CVE-2000-0001: fixed in 99.0.0" in said
    assert "osv: knows 3 of 3 versions" in said

    (project / "docker/audit-ignore.txt").write_text("CVE-2000-0001 Nobody burns images here.\n")
    code, said = audit(project, osv_url, "--strict")
    assert code == 0
    assert "explained: Nobody burns images here." in said


def test_an_explanation_has_a_reason(project: Path, osv_url: str) -> None:
    (project / "docker/audit-ignore.txt").write_text("CVE-2000-0001\n")
    code, said = audit(project, osv_url)
    assert code == 1
    assert "audit-ignore.txt: CVE-2000-0001" in said


def test_an_explanation_of_nothing_is_to_be_deleted(project: Path, osv_url: str) -> None:
    (project / "docker/audit-ignore.txt").write_text("CVE-2000-0001 burns\nCVE-2000-0002 gone\n")
    assert "CVE-2000-0002 is explained in audit-ignore.txt and found no more" in audit(project, osv_url)[1]


def test_silence_is_no_clean_bill(project: Path) -> None:
    nowhere = "http://127.0.0.1:9/v1/query"
    code, said = audit(project, nowhere)
    assert code == 0
    assert "NOT AUDITED: 3 of 3 versions" in said
    assert "no known vulnerability" not in said
    assert audit(project, nowhere, "--strict")[0] == 1
