"""The gate of the encoder's variants: what they change on real images, held against `export.gate`."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cae.config import GateConfig, HeadConfig
from cae.data.shards import Split
from cae.train.device import Hardware, set_reproducible
from cae.weights import Trained
from pipeline.batches import Evaluation
from pipeline.checkpoints import preprocessing_of
from pipeline.frozen_features import (
    Features,
    cached_batches,
    class_token,
    head_scores,
    head_training,
    linear_probe,
    neighbor_scores,
    pooled,
)
from pipeline.workspace import Workspace
from serving.ort import onnxruntime

# int8 takes the range of its activations over a whole batch, so one odd image costs the others their precision. The
# gate must see mixed batches, and larger ones than a server makes on a CPU (8, unless it is told otherwise).
BATCH_SIZE = 16
# ONNX Runtime computes a float16 graph in float32 on a CPU, where nothing overflows; on a GPU it would, above 65504.
# Half of that, for other images may have larger values than these.
MAX_FLOAT16_VALUE = 65504 / 2
NUM_RANGE_IMAGES = 32
Array = NDArray[Any]
Variant = Literal["int8", "float16"]


@dataclass
class Verdict:
    """What a variant changes: the mean and the least cosine of each output to float32's, the least over all rows.

    A row is the vector of a patch, of an image, or of an attention head. Accuracies are fractions, and their change is
    towards float32; None without labels. `missed` says which thresholds it does not meet.
    """

    cosine: dict[str, dict[str, float]]
    knn_top1: float | None = None
    knn_top1_change: float | None = None
    linear_top1: float | None = None
    linear_top1_change: float | None = None
    largest_value: float | None = None
    missed: list[str] = field(default_factory=list)

    @property
    def accuracies(self) -> dict[str, float | None]:
        """The accuracies and their changes by name."""
        names = ("knn_top1", "knn_top1_change", "linear_top1", "linear_top1_change")
        return {name: getattr(self, name) for name in names}

    def figures(self, prefix: str) -> dict[str, Any]:
        """As flat metrics."""
        cosines = {
            f"{prefix}_{output}_{kind}_cosine": value
            for output, values in self.cosine.items()
            for kind, value in values.items()
        }
        others = {f"{prefix}_{name}": value for name, value in self.accuracies.items() if value is not None}
        if self.largest_value is not None:
            others[f"{prefix}_largest_value"] = self.largest_value
        return {f"{prefix}_in_bundle": not self.missed, **cosines, **others}


def judge(
    workspace: Workspace, trained: Trained, encoder: Path, variants: Mapping[Variant, Path]
) -> dict[Variant, Verdict]:
    """The verdict on each of `variants`, beside `encoder` in float32, on prepared images that fit the model."""
    config = workspace.params.export.gate
    names = list(variants)
    sessions = [_session(path) for path in (encoder, *variants.values())]
    cosines = [Cosines() for _ in names]
    queries = [_Collected() for _ in sessions]
    for images, labels in _batches(workspace, trained, "val", config.num_val_images):
        outputs = [_run(session, images) for session in sessions]
        for collected, values in zip(queries, outputs, strict=True):
            collected.add(values, labels)
        for cosine, values in zip(cosines, outputs[1:], strict=True):
            cosine.add(outputs[0], values)
    verdicts = {name: Verdict(cosine.summary()) for name, cosine in zip(names, cosines, strict=True)}
    if workspace.index.classes:
        banks = [_Collected() for _ in sessions]
        for images, labels in _batches(workspace, trained, "train", config.num_train_images):
            for session, collected in zip(sessions, banks, strict=True):
                collected.add(_run(session, images), labels)
        reference, *accuracies = [
            _accuracies(workspace, bank.features(), query.features())
            for bank, query in zip(banks, queries, strict=True)
        ]
        for verdict, (knn, linear) in zip(verdicts.values(), accuracies, strict=True):
            verdict.knn_top1, verdict.knn_top1_change = knn, _rounded(knn - reference[0])
            verdict.linear_top1, verdict.linear_top1_change = linear, _rounded(linear - reference[1])
    if "float16" in verdicts:
        images = np.concatenate([images for images, _ in _batches(workspace, trained, "val", NUM_RANGE_IMAGES)])
        verdicts["float16"].largest_value = largest_value(onnx.load(encoder), images)
    for verdict in verdicts.values():
        verdict.missed = missed(verdict, config)
    return verdicts


def missed(verdict: Verdict, config: GateConfig) -> list[str]:
    """Each figure that misses its threshold, with both."""
    said = []
    thresholds = {"mean": config.min_mean_cosine, "min": config.min_worst_cosine}
    words = {"mean": ("mean", "min_mean_cosine"), "min": ("least", "min_worst_cosine")}
    for output, values in verdict.cosine.items():
        for kind, threshold in thresholds.items():
            if not values[kind] >= threshold:
                word, key = words[kind]
                # Rounded down, so that it cannot read as the threshold.
                value = math.floor(values[kind] * 10_000) / 10_000
                said.append(f"{word} cosine of {output} {value:.4f} (export.gate.{key} asks {threshold})")
    for probe, change in (("kNN", verdict.knn_top1_change), ("linear probe", verdict.linear_top1_change)):
        if change is not None and not change >= -config.max_top1_drop:
            said.append(f"top-1 of the {probe} {change:+.4f} (export.gate.max_top1_drop allows {config.max_top1_drop})")
    if verdict.largest_value is not None and not verdict.largest_value <= MAX_FLOAT16_VALUE:
        said.append(
            f"a value of {verdict.largest_value:.0f} inside the encoder (float16 is trusted to {MAX_FLOAT16_VALUE:.0f})"
        )
    return said


class Cosines:
    """Cosines between the last axes of two models' outputs, over batches."""

    def __init__(self) -> None:
        self._sum: dict[str, float] = {}
        self._min: dict[str, float] = {}
        self._count: dict[str, int] = {}

    def add(self, reference: Mapping[str, Array], values: Mapping[str, Array]) -> None:
        """Count a batch of outputs by name, [b, ..., d]."""
        for name, expected in reference.items():
            a, b = expected.astype(np.float64), values[name].astype(np.float64)
            lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
            cosine = (a * b).sum(axis=-1) / np.maximum(lengths, np.finfo(np.float64).tiny)
            self._sum[name] = self._sum.get(name, 0.0) + float(cosine.sum())
            self._min[name] = min(self._min.get(name, 1.0), float(cosine.min()))
            self._count[name] = self._count.get(name, 0) + cosine.size

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean and minimum by output."""
        return {
            name: {"mean": _rounded(self._sum[name] / self._count[name]), "min": _rounded(self._min[name])}
            for name in self._sum
        }


class _Collected:
    """What the probes read of a model's outputs, over batches."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Array]] = {}

    def add(self, outputs: Mapping[str, Array], labels: Array) -> None:
        for name in ("pooled", "class_token"):
            if name in outputs:
                self._parts.setdefault(name, []).append(outputs[name])
        self._parts.setdefault("labels", []).append(labels)

    def features(self) -> Features:
        return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in self._parts.items()}


