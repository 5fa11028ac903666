"""The Python API gives what the server and the stages give, whatever the images come as."""

import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cae.errors import UserError
from cae.targets.files import load_target, save_target
from cae.targets.pixels import PixelArchitecture, PixelTarget
from pipeline.api import Model, load
from pipeline.batches import unit_range
from pipeline.inference import embed
from pipeline.workspace import Workspace
from serving.bundle import Bundle
from tests.pipeline.command import environment
from tests.pipeline.test_imports import import_timm
from tests.tiny import ROOT

POOLS = {"mean": "pooled", "class": "class_token", "patches": "patches"}


@pytest.fixture(scope="module")
def paths(digits: Path) -> list[Path]:
    return sorted(path for path in digits.rglob("*.png") if path.name != "broken.png")[::13]


@pytest.fixture(scope="module")
def bundle(finished: Workspace) -> Model:
    return load(finished.bundle, device="cpu")


@pytest.fixture(scope="module")
def weights(finished: Workspace) -> Model:
    return load(finished.pretrained, device="cpu", batch_size=4)


@pytest.mark.parametrize("pool", POOLS)
def test_bundle_weights_and_cae_pipe_embed_agree(
    finished: Workspace, bundle: Model, weights: Model, paths: list[Path], tmp_path: Path, pool: Any
) -> None:
    embed(Bundle.open(finished.bundle, "cpu"), paths, tmp_path / "out.npz", [POOLS[pool]], 32)
    expected = np.load(tmp_path / "out.npz")
    assert list(expected["path"]) == list(map(str, paths))
    np.testing.assert_array_equal(bundle.encode(paths, pool), expected[POOLS[pool]])
    np.testing.assert_allclose(weights.encode(paths, pool), expected[POOLS[pool]], atol=1e-4)


def test_batches_change_nothing_and_one_image_is_a_batch(finished: Workspace, paths: list[Path]) -> None:
    for source in (finished.bundle, finished.pretrained):
        whole, small = (load(source, device="cpu", batch_size=size) for size in (32, 5))
        assert len(paths) % 5
        for call in ("encode", "reconstruct"):
            np.testing.assert_allclose(getattr(whole, call)(paths), getattr(small, call)(paths), atol=1e-5)
        np.testing.assert_array_equal(whole.detokenize(whole.tokenize(paths)), small.detokenize(small.tokenize(paths)))
        np.testing.assert_allclose(whole.encode(paths[3]), whole.encode(paths)[3:4], atol=1e-5)


def test_paths_pillow_images_arrays_and_tensors_give_the_same(weights: Model, paths: list[Path]) -> None:
    expected = weights.encode(paths)
    pictures = [Image.open(path) for path in paths]
    arrays = np.stack([np.asarray(picture)[None] for picture in pictures])
    for images in (list(map(str, paths)), pictures, arrays, list(arrays), torch.from_numpy(arrays), tuple(paths)):
        np.testing.assert_array_equal(weights.encode(images), expected)
    np.testing.assert_array_equal(weights.encode(arrays[0]), weights.encode(paths[0]))


def test_arrays_of_another_size_are_prepared_as_the_file_would_be(weights: Model, tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "colours.png")
    expected = weights.encode(tmp_path / "colours.png")
    np.testing.assert_array_equal(weights.encode(colours.transpose(2, 0, 1)), expected)
    np.testing.assert_array_equal(weights.encode(torch.from_numpy(colours).permute(2, 0, 1)[None]), expected)


