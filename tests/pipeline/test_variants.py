"""Encoders of other precisions and example images: what gets into a bundle, and what is kept out of it."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from cae.data.shards import ImageShards
from cae.errors import UserError
from cae.weights import load_trained
from pipeline import export, gate, prepare
from pipeline.batches import first_images, spread_over_classes
from pipeline.variants import to_int8
from pipeline.workspace import Workspace
from serving.bundle import Bundle
from tests.pipeline.command import cae_pipe
from tests.pipeline.conftest import MakeWorkspace
from tests.pipeline.test_parameters import on_finished
from tests.tiny import with_values

BOTH = {"export.int8": True, "export.fp16": True}


@pytest.fixture(scope="module")
def varied(
    tmp_path_factory: pytest.TempPathFactory,
    finished: Workspace,
    tiny_params: dict[str, Any],
    make_workspace: MakeWorkspace,
) -> Workspace:
    """The finished workspace, its bundle exported again with both variants."""
    raw = with_values(tiny_params, BOTH)
    workspace = on_finished(tmp_path_factory.mktemp("varied"), finished, raw, make_workspace)
    export.run(workspace)
    return workspace


def described(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "bundle.json").read_text())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_variants_that_pass_are_in_the_bundle_with_their_figures(varied: Workspace) -> None:
    info = Bundle.open(varied.bundle, "cpu").info
    assert {name: variant.file for name, variant in info.variants.items()} == {
        "int8": "encoder.int8.onnx",
        "float16": "encoder.fp16.onnx",
    }
    metrics = varied.read_metrics("export") or {}
    for name, variant in info.variants.items():
        assert set(variant.cosine) == set(info.outputs)
        assert metrics[f"{name}_in_bundle"] is True
        assert metrics[f"{name}_pooled_mean_cosine"] == variant.cosine["pooled"].mean
        assert metrics[f"{name}_patches_min_cosine"] == variant.cosine["patches"].min
        assert metrics[f"{name}_knn_top1"] == variant.knn_top1
        assert metrics[f"{name}_linear_top1_change"] == variant.linear_top1_change
        assert f"| {variant.file} | cosine of pooled |" in (varied.bundle / "MODEL_CARD.md").read_text()
    assert info.variants["int8"].cosine["class_token"].min < 1
    assert names(varied.bundle) == {*info.files, "bundle.json", "MODEL_CARD.md"}


@pytest.mark.parametrize("precision", ["int8", "float16"])
def test_a_variant_gives_the_cosines_that_the_bundle_says(varied: Workspace, precision: Any) -> None:
    images = first_images(varied, "val", varied.preprocessing(), 40).numpy()
    plain = Bundle.open(varied.bundle, "cpu").embed(images)
    variant = Bundle.open(varied.bundle, "cpu", precision=precision)
    for name, values in variant.embed(images).items():
        assert values.dtype == np.float32
        cosine = (plain[name] * values).sum(-1) / np.linalg.norm(plain[name], axis=-1) / np.linalg.norm(values, axis=-1)
        assert cosine.mean() == pytest.approx(variant.info.variants[precision].cosine[name].mean, abs=2e-4)
        # Or the plain encoder would pass, too.
        assert (values != plain[name]).any()


def test_int8_has_a_scale_for_each_output_channel_of_every_constant_product(varied: Workspace) -> None:
    plain, graph = (onnx.load(varied.bundle / f"encoder{infix}.onnx").graph for infix in ("", ".int8"))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    weights = {tensor.name for tensor in plain.initializer}
    assert len(products) == sum(node.op_type == "MatMul" and node.input[1] in weights for node in plain.node) > 0
    for product in products:
        weight = constants[product.input[1]]
        assert weight.dtype == np.int8
        assert constants[product.input[1].replace("_quantized", "_scale")].shape == (weight.shape[1],)


def test_float16_takes_bytes_and_gives_float32(varied: Workspace) -> None:
    graph = onnx.load(varied.bundle / "encoder.fp16.onnx").graph
    assert [value.type.tensor_type.elem_type for value in graph.input] == [TensorProto.UINT8]
    assert {value.type.tensor_type.elem_type for value in graph.output} == {TensorProto.FLOAT}
    assert sum(tensor.data_type == TensorProto.FLOAT16 for tensor in graph.initializer) > 10


def test_the_command_writes_the_same_bytes_in_another_process(
    tmp_path: Path, varied: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    workspace = on_finished(tmp_path / "again", varied, tiny_params, make_workspace)
    (workspace.bundle / "bundle.json").write_text("{}")
    done = cae_pipe("export", "--int8", "--fp16", cwd=workspace.root)
    assert done.returncode == 0, done.stderr
    for path in varied.bundle.iterdir():
        assert (workspace.bundle / path.name).read_bytes() == path.read_bytes(), path.name
    assert names(workspace.bundle) == names(varied.bundle)
    assert workspace.read_metrics("export") == varied.read_metrics("export")


def test_a_variant_below_a_threshold_stays_out_and_the_rest_is_exported(
    tmp_path: Path,
    finished: Workspace,
    tiny_params: dict[str, Any],
    make_workspace: MakeWorkspace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    raw = with_values(tiny_params, {"export.int8": True, "export.gate.min_worst_cosine": 1.0})
    workspace = on_finished(tmp_path, finished, raw, make_workspace)
    with caplog.at_level(logging.WARNING):
        export.run(workspace)
    (warning,) = [record.getMessage() for record in caplog.records if "encoder.int8.onnx" in record.getMessage()]
    assert re.search(r"least cosine of class_token 0\.\d{4} ", warning)
    assert "export.gate.min_worst_cosine asks 1.0" in warning
    assert described(workspace.bundle)["variants"] == {}
    assert names(workspace.bundle) == names(finished.bundle)
    metrics = workspace.read_metrics("export") or {}
    assert metrics["int8_in_bundle"] is False
    assert 0 < metrics["int8_class_token_min_cosine"] < 1


def test_a_damaged_encoder_misses_cosines_and_accuracies(tmp_path: Path, varied: Workspace) -> None:
    model = onnx.load(varied.bundle / "encoder.onnx")
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.ndim >= 2 and values.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(rng.normal(0, 1, values.shape).astype(np.float32), tensor.name))
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(to_int8(model).SerializeToString())
    trained = load_trained(varied.pretrained)
    verdict = gate.judge(varied, trained, varied.bundle / "encoder.onnx", {"int8": damaged})["int8"]
    assert verdict.cosine["pooled"]["mean"] < 0.5
    assert verdict.knn_top1_change is not None
    assert verdict.knn_top1_change < -0.05
    said = "; ".join(verdict.missed)
    assert "mean cosine of pooled" in said
    assert "top-1 of the kNN -0." in said


def test_a_drop_of_either_probe_is_weighed_against_its_threshold(varied: Workspace) -> None:
    config = varied.params.export.gate.model_copy(update={"max_top1_drop": 0.02})
    for change, num_missed in ((0.1, 0), (-0.019, 0), (-0.021, 1), (float("nan"), 1)):
        for probe in ("knn_top1_change", "linear_top1_change"):
            assert len(gate.missed(gate.Verdict({}, **{probe: change}), config)) == num_missed


def test_what_is_no_number_agrees_with_nothing() -> None:
    cosines = gate.Cosines()
    cosines.add({"pooled": np.ones((2, 3))}, {"pooled": np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])})
    assert cosines.summary() == {"pooled": {"mean": 0.5, "min": 0.0}}


def test_a_value_that_float16_cannot_hold_is_found_inside_the_encoder(varied: Workspace) -> None:
    constants = [numpy_helper.from_array(np.float32(scale), name) for name, scale in (("up", 1e4), ("down", 1e-4))]
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "up"], ["large"]),
        helper.make_node("Mul", ["large", "down"], ["pooled"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", 1, 2, 2])
    pooled = helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["B", 1, 2, 2])
    graph = helper.make_graph(nodes, "large inside", [images], [pooled], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    pixels = np.array([[[[1, 2], [3, 4]]], [[[50, 6], [7, 8]]]], dtype=np.uint8)
    assert gate.largest_value(model, pixels) == pytest.approx(5e5)
    verdict = gate.Verdict({}, largest_value=5e5)
    assert "a value of 500000 inside the encoder" in "".join(gate.missed(verdict, varied.params.export.gate))


def test_without_labels_the_cosines_alone_decide(
    tmp_path: Path, finished: Workspace, digits: Path, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(digits.glob("[0-3]/[0-9]*.png"))):
        (flat / f"{number}.png").write_bytes(path.read_bytes())
    workspace = make_workspace(tmp_path / "root", with_values(tiny_params, {"prepare.source": f"folder:{flat}"}))
    prepare.run(workspace)
    out = tmp_path / "bundle"
    export.export(workspace, finished.pretrained, out, {}, ["int8"])
    variant = described(out)["variants"]["int8"]
    assert variant["cosine"]["pooled"]["mean"] > 0.99
    assert {variant[name] for name in ("knn_top1", "knn_top1_change", "linear_top1", "linear_top1_change")} == {None}
    assert len(described(out)["examples"]) == 3


def test_a_variant_that_cannot_be_tried_is_refused_before_any_work(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    bare = make_workspace(tmp_path / "bare", tiny_params)
    with pytest.raises(UserError, match="int8 and float16 must pass a gate on real images"):
        export.export(bare, finished.pretrained, tmp_path / "bundle", {}, ["int8", "float16"])
    assert not (tmp_path / "bundle").exists()
    export.export(bare, finished.pretrained, tmp_path / "bundle", {}, [])
    assert described(tmp_path / "bundle")["variants"] == {}
    assert described(tmp_path / "bundle")["examples"] == []


def test_variants_belong_to_the_onnx_format(finished: Workspace, tmp_path: Path) -> None:
    done = cae_pipe("export", "--int8", "--format", "timm", "--out", str(tmp_path / "timm"), cwd=finished.root)
    assert done.returncode == 2
    assert "--int8, --fp16: only --format onnx has these variants" in done.stderr


# Example images


def test_examples_are_validation_images_of_as_many_classes_sealed_with_the_bundle(finished: Workspace) -> None:
    info = Bundle.open(finished.bundle, "cpu").info
    assert info.examples == ("example_0.png", "example_1.png", "example_2.png")
    assert set(info.examples) < set(info.files)
    shards = ImageShards(finished.prepared, "val")
    positions = spread_over_classes(shards, 3)
    assert len({shards.label(position) for position in positions}) == 3
    for name, position in zip(info.examples, positions, strict=True):
        with Image.open(finished.bundle / name) as image:
            assert np.array_equal(np.asarray(image), np.asarray(shards.image(position)))
    assert "contains 3 validation images" in (finished.bundle / "MODEL_CARD.md").read_text()


def test_no_examples_where_none_are_wanted(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    raw = with_values(tiny_params, {"export.num_examples": 0})
    workspace = on_finished(tmp_path, finished, raw, make_workspace)
    export.run(workspace)
    assert names(workspace.bundle) == names(finished.bundle) - {f"example_{number}.png" for number in range(3)}
    assert described(workspace.bundle)["examples"] == []
    assert "validation images (" not in (workspace.bundle / "MODEL_CARD.md").read_text()
