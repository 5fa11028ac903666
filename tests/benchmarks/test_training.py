"""The training benchmark compares like with like, and tells what it measured."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks.training import alone, bench, contenders, loading
from benchmarks.training.contenders import Batch
from benchmarks.training.ours import OurStep
from benchmarks.training.plain import PlainCae, PlainStep
from benchmarks.training.setting import Setting
from cae.errors import UserError
from cae.official import from_official


def small(precision: str = "fp32") -> Setting:
    """A real size, for the contenders' processes know no other, on four patches."""
    return Setting.checked(
        model="vit_small", image_size=32, patch_size=16, batch_size=2, device="cpu", precision=precision, compile=False
    )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr("benchmarks.training.setting.ENCODER_SIZES", {"vit_small": (2, 32, 4)})
    return Setting.checked(
        model="vit_small", image_size=32, patch_size=8, batch_size=2, device="cpu", precision="fp32", compile=False
    )


def test_the_plain_step_computes_what_ours_does(tiny: Setting) -> None:
    batch = Batch.draw(tiny)
    torch.manual_seed(0)
    plain = PlainCae(
        (4, 4), 8, width=32, depth=2, num_heads=4, predictor_depth=4, vocab_size=8192, layer_scale=0.1, drop_path=0.0
    )
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    ours = OurStep(tiny, batch.tokens)
    imported = from_official(state, Path("plain.pth"), 4, 4).model
    ours.model.load_state_dict(imported.state_dict())
    ours.model.eval()
    visible, masked = batch.masks(0.5)
    fed = {"images": batch.images, "visible": visible, "masked": masked}
    loss, _ = ours.objective(fed, 0)
    expected = PlainStep(plain, 2.0, 3.0, 1e-3, 0.05).loss(batch.normalized, batch.bool_mask(0.5), batch.tokens)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
def test_every_contender_is_measured_and_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.training.contest.TURN_S", 0.0)
    monkeypatch.setattr("benchmarks.training.contest.MATMUL_SIZE", {"cpu": 64})
    out = tmp_path / "bench.json"
    setting = small("bf16")
    bench.run(setting, 2, None, ["step", "memory"], out)
    written = json.loads(out.read_text())
    assert set(written["images_per_s"]) == {"cae", "plain", "beit", "mae"}
    assert written["ratio"]["cae"] == 1
    speeds = written["images_per_s"]
    assert written["ratio"]["plain"] == pytest.approx(speeds["cae"] / speeds["plain"])
    assert written["precision_of"] == {"cae": "bf16", "plain": "fp32", "beit": "bf16", "mae": "bf16"}
    assert {len(times) for times in written["step_s"].values()} == {2}
    assert all(value > 0 for value in written["gflop_per_image"].values())
    parameters = sum(parameter.numel() for parameter in OurStep(setting, torch.zeros(1, 4)).model.parameters())
    # Weights, gradients and two moments, four bytes each.
    assert written["peak_memory_bytes"]["cae"] > 16 * parameters
    shown = capsys.readouterr().out
    assert all(meaning in shown for meaning in contenders.MEANINGS.values())


def test_without_transformers_the_peers_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    left_out = contenders.left_out(("cae", "plain", "beit", "mae"))
    assert set(left_out) == {"beit", "mae"}
    assert "transformers" in left_out["beit"]


@pytest.mark.parametrize("name", ["freed memory kept", "attention in bf16 that is not torch's fused one"])
def test_a_change_can_be_undone(name: str) -> None:
    with alone.started(name, small("bf16"), 1) as contender:
        assert contender.seconds_per_step(1) > 0


def test_a_contender_that_dies_is_told_with_its_last_words() -> None:
    said = "(?s)the process of nobody ended with 1.*last words: .*KeyError: 'nobody'"
    with pytest.raises(UserError, match=said), alone.started("nobody", small(), 1):
        pass
    with alone.started("cae", small(), 1) as contender:
        contender.process.kill()
        contender.process.wait()
        with pytest.raises(UserError, match="the process of cae ended with -9"):
            contender.seconds_per_step(1)


def test_the_loader_reads_real_jpegs(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "NUM_IMAGES", 4)
    figures = loading.measure(tiny)
    assert figures["loader_alone_images_per_s"] > 0
    assert 0 <= figures["data_wait_fraction"] < 1
    assert all(milliseconds > 0 for milliseconds in figures["one_core_ms_per_image"].values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_size": 100, "patch_size": 16}, "nearest is 96"),
        ({"image_size": 16}, "at least 32"),
        ({"device": "cuda"}, "cuda is not available"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    changes: dict[str, object], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {"model": "vit_small", "image_size": 224, "patch_size": 16, "batch_size": 1, "device": "cpu"}
    with pytest.raises(UserError, match=says):
        Setting.checked(**{**given, "precision": "fp32", "compile": False, **changes})  # type: ignore[arg-type]


def test_a_missing_folder_is_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--out"):
        bench.run(small(), 1, None, ["step"], tmp_path / "none" / "x.json")
