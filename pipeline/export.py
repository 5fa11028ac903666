"""Stage `export`: the bundle that the server reads, checked against torch before it is published."""

import json
import logging
import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from cae.config import ExportConfig
from cae.data.shards import file_sha256
from cae.errors import UserError
from cae.targets.files import AnyTarget
from cae.train.device import set_reproducible
from cae.weights import Trained, load_trained
from pipeline import variants
from pipeline.batches import first_images, fits_prepared
from pipeline.checkpoints import find_target, preprocessing_of
from pipeline.examples import write_examples
from pipeline.gate import Variant, Verdict
from pipeline.graphs import EncoderGraph, ReconstructorGraph, SkipReconstructorGraph
from pipeline.model_card import model_card
from pipeline.workspace import Workspace, published
from serving.masks import random_mask
from serving.ort import onnxruntime

logger = logging.getLogger(__name__)

BUNDLE_FILES = re.compile(
    r"bundle\.json|MODEL_CARD\.md|encoder(\.int8|\.fp16)?\.onnx|(skip_)?reconstructor\.onnx|example_\d+\.png"
)
# An extra output of the graphs under test; the published files do not have it.
LOGITS = "prediction"


class Graph(NamedTuple):
    """One file of the bundle: the module, what it is traced and compared with, names, dynamic axes of the inputs.

    `predicts_tokens` is set where the decoder's output is an argmax away from tokens.
    """

    file: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    input_axes: dict[str, dict[int, str]]
    outputs: tuple[str, ...]
    examples: tuple[Tensor, ...]
    predicts_tokens: bool


class Parity(NamedTuple):
    """How far torch and ONNX Runtime are apart; without tokens nothing can disagree, and the agreement is 1."""

    max_abs_diff: float
    token_agreement: float


class Exported(NamedTuple):
    """How well an exported bundle agrees with torch, and the verdict on each variant that was tried."""

    parity: Parity
    verdicts: dict[Variant, Verdict]


def run(workspace: Workspace, int8: bool = False, fp16: bool = False) -> None:
    """Stage `export`: `models/bundle` from the pretrained weights, with its quality metrics.

    `int8` and `fp16` ask for these variants of the encoder also where the parameters do not.
    """
    metrics = {
        stage: values
        for stage in ("tokenizer", "pretrain", "finetune", "probe_linear", "probe_attentive", "probe_knn")
        if (values := workspace.read_metrics(stage))
    }
    started = time.perf_counter()
    wanted = variants.wanted(workspace.params.export, int8, fp16)
    parity, verdicts = export(workspace, workspace.pretrained, workspace.bundle, metrics, wanted)
    quality = parity._asdict()
    for variant, verdict in verdicts.items():
        quality |= verdict.figures(variant)
    workspace.write_metrics("export", quality, {"wall_s": time.perf_counter() - started})


def export(
    workspace: Workspace, weights: Path, out: Path, metrics: dict[str, Any], wanted: Sequence[Variant]
) -> Exported:
    """Write a bundle from trained weights, a file or a folder; raise UserError, and publish nothing, without parity.

    Parity is checked on prepared validation images, or on noise where none of the right kind are at hand. The wanted
    variants of the encoder are put in where they pass their gate; without such images that is a UserError.
    """
    check_replaceable(out)
    set_reproducible(workspace.params.seed)
    config = workspace.params.export
    trained = load_trained(weights)
    variants.check_testable(workspace, trained, wanted)
    target = find_target(workspace, weights, trained)
    images = parity_images(workspace, trained)
    with published(out) as folder:
        parities = [_write(graph, folder, config) for graph in graphs(trained, target, images, workspace.params.seed)]
        differences, agreements = zip(*parities, strict=True)
        # Unlike Python's max, NumPy's does not lose a NaN.
        parity = Parity(float(np.max(differences)), float(np.min(agreements)))
        check_parity(parity, config)
        exported = Exported(parity, variants.add(workspace, trained, wanted, folder))
        examples = write_examples(workspace, trained, folder)
        bundle = describe(workspace, trained, target, folder, metrics, exported, examples)
        (folder / "bundle.json").write_text(json.dumps(bundle, indent=2) + "\n")
        (folder / "MODEL_CARD.md").write_text(model_card(bundle))
    return exported


