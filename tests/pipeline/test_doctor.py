"""The doctor finds what is broken, says what to do, and survives it."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import check_machine, check_project, doctor
from pipeline.findings import Finding, Status
from pipeline.workspace import Workspace
from serving.machine import has_nvidia_device
from tests.pipeline.command import cae_pipe, environment
from tests.tiny import ROOT, shipped_params, with_values

MakeWorkspace = Callable[[Path, dict[str, Any]], Workspace]


@pytest.fixture
def workspace(make_workspace: MakeWorkspace, tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "root", shipped_params())


def worst(findings: Iterator[Finding]) -> Finding:
    order = list(Status)
    return max(findings, key=lambda finding: order.index(finding.status))


def test_a_fresh_clone_has_no_problem(workspace: Workspace) -> None:
    subprocess.run(["git", "init", "-q"], cwd=workspace.root, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=workspace.root, env=environment(), check=True)
    done = cae_pipe("doctor", "--json", cwd=workspace.root)
    assert done.returncode == 0, done.stdout
    found = {check["check"]: check for check in json.loads(done.stdout)["checks"]}
    assert found["prepared data"]["status"] == found["bundle"]["status"] == "warning"
    assert "pretrain" in found["stages"]["found"]
    assert "make repro" in found["stages"]["remedy"]
    assert found["params.yaml"]["status"] == found["torchvision"]["status"] == found["DVC cache"]["status"] == "ok"
    assert found["DVC analytics"]["status"] == "warning"


def test_outside_a_checkout_it_says_so(tmp_path: Path) -> None:
    done = cae_pipe("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "is no checkout" in " ".join(done.stdout.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_every_wrong_parameter_is_listed_and_the_code_is_6(workspace: Workspace) -> None:
    text = workspace.params_file.read_text()
    workspace.params_file.write_text(text.replace("warmup_epochs", "warmup_epoch").replace("seed: 0", "seed: -1"))
    done = cae_pipe("doctor", "--json", cwd=workspace.root)
    assert done.returncode == 6
    wrong = [check for check in json.loads(done.stdout)["checks"] if check["check"] == "params.yaml"]
    assert any("seed" in check["found"] for check in wrong)
    assert sum("did you mean" in check["found"] for check in wrong) >= 2


def test_a_check_that_fails_is_a_problem_and_ends_no_other(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shared_memory(workspace: Workspace) -> Iterator[Finding]:
        raise ZeroDivisionError("by nought")

    monkeypatch.chdir(workspace.root)
    monkeypatch.setattr(doctor, "ANYWHERE", (shared_memory, check_machine.port))
    monkeypatch.setattr(doctor, "IN_A_CHECKOUT", ())
    monkeypatch.setattr("logging.disable", lambda level: None)
    assert doctor.run(as_json=True)
    failed, port = json.loads(capsys.readouterr().out)["checks"]
    assert (failed["check"], failed["status"]) == ("shared memory", "problem")
    assert "ZeroDivisionError: by nought" in failed["found"]
    assert port["check"] == "port"


def test_a_taken_port_is_a_warning(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("CAE_SERVING_PORT", str(taken.getsockname()[1]))
        finding = worst(iter(check_machine.port(workspace)))
    assert finding.status is Status.WARNING
    assert "--port" in finding.remedy
    assert worst(iter(check_machine.port(workspace))).status is Status.OK


@pytest.mark.skipif(has_nvidia_device(), reason="needs a machine without an NVIDIA device")
def test_asking_for_cuda_where_there_is_none(make_workspace: MakeWorkspace, tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "root", with_values(shipped_params(), {"runtime.device": "cuda"}))
    finding = worst(check_machine.gpu(workspace))
    assert finding.status is Status.PROBLEM
    assert "runtime.device: auto" in finding.remedy


def test_too_little_shared_memory_for_the_loaders(make_workspace: MakeWorkspace, tmp_path: Path) -> None:
    many = with_values(shipped_params(), {"runtime.num_workers": 100_000_000})
    finding = worst(check_machine.shared_memory(make_workspace(tmp_path / "many", many)))
    assert finding.status is Status.PROBLEM
    assert "num_workers" in finding.remedy
    few = make_workspace(tmp_path / "few", shipped_params())
    assert worst(check_machine.shared_memory(few)).status is Status.OK


def test_packages_that_do_not_fit_are_named(workspace: Workspace) -> None:
    (workspace.root / "pyproject.toml").write_text(
        '[project]\nname = "cae-pipe"\nrequires-python = ">=3.99"\ndependencies = ["numpy>=99", "no-such-thing"]\n'
        "optional-dependencies = { pipeline = [] }\n"
    )
    (workspace.root / "requirements.lock").write_text(
        "numpy==0.1 \\\n    --hash=sha256:0\ntyper==0.1 ; sys_platform == 'none' \\\n"
    )
    found = {finding.check: finding for finding in check_machine.versions(workspace)}
    assert found["Python"].status is Status.PROBLEM
    assert "numpy is" in found["packages"].text
    assert "no-such-thing is missing" in found["packages"].text
    assert "numpy" in found["lock"].text
    assert "typer" not in found["lock"].text


def test_this_environment_fits(workspace: Workspace) -> None:
    (workspace.root / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    assert worst(check_machine.versions(workspace)).status is Status.OK


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("folder:nowhere", "is not a folder"),
        ("folder:empty", "is empty"),
        ("zip:x", "not a known source"),
        ("csv:list.csv", "there is no file"),
        ("parquet:rows/*.parquet", "no parquet file"),
        ("wds:shards/{0..1}.tar", "there is no"),
    ],
)
def test_a_source_that_is_not_there(make_workspace: MakeWorkspace, tmp_path: Path, source: str, expected: str) -> None:
    workspace = make_workspace(tmp_path / "root", with_values(shipped_params(), {"prepare.source": source}))
    (workspace.root / "empty").mkdir()
    finding = worst(check_project.source(workspace))
    assert finding.status is Status.PROBLEM
    assert expected in finding.text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("csv:list.csv", "1 file"),
        ("parquet:*.parquet", "1 file"),
        ("wds:{a,b}.tar", "2 files"),
        ("hf:user/pets", "`prepare` loads it"),
    ],
)
def test_every_kind_of_source_is_known(
    make_workspace: MakeWorkspace, tmp_path: Path, source: str, expected: str
) -> None:
    workspace = make_workspace(tmp_path / "root", with_values(shipped_params(), {"prepare.source": source}))
    for name in ("list.csv", "rows.parquet", "a.tar", "b.tar"):
        (workspace.root / name).touch()
    finding = worst(check_project.source(workspace))
    assert finding.status is Status.OK
    assert expected in finding.text


@pytest.fixture
def copy(finished: Workspace, tmp_path: Path) -> Workspace:
    """The finished workspace, to be damaged."""
    for name in ("data", "models/bundle"):
        shutil.copytree(finished.root / name, tmp_path / name)
    return Workspace(tmp_path, finished.params_file)


def test_prepared_data_is_held_against_its_index(copy: Workspace) -> None:
    found = {finding.check: finding for finding in check_project.prepared(copy)}
    assert found["prepared data"].status is Status.OK
    assert "broken.png" in found["rejects"].text
    shard = next(copy.prepared.glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1])
    finding = worst(check_project.prepared(copy))
    assert finding.status is Status.PROBLEM
    assert shard.name in finding.text
    shard.unlink()
    assert f"{shard.name} is missing" in worst(check_project.prepared(copy)).text
    (copy.prepared / "index.json").write_text("{")
    assert worst(check_project.prepared(copy)).status is Status.PROBLEM


def test_the_bundle_is_opened_as_the_server_does(copy: Workspace) -> None:
    assert worst(check_project.bundle(copy)).status is Status.OK
    with (copy.bundle / "encoder.onnx").open("ab") as file:
        file.write(b"\0")
    finding = worst(check_project.bundle(copy))
    assert finding.status is Status.PROBLEM
    assert "damaged" in finding.text


def test_who_runs_what_is_told(workspace: Workspace) -> None:
    lock = workspace.scratch / "locks/pretrain"
    lock.mkdir(parents=True)
    (lock / "owner.pid").write_text(f"{os.getpid()}\n")
    (workspace.root / ".dvc/tmp").mkdir(parents=True)
    holder = {"pid": os.getpid(), "cmd": "/bin/dvc repro"}
    gone = {"pid": 2**22 + 1, "cmd": "/bin/dvc gone"}
    (workspace.root / ".dvc/tmp/rwlock").write_text(json.dumps({"write": {"a": holder}, "read": {"b": [gone]}}))
    texts = [finding.text for finding in check_project._holders(workspace)]
    assert len(texts) == 2
    assert "runs stage pretrain" in texts[0]
    assert "dvc repro" in texts[1]


def test_no_dvc_folder_is_a_problem(workspace: Workspace) -> None:
    assert worst(check_project.dvc(workspace)).status is Status.PROBLEM
