"""Opening, verifying and running a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_bundle import (
    VARIANT_SCALE,
    expected_features,
    expected_reconstruction,
    expected_skip,
    variant_info,
    write_info,
    write_tiny_bundle,
)

from serving import bundle as bundle_module
from serving.bundle import Bundle, CapabilityError
from serving.bundle_info import OUTPUTS, BundleError
from serving.machine import available_cpus
from serving.masks import random_mask

Pixels = Callable[..., NDArray[np.uint8]]


@pytest.fixture(scope="module")
def opened(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, "cpu", num_threads=1)


@pytest.mark.parametrize("batch", [1, 3])
def test_features_equal_those_worked_out_in_numpy(opened: Bundle, batch: int, random_pixels: Pixels) -> None:
    images = random_pixels(batch, 3, 32, 32)
    features = opened.embed(images)
    expected = expected_features(images)
    assert set(features) == set(expected)
    for name, values in expected.items():
        got = features[name]
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, values, atol=1e-6)


def test_only_the_outputs_that_were_asked_for_are_returned(opened: Bundle, random_pixels: Pixels) -> None:
    features = opened.embed(random_pixels(1, 3, 32, 32), ["class_token", "pooled"])
    assert list(features) == ["class_token", "pooled"]
    assert features["class_token"].shape == (1, 3)


def test_reconstructions_follow_the_mask_of_each_image(opened: Bundle, random_pixels: Pixels) -> None:
    images = random_pixels(3, 3, 32, 32)
    parts = [random_mask(16, 0.75, seed) for seed in range(3)]
    visible, masked = (np.stack(indices) for indices in zip(*parts, strict=True))
    got = opened.reconstruct(images, visible, masked)
    np.testing.assert_allclose(got, expected_reconstruction(images, visible, masked), atol=1e-6)


def test_the_path_without_regressor_takes_the_whole_image(opened: Bundle, random_pixels: Pixels) -> None:
    images = random_pixels(2, 3, 32, 32)
    np.testing.assert_allclose(opened.skip_reconstruct(images), expected_skip(images), atol=1e-6)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((3, 32, 32), np.uint8),
        np.zeros((1, 3, 32, 31), np.uint8),
        np.zeros((1, 1, 32, 32), np.uint8),
        np.zeros((0, 3, 32, 32), np.uint8),
        np.zeros((1, 3, 32, 32), np.float32),
    ],
)
def test_images_of_another_shape_or_type_are_refused(opened: Bundle, images: NDArray[Any]) -> None:
    for call in (opened.embed, opened.skip_reconstruct):
        with pytest.raises(ValueError, match=r"expected uint8 \[B, 3, 32, 32\]"):
            call(images)


@pytest.mark.parametrize(
    ("visible", "problem"),
    [
        (np.array([[0, 16]]), "0 to 16"),
        (np.array([[-1, 0]]), "-1 to 0"),
        (np.array([0, 1]), "expected int64"),
        (np.array([[0], [1]]), "expected int64"),
        (np.zeros((1, 0), np.int64), "expected int64"),
        (np.array([[0.0]]), "expected int64"),
    ],
)
def test_impossible_patch_indices_are_refused(
    opened: Bundle, visible: NDArray[Any], problem: str, random_pixels: Pixels
) -> None:
    images = random_pixels(1, 3, 32, 32)
    with pytest.raises(ValueError, match=f"visible .*{problem}"):
        opened.reconstruct(images, visible, np.array([[2]]))
    with pytest.raises(ValueError, match=f"masked .*{problem}"):
        opened.reconstruct(images, np.array([[2]]), visible)


def test_the_provider_that_runs_and_the_threads_are_reported(opened: Bundle) -> None:
    assert (opened.provider, opened.num_threads) == ("CPUExecutionProvider", 1)


def test_an_encoder_alone_embeds_and_says_what_it_lacks(tmp_path: Path, random_pixels: Pixels) -> None:
    alone = Bundle.open(write_tiny_bundle(tmp_path, reconstructors=False), "cpu")
    images = random_pixels(1, 3, 32, 32)
    assert list(alone.embed(images)) == list(OUTPUTS)
    with pytest.raises(CapabilityError, match=r"no reconstructor\.onnx"):
        alone.reconstruct(images, np.array([[0]]), np.array([[1]]))
    with pytest.raises(CapabilityError, match=r"no skip_reconstructor\.onnx"):
        alone.skip_reconstruct(images)


def test_unknown_keys_of_a_later_exporter_are_kept(opened: Bundle) -> None:
    assert opened.info.model_dump()["note"] == "a key this version does not know"


# Refusals


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder, **{"device": "cpu"} | options)
    return str(caught.value)


def test_a_missing_folder_names_the_command_that_makes_one(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert "nowhere/bundle.json" in message
    assert "make repro" in message


@pytest.mark.parametrize("name", ["encoder.onnx", "reconstructor.onnx", "skip_reconstructor.onnx"])
def test_one_changed_byte_in_any_file_is_found(tmp_path: Path, name: str) -> None:
    folder = write_tiny_bundle(tmp_path)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    message = refusal(folder)
    assert f"/{name}: damaged" in message
    assert "bundle.json expects" in message


def test_a_missing_or_cut_off_file_is_named(tmp_path: Path) -> None:
    folder = write_tiny_bundle(tmp_path)
    encoder = folder / "encoder.onnx"
    encoder.write_bytes(encoder.read_bytes()[:-1])
    assert f"{encoder.stat().st_size} bytes" in refusal(folder)
    encoder.unlink()
    assert "encoder.onnx: cannot be read (No such file or directory)" in refusal(folder)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (["format"], 2, "format: Input should be 1"),
        (["model", "grid"], [4, 5], r"grid 4 x 5 of patches of 8 px covers (32, 40) px"),
        (["preprocessing", "resample"], "nearest", "preprocessing.resample"),
        (["preprocessing", "gamma"], 2.2, "preprocessing.gamma"),
        (["default_mask_ratio"], 1.0, "default_mask_ratio"),
        (["capabilities", "embed"], False, "capabilities.embed"),
    ],
)
def test_a_wrong_value_in_bundle_json_is_named_with_its_key(
    tmp_path: Path, path: list[str], value: object, expected: str
) -> None:
    folder = write_tiny_bundle(tmp_path)
    info = json.loads((folder / "bundle.json").read_text())
    section = info
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    write_info(folder, info)
    assert expected in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", "null", "\xff"])
def test_a_bundle_json_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    folder = write_tiny_bundle(tmp_path)
    (folder / "bundle.json").write_bytes(text.encode("latin-1"))
    assert "bundle.json" in refusal(folder)


def test_a_capability_without_its_file_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_bundle(tmp_path, reconstructors=False)
    info = json.loads((folder / "bundle.json").read_text())
    info["capabilities"]["reconstruct"] = True
    write_info(folder, info)
    assert "capabilities.reconstruct is true, but files has no reconstructor.onnx" in refusal(folder)


def test_files_outside_the_bundle_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_bundle(tmp_path / "bundle")
    info = json.loads((folder / "bundle.json").read_text())
    info["files"]["../encoder.onnx"] = info["files"]["encoder.onnx"]
    (folder / "bundle.json").write_text(json.dumps(info))
    assert "files.../encoder.onnx: expected the plain name" in refusal(folder)


def test_a_graph_with_other_names_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_bundle(tmp_path)
    (folder / "reconstructor.onnx").write_bytes((folder / "encoder.onnx").read_bytes())
    write_info(folder, json.loads((folder / "bundle.json").read_text()))
    message = refusal(folder)
    assert "reconstructor.onnx: the graph has inputs ['images']" in message
    assert "'visible'" in message


def test_a_sealed_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_bundle(tmp_path)
    (folder / "encoder.onnx").write_bytes(b"not a model")
    write_info(folder, json.loads((folder / "bundle.json").read_text()))
    assert "encoder.onnx: onnxruntime" in refusal(folder)


# Precision and examples


def class_token_scale(bundle: Bundle, images: NDArray[np.uint8]) -> float:
    """By how much the class token is that of float32: which of the tiny bundle's encoders runs."""
    ratio = bundle.embed(images, ["class_token"])["class_token"] / expected_features(images)["class_token"]
    return float(ratio.mean())