def check_replaceable(out: Path) -> None:
    """Raise UserError where `out` holds anything but a bundle, which a new one replaces."""
    if not out.exists():
        return
    found = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    strange = sorted(name for name in found if not BUNDLE_FILES.fullmatch(name))
    if found and ("bundle.json" not in found or strange):
        held = ", ".join(strange[:3]) or "no bundle.json"
        raise UserError(f"{out}: holds {held} and would be replaced; give a new or an empty folder, or a bundle's")


def check_new(out: Path) -> None:
    """Raise UserError where `out` is anything but a new or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; give a new folder, or remove this one first")


def parity_images(workspace: Workspace, trained: Trained) -> Tensor:
    """Images to compare torch and ONNX Runtime on, uint8 [b, c, h, w]: prepared ones, else noise from the seed."""
    count = workspace.params.export.num_parity_images
    if fits_prepared(workspace, trained):
        return first_images(workspace, "val", preprocessing_of(trained), count)
    logger.info("no prepared images that fit the model; parity is checked on noise")
    size = (count, trained.architecture.channels, *trained.architecture.size_px)
    noise = np.random.default_rng(workspace.params.seed).integers(0, 256, size, dtype=np.uint8)
    return torch.from_numpy(noise)


def graphs(trained: Trained, target: AnyTarget | None, images: Tensor, seed: int) -> list[Graph]:
    """The graphs of a bundle, with `images` and masks as inputs; the encoder's alone where there is no target."""
    # An axis that is 1 in the example would be fixed at 1 for good, so the trace has 2 of everything.
    pair = images[:1].repeat(2, 1, 1, 1)
    batch = {"images": {0: "batch"}}
    encoder = EncoderGraph(trained.encoder, trained.normalization)
    embedding = Graph("encoder.onnx", encoder, (images,), batch, encoder.outputs, (pair,), False)
    if trained.cae is None or target is None:
        return [embedding]
    num_patches = trained.architecture.num_patches
    masks = [random_mask(num_patches, trained.origin["mask_ratio"], seed + i) for i in range(len(images))]
    visible, masked = (torch.from_numpy(np.stack([mask[part] for mask in masks])) for part in (0, 1))
    example_visible, example_masked = (
        torch.from_numpy(part)[None].repeat(2, 1) for part in random_mask(num_patches, 0.5, seed)
    )
    tokens = target.predicts_tokens
    index = {"visible": {0: "batch", 1: "num_visible"}, "masked": {0: "batch", 1: "num_masked"}}
    return [
        embedding,
        Graph(
            "reconstructor.onnx",
            ReconstructorGraph(trained.cae, trained.normalization, target),
            (images, visible, masked),
            batch | index,
            ("reconstruction", LOGITS),
            (pair, example_visible, example_masked),
            tokens,
        ),
        Graph(
            "skip_reconstructor.onnx",
            SkipReconstructorGraph(trained.cae, trained.normalization, target),
            (images,),
            batch,
            ("reconstruction", LOGITS),
            (pair,),
            tokens,
        ),
    ]


