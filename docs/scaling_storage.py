"""Bytes and seconds of a stored photograph, for docs/scaling.md: scikit-learn's two photographs of 640 × 427 px."""

import io
import sys
import time
from collections.abc import Callable
from importlib.resources import files

import numpy as np
from PIL import Image

from cae.config import CropConfig
from cae.data.shards import decode_stored
from cae.data.transforms import CropFlip
from pipeline.prepare import JPEG_QUALITY

REPEATS = 100


def main() -> None:
    photographs = [files("sklearn.datasets.images").joinpath(name).read_bytes() for name in ("china.jpg", "flower.jpg")]
    report("as they are", photographs)
    report("short side 256 px", [smaller(photograph, 256) for photograph in photographs])
    crop = CropFlip((224, 224), CropConfig(crop_scale=(0.08, 1.0), flip=0.5))
    rng = np.random.default_rng(0)
    for name, images in (("as they are", photographs), ("256 px", [smaller(one, 256) for one in photographs])):
        rate = per_second(lambda images=images: [crop(decode_stored(one, 3), rng) for one in images], len(images))
        sys.stdout.write(f"decode and crop to 224 px, {name}: {rate:.0f} images/s of one core\n")


def report(name: str, images: list[bytes]) -> None:
    sys.stdout.write(f"{name}: {sum(map(len, images)) / len(images) / 1000:.0f} kB an image\n")


def smaller(photograph: bytes, short_side_px: int) -> bytes:
    """As `prepare` stores a photograph that is larger."""
    image = Image.open(io.BytesIO(photograph))
    scale = short_side_px / min(image.size)
    buffer = io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=JPEG_QUALITY
    )
    return buffer.getvalue()


def per_second(work: Callable[[], object], images: int) -> float:
    start = time.perf_counter()
    for _ in range(REPEATS):
        work()
    return REPEATS * images / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
