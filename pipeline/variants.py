"""Encoders of other precisions: how they are made of encoder.onnx, and which of them get into the bundle."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16

from cae.config import ExportConfig
from cae.errors import UserError
from cae.weights import Trained
from pipeline import gate
from pipeline.batches import fits_prepared
from pipeline.gate import Variant
from pipeline.workspace import Workspace

logger = logging.getLogger(__name__)

FILES: dict[Variant, str] = {"int8": "encoder.int8.onnx", "float16": "encoder.fp16.onnx"}


def wanted(config: ExportConfig, int8: bool, fp16: bool) -> list[Variant]:
    """The variants that the parameters or the caller ask for."""
    asked: dict[Variant, bool] = {"int8": config.int8 or int8, "float16": config.fp16 or fp16}
    return [variant for variant, is_asked in asked.items() if is_asked]


def check_testable(workspace: Workspace, trained: Trained, wanted: Sequence[Variant]) -> None:
    """Raise UserError, before any work, where a variant is wanted and no images are there to try it on."""
    if wanted and not fits_prepared(workspace, trained):
        raise UserError(
            f"export: {' and '.join(wanted)} must pass a gate on real images, and there are no prepared images of "
            f"{trained.architecture.channels} channels. Prepare some (`cae-pipe init --images`, `dvc repro prepare`), "
            "or leave out export.int8, export.fp16, --int8 and --fp16"
        )


def add(workspace: Workspace, trained: Trained, wanted: Sequence[Variant], folder: Path) -> dict[Variant, gate.Verdict]:
    """Put the wanted variants that pass the gate beside the encoder in `folder`; return the verdict on each.

    One that fails leaves no file, and a warning says what it missed.
    """
    if not wanted:
        return {}
    encoder = onnx.load(folder / "encoder.onnx")
    paths = {}
    for variant in wanted:
        paths[variant] = folder / FILES[variant]
        paths[variant].write_bytes(MAKERS[variant](encoder).SerializeToString(deterministic=True))
    verdicts = gate.judge(workspace, trained, folder / "encoder.onnx", paths)
    for variant, verdict in verdicts.items():
        if verdict.missed:
            logger.warning("%s is not put into the bundle: %s", paths[variant].name, "; ".join(verdict.missed))
            paths[variant].unlink()
        else:
            logger.info("%s passed its gate", paths[variant].name)
    return verdicts


def to_int8(encoder: onnx.ModelProto) -> onnx.ModelProto:
    """Weights of the matrix products in 8 bits, signed, a scale for each output channel; activations in 8 bits too.

    Their range is taken anew in every run, over the whole batch: an answer depends a little on what else is in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        # It asks on the root logger for a preparation that changes nothing here: shapes are inferred all the same.
        logging.disable(logging.WARNING)
        try:
            quantize_dynamic(
                encoder,
                path,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load(path)


def to_float16(encoder: onnx.ModelProto) -> onnx.ModelProto:
    """Everything in half precision but the outputs, which stay float32."""
    copy = onnx.ModelProto()
    copy.CopyFrom(encoder)
    with warnings.catch_warnings():
        # Weights too small for half precision become 0; whether that matters is for the gate to say.
        warnings.filterwarnings("ignore", message="the float32 number")
        return convert_float_to_float16(copy, keep_io_types=True)


MAKERS: dict[Variant, Callable[[onnx.ModelProto], onnx.ModelProto]] = {"int8": to_int8, "float16": to_float16}
