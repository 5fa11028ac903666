"""`make gpu-check` loses nothing but what a fault or the end of the time takes, and can run without a GPU."""

import ast
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.gpu_check import __main__, fast, learn, loading, machine, predictions, process, right, serve, wheels
from benchmarks.gpu_check.noise import NoiseFromCpu
from benchmarks.gpu_check.parts import PARTS, Check, Context, Outcome, Part, missed_above
from benchmarks.gpu_check.stage_steps import BUILDERS
from benchmarks.gpu_check.verdicts import Prediction, held_against
from benchmarks.gpu_check.worker import attempt, shortened
from benchmarks.training.setting import Setting
from tests.tiny import ROOT

MODULES = {"machine": machine, "right": right, "fast": fast, "loading": loading, "serve": serve, "learn": learn}
CHECKS: dict[tuple[str, str], Check] = {
    (part, check.name): check for part, module in MODULES.items() for check in module.CHECKS
}
FAULTY = Part("faulty_part", None, (), package="tests.benchmarks")


@pytest.fixture
def context(tmp_path: Path) -> Context:
    folder = tmp_path / "part"
    folder.mkdir()
    return Context("cpu", dry=True, folder=folder, data=None, ends_at=time.time() + 600)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    """What became of every check of a part in which everything goes wrong, with 12 s for all of it."""
    folder = tmp_path_factory.mktemp("faulty")
    told: list[Outcome] = []
    found = process.run_part(FAULTY, process.Options("cpu", True, folder, None), 12, told.append)
    assert told == found
    return folder, found


def test_a_fault_costs_only_its_own_check(faulty: tuple[Path, list[Outcome]]) -> None:
    status = {outcome.check: outcome.status for outcome in faulty[1]}
    assert status == {
        "fine": "ok",
        "missed": "missed",
        "raises": "failed",
        "after a lost GPU": "ok",
        "dies": "failed",
        "absent": "skipped",
        "skips": "skipped",
        "hangs": "out of time",
        "after a hang": "ok",
        "hangs to the end": "out of time",
        "never": "not reached",
    }


def test_a_fault_is_told_with_its_place_and_reason(faulty: tuple[Path, list[Outcome]]) -> None:
    found = {outcome.check: outcome for outcome in faulty[1]}
    assert re.fullmatch(r"tests/benchmarks/faulty_part\.py:\d+", found["raises"].place)
    assert "illegal memory access" in found["raises"].said
    assert "SIGKILL" in found["dies"].said
    assert "its last words" in found["dies"].said
    assert "no_such_package" in found["absent"].said
    assert "WHEELS" in found["absent"].said
    assert found["skips"].said == "there is nothing to see"
    assert "1 s" in found["hangs"].said


def test_after_a_lost_gpu_another_process_goes_on(faulty: tuple[Path, list[Outcome]]) -> None:
    found = {outcome.check: outcome.figures for outcome in faulty[1]}
    processes = [found[name]["process"] for name in ("fine", "after a lost GPU", "after a hang")]
    assert len(set(processes)) == 3


def test_nothing_is_left_running(faulty: tuple[Path, list[Outcome]]) -> None:
    for file in faulty[0].glob("**/child.pid"):
        pid = int(file.read_text())
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_part_whose_packages_are_absent_is_skipped(tmp_path: Path) -> None:
    options = process.Options("cpu", True, tmp_path, None)
    (outcome,) = process.run_part(replace(FAULTY, needs=("torch", "no_such_package")), options, 20, lambda _: None)
    assert outcome.status == "skipped"
    assert "no_such_package" in outcome.said
    assert "torch" not in outcome.said


def test_the_plan_is_as_long_as_it_is_promised() -> None:
    assert [part.name for part in PARTS] == list(MODULES)
    assert [part.limit_s for part in PARTS] == [15, 90, 170, 30, 75, None]
    assert len(CHECKS) == sum(len(module.CHECKS) for module in MODULES.values())


