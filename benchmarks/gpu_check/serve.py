"""Part 5: the exported encoder on the device, bare and behind the server."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import fixtures, load, processes, raw_session
from benchmarks.gpu_check import workspaces
from benchmarks.gpu_check.parts import Check, Context, Figures, Result, Skip
from benchmarks.training.loading import write_shards
from pipeline.batches import first_images
from pipeline.export import export
from pipeline.gate import Cosines, Verdict, missed
from pipeline.variants import FILES
from pipeline.workspace import Workspace
from serving.bundle import Bundle
from serving.ort import onnxruntime
from serving.preprocess import PILLOW_MAX_PIXELS, Preprocessing, decode, prepare

BATCH_SIZES = NUM_CLIENTS = (1, 8, 32)
MEASURE_S, WARM_UP_S, DRY_S = 2.0, 0.5, 0.3
NUM_TRAIN, NUM_VAL = 32, 32
CUDA = "CUDAExecutionProvider"
PRECISIONS = {"float32": "encoder.onnx", "float16": FILES["float16"]}


def exported(context: Context) -> Result:
    """A ViT-S at random as a bundle: its parity with torch, and float16's gate as a CPU sees it."""
    workspace = _workspace(context)
    bundle = context.folder / "bundle"
    parity, verdicts = export(workspace, workspace.pretrained, bundle, {}, ("float16",))
    context.kept["bundle"], context.kept["workspace"] = bundle, workspace
    verdict = verdicts["float16"]
    figures = {**parity._asdict(), "float16_least_cosine": _least(verdict), "largest_value": verdict.largest_value}
    return Result(figures, [f"float16: {words}" for words in verdict.missed])


def _workspace(context: Context) -> Workspace:
    """Prepared photographs, and an encoder with its decoder at random."""
    if context.dry:
        workspace = workspaces.tiny(context.folder / "workspace", None)
    else:
        values: dict[str, Any] = {
            "prepare.channels": 3,
            "model.name": "vit_small",
            "model.image_size": 224,
            "model.patch_size": 16,
            "tokenizer.kind": "pixels",
            "export.num_parity_images": 4,
            "export.num_examples": 1,
            "export.gate.num_val_images": NUM_VAL,
        }
        workspace = workspaces.make(context.folder / "workspace", values)
        workspace.prepared.mkdir(parents=True)
        write_shards(workspace.prepared, NUM_TRAIN, NUM_VAL)
    workspaces.put_target(workspace)
    workspaces.put_weights(workspace)
    return workspace


def provider(context: Context) -> Result:
    """Which provider of ONNX Runtime really runs the encoder, as the server finds out."""
    available = onnxruntime.get_available_providers()
    figures = {"onnxruntime": onnxruntime.__version__, "available": ", ".join(available)}
    if context.device.type == "cuda" and CUDA not in available:
        raise Skip(
            f"this onnxruntime {onnxruntime.__version__} is built without CUDA; onnxruntime-gpu is not installed"
        )
    opened = Bundle.open(_bundle(context), precision="auto")
    context.kept["provider"] = opened.provider
    figures |= {"used": opened.provider, "precision": opened.precision}
    wrong = context.device.type == "cuda" and not opened.on_cuda
    return Result(figures, ["CUDA is there and onnxruntime does not use it (its log says why)"] if wrong else [])


def gates(context: Context) -> Result:
    """Float32 and float16 on the device beside float32 on a CPU, held against `export.gate`."""
    bundle, workspace = _bundle(context), context.kept["workspace"]
    images = first_images(workspace, "val", workspace.preprocessing(), NUM_VAL).numpy()
    outputs = ["patches", "class_token", "pooled"]
    reference = dict(zip(outputs, _session(bundle, "float32").run(outputs, {"images": images}), strict=True))
    figures: Figures = {"provider": _provider(context)}
    said = []
    for precision in _precisions(bundle):
        values = _session(bundle, precision, _provider(context)).run(outputs, {"images": images})
        got = dict(zip(outputs, values, strict=True))
        cosines = Cosines()
        cosines.add(reference, got)
        verdict = Verdict(cosines.summary())
        figures[f"{precision}_max_abs_diff"] = float(max(np.abs(got[name] - reference[name]).max() for name in outputs))
        figures[f"{precision}_least_cosine"] = _least(verdict)
        said += [f"{precision}: {words}" for words in missed(verdict, workspace.params.export.gate)]
    return Result(figures, said)


def sessions(context: Context) -> Result:
    """Images a second of the bare session, decoded images in, by batch size and precision."""
    bundle, name = _bundle(context), _provider(context)
    image = _image(bundle)
    rows = []
    # On a CPU float16 is computed in float32, and says nothing.
    for precision in _precisions(bundle) if name == CUDA else ["float32"]:
        session = _session(bundle, precision, name)
        for batch_size in BATCH_SIZES:
            figures = raw_session.measure(session, image, batch_size, context.size(MEASURE_S / 2, DRY_S))
            rows.append({"precision": precision, "batch_size": batch_size, **figures})
    return Result({"provider": name, "sessions": rows})


def server(context: Context) -> Result:
    """Images a second of the server over HTTP, JPEGs in, by the number of clients."""
    bundle = _bundle(context)
    request, log = context.folder / "request.http", context.folder / "server.log"
    request.write_bytes(load.request("/embed", fixtures.jpeg(), "image/jpeg", "application/x-npy"))
    name = _provider(context)
    rows: list[Figures] = []
    for precision in ("float32", "auto") if name == CUDA else ("float32",):
        settings = {"CAE_SERVING_PRECISION": precision, "CAE_SERVING_LOG_LEVEL": "warning"}
        arguments = ["--bundle", str(bundle), "--port", "{port}", "--device", "cuda" if name == CUDA else "cpu"]
        with processes.server("serving", arguments, "/health/ready", request, log, settings) as running:
            for clients in NUM_CLIENTS:
                figures = processes.load(running, clients, WARM_UP_S, context.size(MEASURE_S, DRY_S))
                rows.append({"precision": precision, "clients": clients, **figures})
    refused = sum(row["num_failed"] for row in rows)
    return Result({"provider": name, "server": rows}, [f"{refused:.0f} requests failed"] if refused else [])


def _bundle(context: Context) -> Path:
    if "bundle" not in context.kept:
        raise Skip("there is no bundle: the export before it failed")
    bundle: Path = context.kept["bundle"]
    return bundle


def _precisions(bundle: Path) -> list[str]:
    """Those that the bundle has: a variant that missed its gate is not in it."""
    return [name for name, file in PRECISIONS.items() if (bundle / file).is_file()]


def _provider(context: Context) -> str:
    found: str = context.kept.get("provider", raw_session.CPU)
    return found


def _session(bundle: Path, precision: str, name: str = raw_session.CPU) -> onnxruntime.InferenceSession:
    return raw_session.open_session(str(bundle / PRECISIONS[precision]), name)


def _image(bundle: Path) -> Any:
    preprocessing = Preprocessing.model_validate(json.loads((bundle / "bundle.json").read_text())["preprocessing"])
    return prepare(decode(fixtures.jpeg(), max_pixels=PILLOW_MAX_PIXELS), preprocessing)


def _least(verdict: Verdict) -> float:
    return min(values["min"] for values in verdict.cosine.values())


CHECKS = (
    Check("export and its gates", exported),
    Check("provider", provider),
    Check("gates on the device", gates),
    Check("bare session", sessions),
    Check("server over HTTP", server),
)
