"""The pipeline under real DVC: reproducible, restorable, and not to be stopped for good."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.e2e.conftest import TIMEOUT_S, Clone


def forget(clone: Clone) -> None:
    """Remove dvc.lock and every output; the DVC cache stays."""
    (clone.root / "dvc.lock").unlink()
    for place in ("data", "models", "metrics"):
        shutil.rmtree(clone.root / place)


def wait_for_step(clone: Clone, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until pretraining has saved a checkpoint at `step` or later."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        saved = clone.root.glob("scratch/pretrain-*/checkpoints/step-*.pt")
        if any(int(path.stem.split("-")[1]) >= step for path in saved):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise TimeoutError(f"no checkpoint at step {step}")


def test_a_second_repro_runs_no_stage(reproduced: Clone) -> None:
    assert reproduced.repro() == []


def test_metrics_and_dag_are_shown(reproduced: Clone) -> None:
    shown = reproduced.run("dvc", "metrics", "show")
    assert "random_init_top1" in shown
    assert "token_agreement" in shown
    assert "probe@attentive" in reproduced.run("dvc", "dag")
    assert "gain" in reproduced.run("cae-pipe", "results")


def test_deleted_outputs_are_restored_from_the_cache(reproduced: Clone) -> None:
    before = reproduced.hashes()
    forget(reproduced)
    assert reproduced.repro() == []
    assert reproduced.hashes() == before
    assert (reproduced.root / "models/bundle/encoder.onnx").exists()


def test_a_probe_parameter_retrains_nothing_before_it(reproduced: Clone) -> None:
    reproduced.set_params(probe__knn__k=3)
    # The bundle quotes the figures of the probes, so it is described again.
    assert reproduced.repro() == ["probe@knn", "export", "report"]
    reproduced.set_params(probe__knn__k=5)
    assert reproduced.repro() == []


def test_seeds_are_run_one_after_the_other_and_everything_is_as_before(reproduced: Clone) -> None:
    before, params = reproduced.hashes(), (reproduced.root / "params.yaml").read_text()
    reproduced.run("cae-pipe", "seeds", "0", "1")
    assert reproduced.hashes() == before
    assert (reproduced.root / "params.yaml").read_text() == params
    runs = json.loads((reproduced.root / "seeds.json").read_text())
    assert [run["params"]["seed"] for run in runs] == [0, 1]
    assert runs[0]["metrics"]["pretrain"] != runs[1]["metrics"]["pretrain"]
    assert "over the seeds 0, 1" in (reproduced.root / "report/index.html").read_text()
    assert "2 seeds" in reproduced.run("cae-pipe", "results")


def test_interrupted_in_another_folder_it_ends_with_the_same_bytes(
    reproduced: Clone, make_clone: Callable[[Path], Clone], tmp_path: Path
) -> None:
    clone = make_clone(tmp_path / "elsewhere" / "clone")
    total_steps = 40 * 3

    process = clone.start("dvc", "repro")
    wait_for_step(clone, total_steps // 4, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    assert "which is saved" in output

    process = clone.start("dvc", "repro")
    wait_for_step(clone, total_steps // 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert "going on from step" in output

    output = clone.run("dvc", "repro")
    assert "going on from step" in output
    assert "Running stage 'tokenizer'" not in output
    assert clone.hashes() == reproduced.hashes()


def test_wrong_parameters_fail_before_any_work(reproduced: Clone) -> None:
    good = (reproduced.root / "params.yaml").read_text()
    (reproduced.root / "params.yaml").write_text(good.replace("warmup_epochs", "warmup_epoch", 1))
    process = reproduced.start("cae-pipe", "pretrain")
    output, _ = process.communicate(timeout=TIMEOUT_S)
    (reproduced.root / "params.yaml").write_text(good)
    assert process.returncode == 2
    assert "did you mean" in output
    assert "Traceback" not in output