def test_one_command_runs_it_and_writes_every_figure(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = command("--dry", "--only", "machine", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(out.read_text())
    figures = {outcome["check"]: outcome["figures"] for outcome in written["outcomes"]}
    assert figures["versions"]["torch"] == torch.__version__
    assert figures["rates"]["bf16_tflops"] > 0
    assert "2 ok" in done.stdout
    assert "bf16_tflops" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_to_do() -> None:
    done = command()
    assert done.returncode == 2
    assert "--dry" in done.stderr


def test_arguments_that_cannot_be_are_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--dry", "--out", str(tmp_path / "none/x.json")]) == 2
    assert __main__.main(["--dry", "--out", str(tmp_path / "x.json"), "--data", "none.parquet"]) == 2
    told = capsys.readouterr().err
    assert "--out" in told
    assert "none.parquet" in told


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("part", "check"),
    [
        ("right", "pretrain, pixels"),
        ("right", "official numbers"),
        ("right", "non-finite step"),
        ("fast", predictions.EAGER),
        ("fast", predictions.COMPILED),
        ("fast", predictions.PROFILED),
        ("fast", "predictions"),
        ("fast", "ViT-B, DALL-E"),
        ("loading", "loader"),
    ],
)
def test_a_check_answers_on_a_cpu(part: str, check: str, context: Context) -> None:
    outcome = attempt(part, CHECKS[part, check], context)
    assert outcome.status == "ok", outcome
    assert outcome.figures
    json.dumps(outcome.figures)


def test_another_first_step_is_seen(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    build, built = BUILDERS["pretrain"], []

    def other(workspace: Any, hardware: Any) -> Any:
        training = build(workspace, hardware)
        built.append(training)
        if len(built) == 2:  # the device's, after the CPU's
            with torch.no_grad():
                for parameter in training.module.parameters():
                    parameter.mul_(1.01)
        return training

    monkeypatch.setitem(BUILDERS, "pretrain", other)
    outcome = attempt("right", CHECKS["right", "pretrain, d-VAE"], context)
    assert outcome.status == "missed"
    assert "loss: first step differs" in outcome.said


def test_noise_on_another_device_is_drawn_on_the_cpu() -> None:
    def state_after(device: str) -> torch.Tensor:
        torch.manual_seed(0)
        with NoiseFromCpu():
            drawn = torch.empty(3, 2, device=device).exponential_()
            more = torch.rand(5, device=device)
        assert {drawn.device.type, more.device.type} == {device}
        return torch.get_rng_state()

    assert torch.equal(state_after("meta"), state_after("cpu"))


def test_busy_time_counts_no_moment_twice() -> None:
    assert fast.busy_share([(0, 4), (1, 2), (3, 6), (8, 10)]) == pytest.approx(0.8)


def test_a_step_that_does_not_fit_is_tried_with_half_the_images(context: Context) -> None:
    tried = []

    def build(setting: Setting) -> Any:
        tried.append(setting.batch_size)
        if setting.batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: None

    figures, _ = fast.measure(context, fast.setting_of(context, "vit_base"), build)
    assert tried == [2, 1]
    assert figures["batch_size"] == 1


@pytest.mark.parametrize(
    ("kernel", "category"),
    [
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NTN", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "LayerNorm"),
        ("GammaBetaBackwardCUDAKernelTemplate", "LayerNorm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl", "GELU"),
        (
            "multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor",
            "optimizer and clipping",
        ),
        ("void (anonymous namespace)::softmax_warp_forward", "cross-entropy"),
        ("void at::native::elementwise_kernel<direct_copy_kernel_cuda>", predictions.REST),
    ],
)
def test_a_kernel_belongs_to_one_line_of_the_predictions(kernel: str, category: str) -> None:
    assert predictions.category_of(kernel) == category


def test_every_prediction_is_measured_by_a_check() -> None:
    setting = Setting("vit_nano", 32, 16, 2, torch.device("cpu"), "bf16", compile=False)
    lines = predictions.predict(setting, predictions.H200)
    names = {name for part, name in CHECKS if part == "fast"}
    assert {line.check for line in lines} <= names
    assert all(line.value >= 0 for line in lines)


def test_the_count_of_the_vit_b_step_is_the_known_arithmetic() -> None:
    setting = Setting("vit_base", 224, 16, 1, torch.device("cpu"), "bf16", compile=False)
    count = predictions.count_step(setting)
    # 55.1 GMAC an image with tokens given (`cae-pipe plan`), two operations each.
    assert sum(count.flop.values()) / 1e9 == pytest.approx(2 * 55.1, rel=0.03)


def test_verdicts() -> None:
    line = Prediction("step", 100.0, "images/s", "eager", "images_per_s")
    gaps = Prediction("gaps", 0.0, "", "eager", "gaps")
    found = [Outcome("fast", "eager", "ok", figures={"images_per_s": 60.0, "gaps": 0.03})]
    assert [row["verdict"] for row in held_against([line, gaps], found)] == ["refuted", "confirmed"]
    assert line.verdict(124.0) == "confirmed"
    assert held_against([line], [])[0]["verdict"] == "not yet measured"
    assert missed_above(0.1, {"a": 0.05, "b": 0.2, "c": float("nan")}, "is")[0].startswith("b: is 2.00e-01")
    assert len(missed_above(0.1, {"a": 0.05, "b": 0.2, "c": float("nan")}, "is")) == 2


def test_a_long_reason_keeps_its_ends() -> None:
    assert shortened("one\ntwo") == "one\ntwo"
    assert shortened("\n".join("abcdefgh")) == "a\nb\n[...]\nf\ng\nh"


def wheel(folder: Path, name: str, tag: str = "py3-none-any") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "VALUE = 3\n")
        info = f"{name}-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_only_missing_packages_come_from_the_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    wheel(tmp_path / "wheels", "a_package_of_this_test")
    wheel(tmp_path / "wheels", "numpy")
    assert wheels.add(tmp_path / "wheels", tmp_path / "there") == ["a-package-of-this-test"]
    assert not (tmp_path / "there/numpy.py").exists()
    assert os.environ["PYTHONPATH"] == f"{tmp_path / 'there'}{os.pathsep}elsewhere"
    code = "import a_package_of_this_test as it; print(it.VALUE)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


def test_wheels_of_another_python_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make gpu-wheels"):
        wheels.add(tmp_path, tmp_path / "there")
    wheel(tmp_path, "a_package_of_this_test", "cp27-cp27m-manylinux1_i686")
    with pytest.raises(ValueError, match="pip cannot unpack"):
        wheels.add(tmp_path, tmp_path / "there")


# What the code does otherwise on a GPU, and the table of docs/gpu.md.

BRANCH = re.compile(
    r'\.type [!=]= "(cuda|cpu)"|device_type [!=]= |[!=]= "cuda"|torch\.cuda\.|on_cuda\b|[!=]= _CUDA\b|_CUDA not in'
    r"|has_nvidia_device\("
)


def branches() -> set[str]:
    """Each function of the product that asks which device it is on, as `file`, `function`."""
    found = set()
    for package in ("cae", "pipeline", "serving"):
        for path in sorted((ROOT / package).rglob("*.py")):
            lines = path.read_text().splitlines()
            spans = list(functions(ast.parse("\n".join(lines)), ""))
            for number, line in enumerate(lines, 1):
                if BRANCH.search(line):
                    names = [name for name, first, last in spans if first <= number <= last]
                    found.add(f"`{path.relative_to(ROOT)}` `{names[-1]}`")
    return found


def functions(tree: ast.AST, prefix: str) -> Any:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield f"{prefix}{node.name}", node.lineno, node.end_lineno
            yield from functions(node, f"{prefix}{node.name}.")


def test_every_branch_of_a_gpu_is_in_the_table() -> None:
    rows = re.findall(r"^\| (`[^|]+` `[^|]+`) \|", (ROOT / "docs/gpu.md").read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == branches()
