"""A real bundle of a few kilobytes whose answers can be worked out in NumPy, for tests of whatever reads a bundle.

`write_tiny_bundle` makes the folder; `expected_features`, `expected_reconstruction` and `expected_skip` are the NumPy
twins of its three graphs. Patch features are the patch's mean colour in 0-1, so D is the number of channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

NUM_HEADS = 2
DEFAULT_MASK_RATIO = 0.5
VARIANT_FILES = {"int8": "encoder.int8.onnx", "float16": "encoder.fp16.onnx"}
VARIANT_SCALE = {"int8": 8.0, "float16": 16.0}


def write_tiny_bundle(
    folder: Path,
    *,
    channels: int = 3,
    size: tuple[int, int] = (32, 32),
    patch_size: int = 8,
    crop_fraction: float = 1.0,
    reconstructors: bool = True,
    variants: Sequence[str] = (),
    num_products: int = 0,
) -> Path:
    """Write the bundle into `folder` and return it. `size` is (height, width) in pixels.

    The class token of an encoder in `variants` ("int8", "float16") is VARIANT_SCALE times that of the plain one. So
    many products of 256 x 256 matrices for each image, of no effect, make the plain one as slow as a test needs it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape = (channels, *size)
    models = {"encoder.onnx": _encoder(shape, patch_size, num_products=num_products)}
    for variant in variants:
        models[VARIANT_FILES[variant]] = _encoder(shape, patch_size, token_scale=VARIANT_SCALE[variant])
    if reconstructors:
        models["reconstructor.onnx"] = _reconstructor(shape, patch_size)
        models["skip_reconstructor.onnx"] = _skip_reconstructor(shape)
    for name, model in models.items():
        onnx.checker.check_model(model)
        (folder / name).write_bytes(model.SerializeToString())
    info: dict[str, Any] = {
        "format": 1,
        "model": {
            "name": "tiny",
            "width": channels,
            "num_heads": NUM_HEADS,
            "patch_size": patch_size,
            "grid": [size[0] // patch_size, size[1] // patch_size],
            "target": "pixels",
        },
        "preprocessing": {
            "channels": channels,
            "height": size[0],
            "width": size[1],
            "crop_fraction": crop_fraction,
            "resample": "bicubic",
        },
        "opset": 20,
        "dtype": "float32",
        "files": {},
        "capabilities": {"embed": True, "reconstruct": reconstructors, "skip_reconstruct": reconstructors},
        "default_mask_ratio": DEFAULT_MASK_RATIO,
        "variants": {variant: variant_info(variant) for variant in variants},
        "params": {},
        "metrics": {},
        "note": "a key this version does not know",
    }
    write_info(folder, info)
    return folder


def variant_info(variant: str) -> dict[str, Any]:
    """What bundle.json says of a variant that passed its gate without labels."""
    accuracies = dict.fromkeys(("knn_top1", "knn_top1_change", "linear_top1", "linear_top1_change"))
    return {"file": VARIANT_FILES[variant], "cosine": {"pooled": {"mean": 1.0, "min": 1.0}}, **accuracies}


def write_info(folder: Path, info: dict[str, Any]) -> None:
    """Write `bundle.json`, its seals made anew from the graphs in the folder."""
    info["files"] = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in sorted(path for path in folder.iterdir() if path.suffix in (".onnx", ".png"))
    }
    (folder / "bundle.json").write_text(json.dumps(info))


def patch_means(images: NDArray[np.uint8], patch_size: int = 8) -> NDArray[np.float64]:
    """Mean colour of each patch in 0-1, [B, N, C], from uint8 [B, C, H, W]."""
    batch, channels, height, width = images.shape
    cells = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    means: NDArray[np.float64] = cells.mean(axis=(3, 5)).reshape(batch, channels, -1).transpose(0, 2, 1) / 255
    return means


def expected_features(images: NDArray[np.uint8], patch_size: int = 8) -> dict[str, NDArray[np.float64]]:
    """The four outputs of encoder.onnx for uint8 [B, C, H, W]."""
    patches = patch_means(images, patch_size)
    brightness = patches.mean(axis=2)[:, None] * np.arange(1, NUM_HEADS + 1)[None, :, None]
    weights = np.exp(brightness)
    return {
        "patches": patches,
        "class_token": patches.max(axis=1),
        "pooled": patches.mean(axis=1),
        "class_attention": weights / weights.sum(axis=2, keepdims=True),
    }