def test_float32_runs_unless_another_precision_is_asked_for(tmp_path: Path, random_pixels: Pixels) -> None:
    folder = write_tiny_bundle(tmp_path, variants=("int8", "float16"))
    images = random_pixels(2, 3, 32, 32)
    for options, precision in (({}, "float32"), ({"precision": "int8"}, "int8"), ({"precision": "float16"}, "float16")):
        opened = Bundle.open(folder, "cpu", **options)
        assert opened.precision == precision
        assert class_token_scale(opened, images) == pytest.approx(VARIANT_SCALE.get(precision, 1.0))
        assert opened.skip_reconstruct(images).shape == images.shape


@pytest.mark.parametrize(
    ("variants", "on_cpu", "on_cuda"),
    [
        ((), "float32", "float32"),
        (("int8",), "int8", "float32"),
        (("float16",), "float32", "float16"),
        (("int8", "float16"), "int8", "float16"),
    ],
)
def test_auto_takes_the_variant_made_for_the_device(
    tmp_path: Path, variants: tuple[str, ...], on_cpu: str, on_cuda: str
) -> None:
    opened = Bundle.open(write_tiny_bundle(tmp_path, variants=variants), "cpu", precision="auto")
    assert opened.precision == on_cpu
    assert opened.info.choose("auto", on_cuda=True) == on_cuda