def test_a_pillow_image_is_turned_upright_like_its_file(weights: Model, paths: list[Path], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(paths[0]).save(tmp_path / "turned.png", exif=exif)
    turned = weights.encode(Image.open(tmp_path / "turned.png"))
    np.testing.assert_array_equal(turned, weights.encode(tmp_path / "turned.png"))
    assert np.abs(turned - weights.encode(paths[0])).max() > 1e-3


def test_results_are_tensors_where_they_are_wanted(finished: Workspace, bundle: Model, paths: list[Path]) -> None:
    model = load(finished.bundle, device="cpu", as_torch=True)
    features, tokens = model.encode(paths), model.tokenize(paths)
    assert isinstance(features, torch.Tensor)
    assert features.dtype == torch.float32
    np.testing.assert_array_equal(features.numpy(), bundle.encode(paths))
    assert tokens.dtype == torch.int64
    np.testing.assert_array_equal(model.detokenize(tokens).numpy(), bundle.detokenize(bundle.tokenize(paths)))


def test_reconstructions_are_the_servers(finished: Workspace, bundle: Model, weights: Model, paths: list[Path]) -> None:
    served = Bundle.open(finished.bundle, "cpu")
    pixels = np.stack([np.asarray(Image.open(path))[None] for path in paths])
    for share, seed in ((None, 0), (0.25, 7)):
        _, (visible, masked) = served.draw_mask("random", share, seed)
        expected = np.concatenate([served.reconstruct(one[None], visible[None], masked[None]) for one in pixels])
        drawn = bundle.random_mask(share, seed)
        assert list(np.flatnonzero(drawn)) == list(masked)
        for mask in (share, drawn, torch.from_numpy(drawn), np.stack([drawn] * len(paths))):
            np.testing.assert_allclose(bundle.reconstruct(paths, mask, seed=seed), expected, atol=1e-5)
        # One token that ties may flip between torch and ONNX Runtime.
        assert (np.abs(weights.reconstruct(paths, share, seed=seed) - expected).max(axis=(1, 2, 3)) < 1e-4).sum() >= 12


def test_every_image_of_a_call_gets_its_own_mask(weights: Model, paths: list[Path]) -> None:
    masks = np.stack([weights.random_mask(0.5, seed) for seed in range(len(paths))])
    together = weights.reconstruct(paths, masks)
    assert together.shape == (len(paths), 1, 28, 28)
    for position in (0, 4, len(paths) - 1):
        alone = weights.reconstruct(paths[position], masks[position])
        np.testing.assert_allclose(together[position : position + 1], alone, atol=1e-5)


def test_tokens_are_the_targets_and_become_pictures(
    finished: Workspace, bundle: Model, weights: Model, paths: list[Path]
) -> None:
    target = load_target(finished.target)
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path))[None] for path in paths]))
    with torch.inference_mode():
        codes = target.encode(target.view(unit_range(pixels)))
        pictures = target.decode(codes).clamp(0, 1).numpy()
    for model in (bundle, weights):
        tokens = model.tokenize(paths)
        assert tokens.dtype == np.int64
        np.testing.assert_array_equal(tokens, codes.reshape(-1, 4, 4).numpy())
        np.testing.assert_allclose(model.detokenize(tokens), pictures, atol=1e-5)


def test_pixel_targets_give_back_the_image(finished: Workspace, paths: list[Path], tmp_path: Path) -> None:
    target = PixelTarget(PixelArchitecture(channels=1, patch_size=7, grid=(4, 4), per_patch=False), [0.1], [0.3])
    save_target(tmp_path / "target.safetensors", target, {})
    model = load(finished.bundle, target=tmp_path, device="cpu")
    tokens = model.tokenize(paths)
    assert tokens.shape == (len(paths), 4, 4, 49)
    pixels = np.stack([np.asarray(Image.open(path))[None] for path in paths])
    np.testing.assert_allclose(model.detokenize(tokens), pixels / 255, atol=1e-6)
    with pytest.raises(UserError, match=r"tokens: int64 .*expected floats \[b, 4, 4, 49\]"):
        model.detokenize(np.zeros((1, 4, 4), np.int64))
    with pytest.raises(UserError, match=r"49 codes or values each; .*pretrain takes .* 16 codes or values each"):
        load(finished.pretrained, target=tmp_path, device="cpu")


