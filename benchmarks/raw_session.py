"""The limit: ONNX Runtime alone in a process, on images that are decoded already.

python -m benchmarks.raw_session ONNX_FILE ARRAY_FILE   (reads lines "BATCH_SIZE SECONDS", answers each with JSON)
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import numpy as np
from numpy.typing import NDArray

from serving.machine import available_cpus
from serving.ort import onnxruntime

CPU = "CPUExecutionProvider"


def measure(
    session: onnxruntime.InferenceSession, image: NDArray[np.uint8], batch_size: int, seconds: float
) -> dict[str, float]:
    """Throughput, and the median time of one call. `image` is uint8 [C, H, W]."""
    images = np.repeat(image[None], batch_size, axis=0)
    session.run(["pooled"], {"images": images})
    start, times = time.perf_counter(), []
    while (begun := time.perf_counter()) < start + seconds:
        session.run(["pooled"], {"images": images})
        times.append(time.perf_counter() - begun)
    return {"images_per_s": batch_size * len(times) / sum(times), "p50_ms": 1000 * statistics.median(times)}


def open_session(onnx_file: str, provider: str = CPU) -> onnxruntime.InferenceSession:
    """A session on all CPUs of this process, or on a GPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cpus()
    if provider != CPU:
        onnxruntime.preload_dlls()
    return onnxruntime.InferenceSession(onnx_file, options, providers=list(dict.fromkeys([provider, CPU])))


def main(onnx_file: str, array_file: str) -> None:
    session, image = open_session(onnx_file), np.load(array_file)
    for line in sys.stdin:
        batch_size, seconds = line.split()
        sys.stdout.write(json.dumps(measure(session, image, int(batch_size), float(seconds))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
