"""What the command line says and with which code it ends."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from cae.errors import Diverged, Interrupted, NotReady, UserError
from pipeline import failures
from pipeline.cli import app
from pipeline.exit_codes import MEANINGS, ExitCode
from pipeline.workspace import Workspace
from tests.pipeline.command import PROGRAM, cae_pipe, environment
from tests.serving.tiny_bundle import write_tiny_bundle
from tests.tiny import ROOT, with_values

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    path = tmp_path / "photograph.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def broken_checkout(tmp_path: Path) -> Path:
    """A checkout in which `cae-pipe results` meets an error that nobody foresaw."""
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/prepare.json").write_text("{")
    return tmp_path


def test_help_waits_for_no_library() -> None:
    script = (
        "import sys\nfrom pipeline import cli\nsys.argv = ['cae-pipe', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print('loaded:', *sorted({'torch', 'numpy', 'onnxruntime', 'pyarrow', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


def test_help_leads_a_newcomer(tmp_path: Path) -> None:
    text = cae_pipe("--help", cwd=tmp_path).stdout
    for part in ("Pipeline stages (dvc repro runs them)", "Use the model", "Look and check", "cae-pipe doctor"):
        assert part in text
    for code, meaning in MEANINGS.items():
        assert f"{code.value}  {meaning}" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_says_what_it_is(name: str) -> None:
    assert COMMANDS[name].help
    assert [param.name for param in COMMANDS[name].params if not getattr(param, "help", None)] == []


@pytest.mark.parametrize("name", ["embed", "reconstruct", "similar", "serve", "export", "plan"])
def test_help_has_examples_that_parse(name: str) -> None:
    lines = [line.strip() for line in COMMANDS[name].help.splitlines()]
    examples = [line.split()[2:] for line in lines if line.startswith(f"cae-pipe {name}")]
    assert examples
    for arguments in examples:
        COMMANDS[name].make_context(name, list(arguments))


def test_version(tmp_path: Path) -> None:
    assert cae_pipe("--version", cwd=tmp_path).stdout.startswith("cae-pipe 0.")


@pytest.mark.parametrize(
    ("words", "expected"),
    [("cae-pipe prob", ["probe"]), ("cae-pipe probe ", ["linear", "attentive", "knn"]), ("cae-pipe sim", ["similar"])],
)
def test_completion_of_commands_and_probes(words: str, expected: list[str], tmp_path: Path) -> None:
    variables = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_CAE_PIPE_COMPLETE": "complete_bash"}
    assert cae_pipe(cwd=tmp_path, **variables).stdout.split() == expected


def test_completion_leaves_files_to_the_shell(tmp_path: Path) -> None:
    # Typer would look for the shell among the parents, and where a daemon runs the tests there is none.
    variables = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = cae_pipe("--show-completion", "bash", cwd=tmp_path, **variables).stdout
    assert "complete -o default -F" in script


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("x"), 2),
        (Diverged("x"), 4),
        (NotReady("x"), 5),
        (Interrupted(signal.SIGTERM, 3, saved=True), 143),
        (OSError(errno.ENOSPC, "No space left on device", "file"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "file"), 2),
        (MemoryError(), 2),
        (ZeroDivisionError(), 1),
    ],
)
def test_every_kind_of_end_has_its_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert failures.report(error) == code


def test_operations_lists_the_codes() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    assert all(f"\n| {code.value} | " in text for code in ExitCode)


def test_what_an_earlier_command_makes_is_told_apart_from_a_wrong_call(tmp_path: Path, photograph: Path) -> None:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    assert cae_pipe("results", cwd=tmp_path).returncode == 5
    for command in (["embed", str(photograph), "--out", "x.npz"], ["serve"], ["tokenizer"], ["similar"]):
        done = cae_pipe(*command, cwd=tmp_path)
        assert done.returncode == 5, done.stderr
        assert "Traceback" not in done.stderr
    assert cae_pipe("embed", "nowhere.png", "--out", "x.npz", "--top", "3", cwd=tmp_path).returncode == 2


def test_a_collapsed_tokenizer_has_its_code(
    tmp_path: Path, make_workspace: Callable[[Path, dict[str, Any]], Workspace], tiny_params: dict[str, Any]
) -> None:
    workspace = make_workspace(tmp_path / "root", with_values(tiny_params, {"tokenizer.min_perplexity": 15.9999}))
    assert cae_pipe("prepare", cwd=workspace.root).returncode == 0
    done = cae_pipe("tokenizer", cwd=workspace.root)
    assert done.returncode == 4, done.stderr
    assert "collapsed" in done.stderr


def test_an_unexpected_error_keeps_its_traceback_in_a_file(broken_checkout: Path) -> None:
    done = cae_pipe("results", cwd=broken_checkout)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "JSONDecodeError" in done.stderr
    assert "scratch/last-error.txt" in done.stderr
    assert "--debug" in done.stderr
    kept = (broken_checkout / "scratch/last-error.txt").read_text()
    assert "Traceback" in kept
    assert "results" in kept.splitlines()[0]


def test_outside_a_checkout_no_folder_is_made(broken_checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (broken_checkout / "dvc.yaml").unlink()
    temporary = tmp_path_factory.mktemp("temporary")
    assert cae_pipe("results", cwd=broken_checkout, TMPDIR=str(temporary)).returncode == 1
    assert not (broken_checkout / "scratch").exists()
    assert "Traceback" in next(temporary.glob("cae-pipe-last-error*")).read_text()


@pytest.mark.parametrize(("options", "variables"), [(["--debug"], {}), ([], {"CAE_PIPE_DEBUG": "1"})])
def test_debug_shows_the_traceback(options: list[str], variables: dict[str, str], broken_checkout: Path) -> None:
    done = cae_pipe(*options, "results", cwd=broken_checkout, **variables)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    # An error of the user too, with the code that it has anyway.
    user = cae_pipe(*options, "embed", "nowhere.png", "--out", "x.csv", cwd=broken_checkout, **variables)
    assert user.returncode == 5
    assert "Traceback" in user.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["reconstruct", "embed"])
def test_a_full_disk_is_named(command: str, tmp_path: Path, bundle: Path, photograph: Path) -> None:
    out, written = ("out.png", "out.png") if command == "reconstruct" else ("out.parquet", "out.parquet.tmp")
    (tmp_path / written).symlink_to("/dev/full")
    done = cae_pipe(command, str(photograph), "--out", out, "--bundle", str(bundle), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that even root cannot write")
def test_a_forbidden_output_is_named(tmp_path: Path, bundle: Path, photograph: Path) -> None:
    done = cae_pipe("reconstruct", str(photograph), "--out", "/sys/x.png", "--bundle", str(bundle), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "/sys/x.png: permission denied" in done.stderr


def test_out_of_memory_names_the_parameter_to_lower() -> None:
    assert "batch_size" in str(failures.explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")))
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50)
    assert "the machine is out of memory" in str(failures.explain(real.value))
    bus = RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error. It is possible that ...")
    assert "--shm-size" in str(failures.explain(bus))
    assert failures.explain(RuntimeError("shapes differ")) is None


def test_a_closed_pipe_is_silent(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [PROGRAM, "--help"], cwd=tmp_path, env=environment(), stdout=writing, stderr=subprocess.PIPE, timeout=60
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_broken_pipe_to_another_process_is_not_silent(tmp_path: Path) -> None:
    script = (
        "from pipeline import cli\nimport sys\n"
        "@cli.app.command()\ndef torn() -> None:\n    raise BrokenPipeError(32, 'Broken pipe')\n"
        "sys.argv = ['cae-pipe', 'torn']\ncli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "BrokenPipeError" in done.stderr


def test_ctrl_c_has_its_code(tmp_path: Path, bundle: Path) -> None:
    slow = tmp_path / "slow.png"
    os.mkfifo(slow)
    process = subprocess.Popen(
        [PROGRAM, "reconstruct", str(slow), "--out", "x.png", "--bundle", str(bundle)],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts its background jobs with Ctrl-C ignored, these tests among them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # Opens as soon as the command reads the image, and then lets it wait.
    with slow.open("wb"):
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