def expected_reconstruction(
    images: NDArray[np.uint8], visible: NDArray[np.int64], masked: NDArray[np.int64], patch_size: int = 8
) -> NDArray[np.float64]:
    """reconstructor.onnx: masked patches get the mean colour of the visible ones, visible patches its complement."""
    batch, channels, height, width = images.shape
    patches = patch_means(images, patch_size)
    values = np.empty_like(patches)
    for row in range(batch):
        colour = patches[row, visible[row]].mean(axis=0)
        values[row] = 1 - colour
        values[row, masked[row]] = colour
    grid = values.transpose(0, 2, 1).reshape(batch, channels, height // patch_size, width // patch_size)
    return grid.repeat(patch_size, axis=2).repeat(patch_size, axis=3)


def expected_skip(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """skip_reconstructor.onnx: the negative of the images."""
    return 1 - images / 255


class _Graph:
    """Collects nodes and constants; every `add` returns the name of its one result."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, value: Any, dtype: type = np.float32) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = output or f"value_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def images(self) -> str:
        """The images as float32 in 0-1."""
        return self.add("Div", self.add("Cast", "images", to=TensorProto.FLOAT), self.constant(255))

    def patches(self, shape: tuple[int, int, int], patch_size: int, output: str = "") -> str:
        channels, height, width = shape
        cells = [0, channels, height // patch_size, patch_size, width // patch_size, patch_size]
        split = self.add("Reshape", self.images(), self.constant(cells, np.int64))
        means = self.add("ReduceMean", split, self.constant([3, 5], np.int64), keepdims=0)
        flat = self.add("Reshape", means, self.constant([0, channels, -1], np.int64))
        return self.add("Transpose", flat, perm=[0, 2, 1], output=output)

    def labour(self, patches: str, num_products: int) -> str:
        """Zero, [B, 1, 1], after so many matrix products for each image that no optimizer can leave out."""
        axes = self.constant([1, 2], np.int64)
        square = self.add("Expand", self.add("ReduceMean", patches, axes), self.constant([1, 256, 256], np.int64))
        averaging = self.constant(np.full((256, 256), 1 / 256))
        for _ in range(num_products):
            square = self.add("MatMul", square, averaging)
        return self.add("Mul", self.add("ReduceMean", square, axes), self.constant(0))

    def model(self, inputs: dict[str, tuple[int, list[Any]]], outputs: dict[str, list[Any]]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self._nodes,
            "tiny",
            [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in outputs.items()],
            self._constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _encoder(
    shape: tuple[int, int, int], patch_size: int, *, token_scale: float = 1.0, num_products: int = 0
) -> onnx.ModelProto:
    graph = _Graph()
    patches = graph.patches(shape, patch_size, output="" if num_products else "patches")
    if num_products:
        patches = graph.add("Add", patches, graph.labour(patches, num_products), output="patches")
    token = graph.add("ReduceMax", patches, graph.constant([1], np.int64), keepdims=0)
    graph.add("Mul", token, graph.constant(token_scale), output="class_token")
    graph.add("ReduceMean", patches, graph.constant([1], np.int64), keepdims=0, output="pooled")
    brightness = graph.add("ReduceMean", patches, graph.constant([2], np.int64), keepdims=0)
    rows = graph.add("Unsqueeze", brightness, graph.constant([1], np.int64))
    heads = graph.add("Mul", rows, graph.constant(np.arange(1, NUM_HEADS + 1)[None, :, None]))
    graph.add("Softmax", heads, axis=2, output="class_attention")
    channels, num_patches = shape[0], (shape[1] // patch_size) * (shape[2] // patch_size)
    return graph.model(
        {"images": (TensorProto.UINT8, ["B", *shape])},
        {
            "patches": ["B", num_patches, channels],
            "class_token": ["B", channels],
            "pooled": ["B", channels],
            "class_attention": ["B", NUM_HEADS, num_patches],
        },
    )


def _reconstructor(shape: tuple[int, int, int], patch_size: int) -> onnx.ModelProto:
    graph = _Graph()
    channels, height, width = shape
    rows, columns = height // patch_size, width // patch_size
    patches = graph.patches(shape, patch_size)
    nothing = graph.add(
        "Mul", graph.add("ReduceMean", patches, graph.constant([2], np.int64), keepdims=0), graph.constant(0)
    )

    def marked(indices: str) -> str:
        """1 at the indices, 0 elsewhere, [B, N, 1]."""
        ones = graph.add(
            "Add", graph.add("Mul", graph.add("Cast", indices, to=1), graph.constant(0)), graph.constant(1)
        )
        scattered = graph.add("ScatterElements", nothing, indices, ones, axis=1)
        return graph.add("Unsqueeze", scattered, graph.constant([2], np.int64))

    seen, hidden = marked("visible"), marked("masked")
    axis = graph.constant([1], np.int64)
    total = graph.add("ReduceSum", graph.add("Mul", patches, seen), axis, keepdims=1)
    colour = graph.add("Div", total, graph.add("ReduceSum", seen, axis, keepdims=1))
    complement = graph.add("Sub", graph.constant(1), colour)
    values = graph.add("Where", graph.add("Cast", hidden, to=TensorProto.BOOL), colour, complement)
    turned = graph.add("Transpose", values, perm=[0, 2, 1])
    cells = graph.add("Reshape", turned, graph.constant([0, channels, rows, 1, columns, 1], np.int64))
    grown = graph.add("Expand", cells, graph.constant([1, channels, rows, patch_size, columns, patch_size], np.int64))
    graph.add("Reshape", grown, graph.constant([0, channels, height, width], np.int64), output="reconstruction")
    return graph.model(
        {
            "images": (TensorProto.UINT8, ["B", *shape]),
            "visible": (TensorProto.INT64, ["B", "V"]),
            "masked": (TensorProto.INT64, ["B", "M"]),
        },
        {"reconstruction": ["B", *shape]},
    )


def _skip_reconstructor(shape: tuple[int, int, int]) -> onnx.ModelProto:
    graph = _Graph()
    graph.add("Sub", graph.constant(1), graph.images(), output="reconstruction")
    return graph.model({"images": (TensorProto.UINT8, ["B", *shape])}, {"reconstruction": ["B", *shape]})