def test_a_precision_that_the_bundle_lacks_is_refused_with_those_it_has(tmp_path: Path) -> None:
    message = refusal(write_tiny_bundle(tmp_path, variants=("int8",)), precision="float16")
    assert message.startswith("precision=float16: this bundle has float32, int8.")


def test_a_changed_variant_is_refused_though_float32_runs(tmp_path: Path) -> None:
    folder = write_tiny_bundle(tmp_path, variants=("int8",))
    with (folder / "encoder.int8.onnx").open("ab") as file:
        file.write(b"x")
    assert "encoder.int8.onnx: damaged" in refusal(folder)


def test_variants_and_examples_must_be_sealed(tmp_path: Path) -> None:
    folder = write_tiny_bundle(tmp_path)
    info = json.loads((folder / "bundle.json").read_text())
    write_info(folder, info | {"variants": {"int8": variant_info("int8")}})
    assert "variants.int8.file: files has no encoder.int8.onnx" in refusal(folder)
    write_info(folder, info | {"examples": ["example_0.png"]})
    assert "examples: files has no example_0.png" in refusal(folder)
    (folder / "example_0.png").write_bytes(b"pixels")
    write_info(folder, info | {"examples": ["example_0.png"]})
    assert Bundle.open(folder, "cpu").info.examples == ("example_0.png",)
    (folder / "example_0.png").write_bytes(b"others")
    assert "example_0.png: damaged" in refusal(folder)


# Device and threads


@pytest.mark.skipif(bundle_module.has_nvidia_device(), reason="needs a machine without an NVIDIA device")
class TestWithoutNvidiaDevice:
    def test_cuda_is_refused_with_the_reason(self, tiny_bundle: Path) -> None:
        message = refusal(tiny_bundle, device="cuda")
        assert message.startswith("device=cuda:")
        assert "device=cpu" in message

    def test_auto_takes_the_cpu_without_a_word(
        self, tiny_bundle: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        assert Bundle.open(tiny_bundle, "auto").provider == "CPUExecutionProvider"
        assert capfd.readouterr().err == ""
        assert not caplog.records


@pytest.mark.skipif(bundle_module.has_nvidia_device(), reason="needs CUDA to fail")
class TestWithADeviceOnWhichCudaFails:
    """The device file is there, the libraries are not: what a wrong driver or image looks like."""

    @pytest.fixture(autouse=True)
    def device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if "CUDAExecutionProvider" not in bundle_module.onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime is built without CUDA")
        monkeypatch.setattr(bundle_module, "has_nvidia_device", lambda: True)

    def test_cuda_is_refused(self, tiny_bundle: Path) -> None:
        assert "could not start CUDA" in refusal(tiny_bundle, device="cuda")

    def test_auto_falls_back_with_one_warning(self, tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert Bundle.open(tiny_bundle, "auto").provider == "CPUExecutionProvider"
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "device=auto runs on the CPU" in caplog.text

    def test_auto_precision_is_then_that_for_the_cpu(self, tmp_path: Path) -> None:
        folder = write_tiny_bundle(tmp_path, variants=("int8", "float16"))
        assert Bundle.open(folder, "auto", precision="auto").precision == "int8"


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "900000000 100000\n"}, None),
        ({}, None),
    ],
)
def test_threads_follow_the_quota_of_the_control_group(
    tmp_path: Path, files: dict[str, str], limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cpus(tmp_path) == (limit or 4)
