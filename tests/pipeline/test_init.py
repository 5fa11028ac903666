"""`cae-pipe init`: what it finds, what it chooses, and what it will not write over."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from cae.config import load_params
from cae.data.sources import Folder, Reject
from cae.errors import UserError
from pipeline import choice, estimate, init, params_file
from pipeline.inspection import Findings, inspect
from tests.mixed_images import write_mixed_folder
from tests.pipeline.test_parameters import keys_of
from tests.tiny import ROOT, TINY, shipped_params, with_values, write_digits, write_params

DIGITS = Findings(
    num_images=5000,
    num_train=4000,
    num_val=1000,
    has_split=False,
    class_counts={"0": 2500, "1": 2500},
    num_strays=0,
    num_sampled=2000,
    sizes_px=np.full((2000, 2), 28),
    formats={"PNG": 2000},
    channels=1,
    broken=[],
    decode_s=0.001,
)
PHOTOS = replace(DIGITS, num_train=50_000, sizes_px=np.full((2000, 2), 480), channels=3, formats={"JPEG": 2000})
FEW = replace(DIGITS, num_train=10, num_val=3, class_counts={})


def values(findings: Findings, *, gpu: bool = False) -> dict[str, Any]:
    return {c.key: c.value for c in choice.choose(findings, "folder:x", gpu=gpu, num_cores=4)}


def test_inspection_counts_what_is_in_the_folder(tmp_path: Path) -> None:
    mixed = write_mixed_folder(tmp_path)
    findings = inspect(Folder(tmp_path), 0.2)
    assert findings.num_images == findings.num_sampled == 300
    assert {reject.key: reject.reason for reject in findings.broken} == mixed.broken
    assert findings.num_strays == len(mixed.strays)
    assert findings.formats == {"PNG": 110, "TIFF": 60, "JPEG": 50, "WEBP": 40, "BMP": 20}
    sizes = {(pixels.shape[1], pixels.shape[0]) for pixels in mixed.good.values()}
    assert {tuple(size) for size in findings.sizes_px.tolist()} == sizes
    assert findings.class_counts == {str(digit): 30 for digit in range(10)}
    assert not findings.grey
    assert abs(findings.num_train - 0.8 * 280) <= 2


def test_broken_files_that_were_named_do_not_stop_the_run_unless_they_are_most() -> None:
    reject = Reject("x.png", "truncated", "cut off")

    def chosen(num_broken: int) -> list[float]:
        return [c.value for c in choice.tolerance(replace(DIGITS, num_sampled=300, broken=[reject] * num_broken), 0.05)]

    assert chosen(10) == []
    assert chosen(20) == [0.1]
    assert chosen(20)[0] > 20 / 300
    assert chosen(151) == []


def test_a_large_source_is_sampled_and_counted_in_full(tmp_path: Path) -> None:
    write_digits(tmp_path)
    findings = inspect(Folder(tmp_path), 0.2, most=30)
    assert (findings.num_images, findings.num_sampled, len(findings.sizes_px) + len(findings.broken)) == (161, 30, 30)
    assert sum(findings.class_counts.values()) == 161
    again = inspect(Folder(tmp_path), 0.2, most=30)
    assert np.array_equal(again.sizes_px, findings.sizes_px)
    assert findings.grey


def test_digits_get_about_what_ships() -> None:
    chosen, shipped = values(DIGITS), shipped_params()
    for key in ("model.image_size", "model.patch_size", "model.name", "model.eval_crop", "tokenizer.vocab_size"):
        assert with_values(shipped, {key: chosen[key]}) == shipped, key
    for key in (
        "pretrain.flip",
        "pretrain.crop_scale",
        "pretrain.batch_size",
        "probe.linear.lr",
        "finetune.batch_size",
    ):
        assert with_values(shipped, {key: chosen[key]}) == shipped, key


def test_photographs_are_mirrored_cropped_and_get_a_larger_model_on_a_gpu() -> None:
    chosen = values(PHOTOS, gpu=True)
    assert (chosen["model.image_size"], chosen["model.patch_size"]) == (224, 16)
    assert (chosen["model.name"], chosen["model.eval_crop"]) == ("vit_tiny", 0.875)
    assert {chosen[f"{section}.flip"] for section in choice.CROPPED} == {0.5}
    assert chosen["prepare.short_side_px"] >= 224 / 0.3**0.5
    assert chosen["runtime.num_workers"] == 4
    assert values(PHOTOS)["model.image_size"] == 64


@pytest.mark.parametrize("num_train", [2, 3, 10, 57, 224, 4000])
def test_no_batch_is_larger_than_the_training_data(num_train: int) -> None:
    chosen = values(replace(FEW, num_train=num_train))
    sizes = [chosen[f"{section}.batch_size"] for section in choice.BATCHES]
    assert all(2 <= size <= num_train for size in sizes)
    assert chosen["probe.linear.lr"] == pytest.approx(0.1 * chosen["probe.linear.batch_size"] / 256)


@pytest.mark.parametrize("side", [8, 9, 17, 20, 28, 32, 33, 47, 48, 63, 100, 159, 160, 224, 5000])
@pytest.mark.parametrize("gpu", [True, False])
def test_any_size_of_images_gives_valid_parameters(side: int, gpu: bool, tmp_path: Path) -> None:
    findings = replace(PHOTOS, sizes_px=np.full((5, 2), side))
    choices = choice.choose(findings, "folder:x", gpu=gpu, num_cores=4)
    batches = {c.key.split(".")[0]: c.value for c in choices if c.key.count(".") == 1 and c.key.endswith("batch_size")}
    choices += choice.lengths(
        findings.num_train, batches, 0.1, {"tokenizer": 6, "pretrain": 12, "finetune": 4}, gpu=gpu
    )
    text = params_file.text_of(init.with_choices(ROOT / "params.yaml", choices))
    params_file.write(tmp_path / "params.yaml", text)
    assert len(text.splitlines()) == len((ROOT / "params.yaml").read_text().splitlines())
    params = load_params(tmp_path / "params.yaml")
    assert params.model.num_patches >= 16
    assert params.model.num_patches <= 256


def test_small_data_is_seen_more_often_as_far_as_time_allows() -> None:
    batches = {"tokenizer": 32, "pretrain": 32, "finetune": 32}
    shipped = {"tokenizer": 6, "pretrain": 12, "finetune": 4}

    def epochs(num_train: int, step_s: float) -> int:
        chosen = {c.key: c.value for c in choice.lengths(num_train, batches, step_s, shipped, gpu=False)}
        assert chosen["pretrain.warmup_epochs"] < chosen["pretrain.epochs"]
        return chosen["pretrain.epochs"]

    assert epochs(320, 0.1) * 10 >= choice.PRETRAIN_STEPS
    assert epochs(320, 10.0) * 10 * 10.0 <= choice.CPU_PRETRAIN_S
    assert epochs(100_000, 0.001) == 12


def test_too_little_to_train_on_is_said() -> None:
    with pytest.raises(UserError, match="1 usable training and 1 validation images"):
        values(replace(FEW, num_train=1, num_val=1))


def workspace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Git checkout with the shipped params.yaml, tiny so that its steps are quick; the current folder."""
    monkeypatch.chdir(folder)
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    for command in (
        ["init", "-q"],
        ["add", "params.yaml"],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m"],
    ):
        subprocess.run(["git", *command], check=True)
    return folder / "params.yaml"


