"""The peer: LitServe over the same encoder.onnx and the same preprocessing, in batches of 8 that wait 10 ms.

python -m benchmarks.litserve_server BUNDLE PORT
"""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
from fastapi import Response
from litserve import LitAPI, LitServer
from numpy.typing import NDArray

from serving.machine import available_cpus
from serving.ort import onnxruntime
from serving.preprocess import PILLOW_MAX_PIXELS, Preprocessing, decode, prepare

BATCH_SIZE, BATCH_WAIT_S = 8, 0.010
Pixels = NDArray[np.uint8]


class Encoder(LitAPI):
    """`pooled` of one image as npy. The image comes as base64 in JSON: LitServe 0.2.19 hands no file to its workers."""

    def __init__(self, bundle: Path) -> None:
        super().__init__(max_batch_size=BATCH_SIZE, batch_timeout=BATCH_WAIT_S, api_path="/embed")
        self._bundle = bundle

    def setup(self, device: str) -> None:
        info = json.loads((self._bundle / "bundle.json").read_text())
        self._preprocessing = Preprocessing.model_validate(info["preprocessing"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = available_cpus()
        self._session = onnxruntime.InferenceSession(
            self._bundle / "encoder.onnx", options, providers=["CPUExecutionProvider"]
        )

    def decode_request(self, request: dict[str, str]) -> Pixels:
        image = decode(base64.b64decode(request["image"]), max_pixels=PILLOW_MAX_PIXELS)
        return prepare(image, self._preprocessing)

    def batch(self, inputs: list[Pixels]) -> Pixels:
        return np.stack(inputs)

    def predict(self, x: Pixels) -> NDArray[np.float32]:
        (pooled,) = self._session.run(["pooled"], {"images": x})
        return pooled

    def unbatch(self, output: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        return list(output[:, None])

    def encode_response(self, output: NDArray[np.float32]) -> Response:
        buffer = io.BytesIO()
        np.save(buffer, output)
        return Response(buffer.getvalue(), media_type="application/x-npy")


def main(bundle: str, port: str) -> None:
    server = LitServer(Encoder(Path(bundle)), accelerator="cpu", devices=1, workers_per_device=1, timeout=False)
    server.run(host="127.0.0.1", port=int(port), num_api_servers=1, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
