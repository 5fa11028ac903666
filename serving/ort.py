"""ONNX Runtime, told before it starts to send nothing: from 1.31 on it collects usage for its maker unless it is told.

Everything else imports it from here.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

__all__ = ["onnxruntime"]