def largest_value(encoder: onnx.ModelProto, images: Array) -> float:
    """Largest absolute value of any float32 tensor inside the encoder, over the images."""
    model = onnx.shape_inference.infer_shapes(encoder)
    floats = [value.name for value in model.graph.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT]
    for name in floats:
        model.graph.node.append(helper.make_node("Abs", [name], [f"{name}/abs"]))
        model.graph.node.append(helper.make_node("ReduceMax", [f"{name}/abs"], [f"{name}/largest"], keepdims=0))
        model.graph.output.append(helper.make_tensor_value_info(f"{name}/largest", TensorProto.FLOAT, []))
    session = _session(model.SerializeToString())
    largest = [session.run([f"{name}/largest" for name in floats], {"images": image[None]}) for image in images]
    return _rounded(float(np.max(largest)))


def _accuracies(workspace: Workspace, bank: Features, queries: Features) -> tuple[float, float]:
    """Top-1 of kNN and of the linear probe, on the features and by the parameters of the stage `probe`."""
    seed, config = workspace.params.seed, workspace.params.probe
    num_classes = len(workspace.index.classes)
    has_class_token = "class_token" in bank
    neighbors = config.knn if has_class_token else config.knn.model_copy(update={"feature": "pooled"})
    knn = neighbor_scores(bank, queries, neighbors, num_classes)
    pool = class_token if has_class_token else pooled
    hardware = Hardware(torch.device("cpu"), bf16=False)
    linear = _fitting(config.linear, len(bank["labels"]))
    set_reproducible(seed)
    head, optimizer = linear_probe(pool(bank).shape[1], num_classes, linear)
    head_training(
        name="gate",
        head=head,
        optimizer=optimizer,
        config=linear,
        num_train=len(bank["labels"]),
        batches=lambda total_steps: cached_batches(bank, linear.batch_size, seed, total_steps),
        values=pool,
        hardware=hardware,
        seed=seed,
    ).run()
    return _rounded(knn.top1), _rounded(head_scores(head, pool(queries), queries["labels"], hardware).top1)


def _fitting(config: HeadConfig, num_train: int) -> HeadConfig:
    """The linear probe's parameters with a batch that so few images can fill, and the learning rate in proportion."""
    batch = min(config.batch_size, num_train)
    return config.model_copy(update={"batch_size": batch, "lr": config.lr * batch / config.batch_size})


def _batches(workspace: Workspace, trained: Trained, split: Split, count: int) -> Iterator[tuple[Array, Array]]:
    """At most `count` images of a split, uint8 [b, c, h, w], and their labels [b], drawn and mixed by the seed."""
    shards = workspace.shards(split)
    transform = Evaluation(preprocessing_of(trained))
    drawn = np.random.default_rng(workspace.params.seed).permutation(len(shards))[:count]
    for start in range(0, len(drawn), BATCH_SIZE):
        positions = [int(position) for position in drawn[start : start + BATCH_SIZE]]
        images = np.stack([transform(shards.image(position)) for position in positions])
        yield images, np.array([shards.label(position) for position in positions], dtype=np.int64)


def _session(model: Path | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, images: Array) -> dict[str, Array]:
    names = [output.name for output in session.get_outputs()]
    # What is no number agrees with nothing, and must not stop the probes.
    values = [np.nan_to_num(value, posinf=0, neginf=0) for value in session.run(names, {"images": images})]
    return dict(zip(names, values, strict=True))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