def to_onnx(graph: Graph, opset: int) -> onnx.ModelProto:
    """The graph as ONNX, without anything that tells where or when it was made."""
    # One object a name, so that the same axis of two inputs is known to be the same.
    dims = {name: torch.export.Dim(name) for axes in graph.input_axes.values() for name in axes.values()}
    with warnings.catch_warnings():
        # The inputs share their batch axis on purpose, and the exporter warns of every such axis.
        warnings.filterwarnings("ignore", message="# The axis name")
        program = torch.onnx.export(
            graph.module.eval(),
            graph.examples,
            input_names=list(graph.input_axes),
            output_names=list(graph.outputs),
            opset_version=opset,
            dynamo=True,
            dynamic_shapes=tuple(
                {axis: dims[name] for axis, name in axes.items()} for axes in graph.input_axes.values()
            ),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    # Source paths of this machine and names of Python objects are no part of a model.
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for holder in (model, model.graph, *model.graph.value_info, *model.graph.input, *model.graph.output):
        holder.ClearField("metadata_props")
        holder.ClearField("doc_string")
    for initializer in model.graph.initializer:
        initializer.ClearField("metadata_props")
    onnx.checker.check_model(model)
    return model


def _write(graph: Graph, folder: Path, config: ExportConfig) -> Parity:
    model = to_onnx(graph, config.opset)
    parity = compare(graph, model)
    logger.info("%s: largest difference %.1e, tokens agree %.4f", graph.file, *parity)
    kept = [output for output in model.graph.output if output.name != LOGITS]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    (folder / graph.file).write_bytes(model.SerializeToString(deterministic=True))
    return parity


@torch.inference_mode()
def compare(graph: Graph, model: onnx.ModelProto) -> Parity:
    """Torch against ONNX Runtime on the graph's inputs, features and logits; a picture may differ by one token."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {name: tensor.numpy() for name, tensor in zip(graph.input_axes, graph.inputs, strict=True)}
    theirs = dict(zip(graph.outputs, session.run(list(graph.outputs), feed), strict=True))
    ours = dict(zip(graph.outputs, graph.module(*graph.inputs), strict=True))
    compared = [name for name in graph.outputs if name != "reconstruction"]
    difference = float(np.max([np.abs(theirs[name] - ours[name].numpy()).max() for name in compared]))
    agreement = 1.0
    if graph.predicts_tokens:
        agreement = float((theirs[LOGITS].argmax(-1) == ours[LOGITS].argmax(-1).numpy()).mean())
    return Parity(difference, agreement)


def check_parity(parity: Parity, config: ExportConfig) -> None:
    """Raise UserError where torch and ONNX Runtime are further apart than `config` allows."""
    if not (parity.max_abs_diff <= config.max_abs_diff and parity.token_agreement >= config.min_token_agreement):
        raise UserError(
            f"export: torch and ONNX Runtime differ by {parity.max_abs_diff:.1e} (export.max_abs_diff allows "
            f"{config.max_abs_diff}) and agree on {parity.token_agreement:.4f} of the tokens "
            f"(export.min_token_agreement asks {config.min_token_agreement}). Try another export.opset, or report this"
        )


def describe(
    workspace: Workspace,
    trained: Trained,
    target: AnyTarget | None,
    folder: Path,
    metrics: dict[str, Any],
    exported: Exported,
    examples: list[str],
) -> dict[str, Any]:
    """bundle.json: all that a server has to know about the files beside it."""
    architecture, origin = trained.architecture, trained.origin
    files = sorted(path for path in folder.iterdir() if path.suffix in (".onnx", ".png"))
    reconstructs = target is not None
    return {
        "format": 1,
        "model": {
            "name": origin["name"],
            "width": architecture.width,
            "num_heads": architecture.num_heads,
            "patch_size": architecture.patch_size,
            "grid": list(architecture.grid),
            "target": target.kind if target else None,
        },
        "preprocessing": preprocessing_of(trained).model_dump(),
        "normalization": trained.normalization._asdict(),
        "opset": workspace.params.export.opset,
        "dtype": "float32",
        "files": {path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for path in files},
        "capabilities": {"embed": True, "reconstruct": reconstructs, "skip_reconstruct": reconstructs},
        "outputs": EncoderGraph(trained.encoder, trained.normalization).outputs,
        "default_mask_ratio": origin.get("mask_ratio"),
        "variants": {
            variant: {"file": variants.FILES[variant], "cosine": verdict.cosine, **verdict.accuracies}
            for variant, verdict in exported.verdicts.items()
            if not verdict.missed
        },
        "examples": examples,
        "origin": origin,
        "metrics": {**metrics, "export": exported.parity._asdict()},
    }