def test_the_target_is_looked_for_beside_in_the_workspace_and_here(
    finished: Workspace, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(finished.pretrained, device="cpu").tokenize(paths)
    alone = tmp_path / "alone/cae.safetensors"
    alone.parent.mkdir()
    shutil.copy(finished.pretrained / "cae.safetensors", alone)
    with pytest.raises(UserError, match=r"nothing to reconstruct with: .*load\(\.\.\., target=FILE\)"):
        load(alone, device="cpu").reconstruct(paths)
    for missing in ("tokenize", "detokenize"):
        with pytest.raises(UserError, match=r"no target .*load\(\.\.\., target='models/tokenizer'\)"):
            getattr(load(alone, device="cpu"), missing)(paths)
    named = load(alone, target=finished.target.parent, device="cpu")
    np.testing.assert_array_equal(named.tokenize(paths), expected)
    monkeypatch.chdir(finished.root)
    np.testing.assert_array_equal(load(alone, device="cpu").tokenize(paths), expected)
    monkeypatch.chdir(tmp_path)
    shutil.copy(finished.target, alone.parent)
    np.testing.assert_array_equal(load(alone, device="cpu").tokenize(paths), expected)


def test_a_classifier_is_loaded_as_its_encoder(finished: Workspace, paths: list[Path]) -> None:
    model = load(finished.finetuned, device="cpu")
    assert model.encode(paths, "mean").shape == (len(paths), 32)
    with pytest.raises(UserError, match="an encoder without a decoder"):
        model.reconstruct(paths, 0.5)


def test_an_imported_timm_model_without_class_token_says_so(paths: list[Path], tmp_path: Path) -> None:
    folder = import_timm(tmp_path, class_token=False, global_pool="avg")
    for model in (load(folder, device="cpu"), load(f"timm:{tmp_path / 'timm'}", device="cpu")):
        assert model.encode(paths, "patches").shape == (len(paths), 16, 32)
        with pytest.raises(UserError, match="no class_token; it gives patches, pooled"):
            model.encode(paths, "class")


def test_a_timm_name_without_a_network_says_what_to_do(tmp_path: Path) -> None:
    code = "from pipeline.api import load; load('timm:vit_tiny_patch16_224')"
    # A port that nothing listens on, and no cache.
    away = dict.fromkeys(("HF_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY"), "http://127.0.0.1:9")
    variables = {**away, "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(**variables), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "UserError: vit_tiny_patch16_224: its pretrained weights could not be fetched" in done.stderr
    with pytest.raises(UserError, match=r"its nearest: .*vit_tiny_patch16_224"):
        load("timm:vit_tiny_patch16_22")


def test_what_cannot_be_loaded_is_named_with_what_can(finished: Workspace, digits: Path, tmp_path: Path) -> None:
    for source in (digits, tmp_path / "nothing", "vit_small_patch16_224"):
        with pytest.raises(UserError, match=f"{re.escape(str(source))}.*load takes a bundle, trained weights .*timm:"):
            load(source)
    (tmp_path / "bundle.json").write_text("{")
    with pytest.raises(UserError, match=r"bundle\.json: not JSON"):
        load(tmp_path)
    with pytest.raises(UserError, match="tokenizer: no such file; expected target weights"):
        load(finished.bundle, target=tmp_path / "tokenizer")
    with pytest.raises(UserError, match="device: 'tpu' is none of auto, cpu, cuda"):
        load(finished.bundle, device="tpu")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="batch_size: 0"):
        load(finished.bundle, batch_size=0)


def test_a_target_for_other_images_is_refused(finished: Workspace, tmp_path: Path) -> None:
    target = PixelTarget(
        PixelArchitecture(channels=3, patch_size=7, grid=(4, 4), per_patch=False), [0.1] * 3, [0.3] * 3
    )
    save_target(tmp_path / "target.safetensors", target, {})
    with pytest.raises(UserError, match=r"is for 3 x 28 x 28 px .*bundle takes 1 x 28 x 28 px"):
        load(finished.bundle, target=tmp_path, device="cpu")


def test_images_that_cannot_be_used_are_named(bundle: Model, paths: list[Path], digits: Path) -> None:
    good = np.zeros((1, 28, 28), np.uint8)
    cases: list[tuple[Any, str]] = [
        ([*paths, digits / "0/broken.png"], r"broken\.png: .*cut off"),
        (digits / "none.png", r"none\.png: cannot be read"),
        ([good, good.astype(np.float32)], r"images\[1\]: float32 \[1, 28, 28\]; expected a path, .*uint8"),
        ([good, np.zeros((40, 50, 3), np.uint8)], r"images\[1\]: uint8 \[40, 50, 3\]; expected .*\[channels, height"),
        ([good, np.zeros((5, 28, 28), np.uint8)], r"images\[1\]: the image has 5 channels, expected 1"),
        ([good, 3], r"images\[1\]: int; expected a path"),
        (np.zeros((28, 28), np.uint8), r"images: uint8 \[28, 28\]; expected a sequence"),
        (iter([good]), "images: list_iterator; .*list of what a generator gives"),
        ([], "there are none"),
    ]
    for images, message in cases:
        with pytest.raises(UserError, match=message):
            bundle.encode(images)
    with pytest.raises(UserError, match="pool: 'cls' is none of mean, class, patches"):
        bundle.encode(good, pool="cls")  # type: ignore[arg-type]


def test_masks_and_tokens_that_do_not_fit_are_refused(bundle: Model) -> None:
    images = np.zeros((2, 1, 28, 28), np.uint8)
    one, two = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    one[0, 0], two[1, :2] = True, True
    masks: list[tuple[Any, str]] = [
        (0.0, "0.0 is no share"),
        (1, "1 is no share"),
        (True, "True is no share"),
        (one.astype(int), r"int64 \[4, 4\]; expected a share .* bool \[4, 4\] or \[2, 4, 4\]"),
        (np.stack([one] * 3), r"bool \[3, 4, 4\]"),
        (np.stack([one, two]), "hides 1 to 2 patches; it must hide equally many"),
        (np.zeros((4, 4), bool), "hides 0 of 16"),
        (np.ones((4, 4), bool), "hides 16 of 16"),
    ]
    for mask, message in masks:
        with pytest.raises(UserError, match=message):
            bundle.reconstruct(images, mask)
    tokens: list[tuple[Any, str]] = [
        (np.zeros((1, 16), int), r"int64 \[1, 16\]; expected integers \[b, 4, 4\] from 0 to 15"),
        (np.zeros((1, 4, 4)), r"float64 \[1, 4, 4\]"),
        (np.full((1, 4, 4), 16), "from 16 to 16"),
        (np.full((1, 4, 4), -1), "from -1 to -1"),
    ]
    for codes, message in tokens:
        with pytest.raises(UserError, match=message):
            bundle.detokenize(codes)


def test_images_are_read_when_their_batch_comes(finished: Workspace, paths: list[Path]) -> None:
    class Reading(list[Path]):
        def __getitem__(self, position: Any) -> Any:
            seen.append(position)
            return super().__getitem__(position)

    seen: list[int] = []
    model = load(finished.bundle, device="cpu", batch_size=2)
    with pytest.raises(UserError, match=r"none\.png"):
        model.encode(Reading([*paths[:2], Path("none.png"), *paths[2:]]))
    assert seen == [0, 1, 2]


def test_progress_is_shown_where_it_is_asked_for(
    finished: Workspace, paths: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    for progress, shown in ((None, False), (False, False), (True, True)):
        load(finished.bundle, device="cpu", batch_size=4, progress=progress).encode(paths)
        assert (f"{len(paths)}/{len(paths)}" in capfd.readouterr().err) == shown


@pytest.mark.parametrize(("batch_size", "shown"), [(4, True), (32, False)])
def test_a_terminal_shows_progress_for_more_than_one_batch(
    finished: Workspace, paths: list[Path], batch_size: int, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    with os.fdopen(terminal, "rb", buffering=0) as screen, os.fdopen(stderr, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        load(finished.bundle, device="cpu", batch_size=batch_size).encode(paths)
        print("end", file=stream, flush=True)
        assert (f"{len(paths)}/{len(paths)}".encode() in screen.read(65536)) == shown


@pytest.mark.parametrize("document", ["README.md", "docs/python.md"])
def test_the_documented_code_runs(
    document: str, finished: Workspace, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").symlink_to(finished.root / "models")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "photos").mkdir()
    for number, path in enumerate(paths):
        shutil.copy(path, tmp_path / f"photos/{number}.png")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["features"].shape[1:] == (32,)
    assert names["completed"].shape == (len(names["features"]), 1, 28, 28)
    assert names["tokens"].shape[1:] == (4, 4)
    assert names["pictures"].shape[1:] == (1, 28, 28)
    if document == "docs/python.md":
        assert names["nearest"][0] == names["paths"][0]
        assert len(set(names["nearest"])) == 5