def test_init_writes_parameters_that_keep_every_comment_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = workspace(tmp_path, monkeypatch).read_text()
    write_digits(tmp_path / "digits")
    init.run("digits", Path("params.yaml"), force=False)
    after = (tmp_path / "params.yaml").read_text()
    comments = [[line.partition("#")[2] for line in text.splitlines()] for text in (before, after)]
    assert comments[0] == comments[1]
    params = load_params(tmp_path / "params.yaml")
    assert params.prepare.source == "folder:digits"
    assert params.model.image_size == 28
    assert params.pretrain.batch_size <= 128
    assert keys_of(YAML(typ="safe", pure=True).load(after)) == keys_of(shipped_params())
    shown = capsys.readouterr().out
    for word in ("161 files", "4 classes", "1 truncated", "0/broken.png", "pretrain.epochs", "min", "MB"):
        assert word in shown, word


def test_without_labels_init_says_what_will_be_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace(tmp_path, monkeypatch)
    (tmp_path / "flat").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"flat/{number}.png")
    init.run("folder:flat", tmp_path / "mine.yaml", force=False)
    assert "No labels: the probes and fine-tuning will be skipped" in capsys.readouterr().out
    assert load_params(tmp_path / "mine.yaml").model.image_size == 16


def test_changes_of_ones_own_are_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = workspace(tmp_path, monkeypatch)
    init.check_free(path, force=False)
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(UserError, match=r"params\.yaml: differs from the committed one.* --out, or give --force"):
        init.run("digits", Path("params.yaml"), force=False)
    init.check_free(path, force=True)
    (tmp_path / "other.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"other\.yaml"):
        init.check_free(tmp_path / "other.yaml", force=False)
    init.check_free(tmp_path / "new.yaml", force=False)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("photos", "folder:photos"),
        ("saved", "hf:saved"),
        ("list.csv", "csv:list.csv"),
        ("rows.parquet", "parquet:rows.parquet"),
        ("mnist5k", "mnist5k"),
        ("hf:user/name", "hf:user/name"),
        ("wds:{0..3}.tar", "wds:{0..3}.tar"),
    ],
)
def test_a_path_is_given_its_kind(tmp_path: Path, given: str, url: str) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "saved").mkdir()
    for name in ("saved/dataset_dict.json", "list.csv", "rows.parquet", "one.jpg"):
        (tmp_path / name).touch()
    assert init.source_url(given, tmp_path) == url


def test_a_path_without_a_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.jpg").touch()
    with pytest.raises(UserError, match=r"one\.jpg is one file"):
        init.source_url("one.jpg", tmp_path)
    with pytest.raises(UserError, match="nowhere is no file or folder"):
        init.source_url("nowhere", tmp_path)


def test_the_estimate_grows_with_the_work(tmp_path: Path) -> None:
    write_params(tmp_path, with_values(shipped_params(), TINY))
    params = load_params(tmp_path / "params.yaml")
    steps = estimate.time_steps(params, 1, 4)
    assert 0 < steps.pretrain_s < 10
    storing = estimate.Storing(bytes=1000.0, load_s=0.001)
    once = estimate.stage_seconds(params, DIGITS, steps, storing)
    twice = estimate.stage_seconds(params, replace(DIGITS, num_train=8000), steps, storing)
    assert twice["pretrain"] == pytest.approx(2 * once["pretrain"])
    assert "finetune" in once
    assert "finetune" not in estimate.stage_seconds(params, FEW, steps, storing)
    assert estimate.disk_bytes(DIGITS, steps, storing) > 2 * 5000 * 1000
