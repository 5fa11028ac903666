"""A scratch folder belongs to one process, one set of parameters, one data set, one state of the code."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from cae.errors import UserError
from cae.train.checkpoint import CheckpointStore
from pipeline import pretrain, runs
from pipeline.workspace import Workspace
from tests.pipeline.conftest import MakeWorkspace
from tests.pipeline.test_parameters import on_finished
from tests.tiny import with_values, write_params

HOLDER = """
    import sys, time
    from pathlib import Path
    from pipeline.runs import stage_lock
    from pipeline.workspace import Workspace
    root = Path(sys.argv[1])
    with stage_lock(Workspace(root, root / "params.yaml"), "pretrain"):
        print("held", flush=True)
        time.sleep(60)
"""


def test_a_second_process_is_told_which_one_runs_the_stage(
    tmp_path: Path,
    finished: Workspace,
    tiny_params: dict[str, Any],
    make_workspace: MakeWorkspace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Other parameters than the orphan's: it would still write the same outputs.
    other = with_values(tiny_params, {"pretrain.lr": 0.5})
    workspace = on_finished(tmp_path, finished, other, make_workspace)
    monkeypatch.setattr(runs, "LOCK_TIMEOUT_S", 0.2)
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match=str(holder.pid)), runs.stage_lock(workspace, "pretrain"):
            pass
        with runs.stage_lock(workspace, "finetune"):
            pass
    finally:
        holder.kill()
        holder.wait()
    # The lock ended with its holder, though nothing was cleaned up.
    with runs.stage_lock(workspace, "pretrain"):
        pass


def test_the_fingerprint_covers_parameters_data_and_code(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    def fingerprint(workspace: Workspace) -> str:
        return runs.make_stamp(workspace, "pretrain")["fingerprint"]

    same = on_finished(tmp_path / "same", finished, tiny_params, make_workspace)
    assert fingerprint(same) == fingerprint(finished)

    other_params = with_values(tiny_params, {"pretrain.lr": 0.5})
    assert fingerprint(on_finished(tmp_path / "p", finished, other_params, make_workspace)) != fingerprint(same)

    not_its_own = with_values(tiny_params, {"finetune.lr": 0.5})
    assert fingerprint(on_finished(tmp_path / "o", finished, not_its_own, make_workspace)) == fingerprint(same)

    data = on_finished(tmp_path / "d", finished, tiny_params, make_workspace)
    index = data.prepared / "index.json"
    index.write_text(index.read_text().replace('"hash": "', '"hash": "0'))
    assert fingerprint(data) != fingerprint(same)

    code = on_finished(tmp_path / "c", finished, tiny_params, make_workspace)
    package = code.root / "cae"
    original = package.resolve()
    package.unlink()
    package.mkdir()
    for path in original.iterdir():
        if path.name != "masking.py":
            (package / path.name).symlink_to(path)
    (package / "masking.py").write_text((original / "masking.py").read_text() + "# changed\n")
    assert fingerprint(code) != fingerprint(same)


def with_an_unfinished_run(workspace: Workspace) -> Path:
    """The checkpoints of a pretraining that was stopped before its last step, in `workspace`."""
    pretrain.run(Workspace(workspace.root, workspace.params_file))
    checkpoints = next(workspace.scratch.glob("pretrain-*/checkpoints"))
    CheckpointStore(checkpoints, 1, None).paths()[-1].unlink()
    return checkpoints


def test_another_parameter_starts_anew_says_so_and_leaves_the_other_run_alone(
    tmp_path: Path,
    finished: Workspace,
    tiny_params: dict[str, Any],
    make_workspace: MakeWorkspace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    workspace = on_finished(tmp_path, finished, tiny_params, make_workspace)
    checkpoints = with_an_unfinished_run(workspace)
    kept = sorted(checkpoints.iterdir())
    write_params(workspace.root, with_values(tiny_params, {"pretrain.lr": 0.5}))
    caplog.clear()
    pretrain.run(Workspace(workspace.root, workspace.params_file))
    told = next(record.getMessage() for record in caplog.records if "starts anew" in record.getMessage())
    assert f"{kept[-1]} (step " in told
    assert "made with other parameters: pretrain.lr (0.002, now 0.5)" in told
    assert "`cae-pipe pretrain --force` goes on from it" in told
    assert "going on from step" not in caplog.text
    assert sorted(checkpoints.iterdir()) == kept


def test_force_goes_on_from_a_run_with_other_parameters(
    tmp_path: Path,
    finished: Workspace,
    tiny_params: dict[str, Any],
    make_workspace: MakeWorkspace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    workspace = on_finished(tmp_path, finished, tiny_params, make_workspace)
    checkpoints = with_an_unfinished_run(workspace)
    kept = sorted(checkpoints.iterdir())
    write_params(workspace.root, with_values(tiny_params, {"pretrain.lr": 0.001}))
    caplog.set_level("INFO")
    pretrain.run(Workspace(workspace.root, workspace.params_file).forced())
    assert "--force goes on from it" in caplog.text
    assert "going on from step" in caplog.text
    assert sorted(checkpoints.iterdir()) == kept


def test_force_with_nothing_to_go_on_from_is_refused(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    workspace = on_finished(tmp_path, finished, tiny_params, make_workspace)
    with pytest.raises(UserError, match=r"--force: .* has no checkpoint of pretrain"):
        pretrain.run(workspace.forced())


def test_a_checkpoint_that_another_run_left_in_the_folder_is_refused(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    workspace = on_finished(tmp_path, finished, tiny_params, make_workspace)
    checkpoints = with_an_unfinished_run(workspace)
    other = with_values(tiny_params, {"pretrain.lr": 0.001})
    write_params(workspace.root, other)
    changed = Workspace(workspace.root, workspace.params_file)
    folder = runs.run_folder(changed, "pretrain", 2)
    shutil.copytree(checkpoints, folder.path / "checkpoints", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"made with other parameters: pretrain\.lr \(0\.002, now 0\.001\).*--force"):
        pretrain.run(changed)
