"""What the serving benchmark measures with: a ViT-S/16 bundle with random weights, and a JPEG of photographic kind."""

from __future__ import annotations

import io
import logging
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

JPEG_SIZE_PX = (640, 480)  # width, height
JPEG_BYTES = 54_000
GRID, PATCH_SIZE = (14, 14), 16
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

logger = logging.getLogger(__name__)


def vit_small_bundle(root: Path) -> Path:
    """The bundle of a ViT-S/16 encoder for 224 px with random weights, made under `root`/scratch at the first call."""
    folder = root / "scratch/bench/vit_small_random"
    if not (folder / "bundle.json").is_file():
        logger.info("exporting a ViT-S/16 with random weights to %s", folder)
        _export_vit_small(root, folder)
    return folder


def _export_vit_small(root: Path, folder: Path) -> None:
    # torch takes seconds to import, and is needed the first time alone.
    import torch

    from cae.architecture import EncoderArchitecture
    from cae.config import ENCODER_SIZES
    from cae.model import build_encoder
    from cae.normalization import Normalization
    from cae.weights import describe, save_trained
    from pipeline.export import export
    from pipeline.workspace import Workspace

    depth, width, num_heads = ENCODER_SIZES["vit_small"]
    architecture = EncoderArchitecture(
        channels=3, grid=GRID, patch_size=PATCH_SIZE, depth=depth, width=width, num_heads=num_heads, layer_scale=0.1
    )
    torch.manual_seed(0)
    origin = {"name": "vit_small", "source": "random weights, seed 0"}
    description = describe(architecture, Normalization(IMAGENET_MEAN, IMAGENET_STD), 0.875, origin)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as weights:
        save_trained(Path(weights), build_encoder(architecture), description)
        export(Workspace(root, root / "params.yaml"), Path(weights), folder, {}, ())


def jpeg() -> bytes:
    """A JPEG of 640 x 480 with about JPEG_BYTES: the quality is the highest that does not exceed them."""
    picture = Image.fromarray(picture_like_a_photograph(seed=0))
    low, high = 1, 95
    while low < high:
        middle = (low + high + 1) // 2
        if len(_encoded(picture, middle)) <= JPEG_BYTES:
            low = middle
        else:
            high = middle - 1
    return _encoded(picture, low)


def picture_like_a_photograph(seed: int) -> NDArray[np.uint8]:
    """uint8 [480, 640, 3]: noise whose strength falls with its frequency, as in photographs, under flat shapes."""
    width, height = JPEG_SIZE_PX
    random = np.random.default_rng(seed)
    canvas = np.zeros((height, width, 3), np.float32)
    for cells in (4, 8, 16, 32, 64, 128):
        coarse = random.normal(size=(cells * 3 // 4, cells, 3)).astype(np.float32)
        layers = [
            Image.fromarray(coarse[:, :, channel]).resize(JPEG_SIZE_PX, Image.Resampling.BICUBIC)
            for channel in range(3)
        ]
        canvas += np.stack([np.asarray(layer) for layer in layers], axis=2) / cells
    canvas = 128 + 90 * canvas / np.abs(canvas).max()
    rows, columns = np.mgrid[:height, :width]
    for _ in range(12):
        centre, radius = random.uniform((0, 0), (height, width)), random.uniform(15, 90)
        inside = np.hypot(rows - centre[0], columns - centre[1]) < radius
        canvas[inside] = 0.5 * canvas[inside] + 0.5 * random.uniform(0, 255, 3)
    # The grain of a sensor.
    canvas += random.normal(0, 4, canvas.shape)
    return canvas.clip(0, 255).astype(np.uint8)


def _encoded(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
