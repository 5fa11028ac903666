"""Served features of real photographs against torch: decoding, preprocessing and model, all the way."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from http_answers import NPY, array
from PIL import Image
from running_server import running
from sklearn.datasets import load_sample_images

from cae.architecture import EncoderArchitecture
from cae.model import build_encoder
from cae.normalization import Normalization
from cae.weights import describe, save_trained
from pipeline.api import Model, load
from pipeline.export import export
from pipeline.workspace import Workspace
from tests.tiny import ROOT

NAMES = {"pooled": "mean", "class": "class", "patches": "patches"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder for 96 x 128 px with random weights, large enough that no feature is near zero."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    architecture = EncoderArchitecture(
        channels=3, grid=(6, 8), patch_size=16, depth=3, width=96, num_heads=3, layer_scale=1.0
    )
    normalization = Normalization([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    origin = {"name": "random", "source": "random weights"}
    save_trained(folder, build_encoder(architecture), describe(architecture, normalization, 0.875, origin))
    return folder


@pytest.fixture(scope="module")
def trained(weights: Path) -> Model:
    return load(weights, device="cpu")


@pytest.fixture(scope="module")
def http(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("served")
    export(Workspace(folder, ROOT / "params.yaml"), weights, folder / "bundle", {}, ())
    with running(folder / "bundle", folder / "log", {}) as server, httpx.Client(base_url=server.url) as client:
        yield client


def photographs() -> dict[str, Image.Image]:
    found = load_sample_images()
    return {
        Path(name).name: Image.fromarray(pixels) for name, pixels in zip(found.filenames, found.images, strict=True)
    }


def files() -> dict[str, bytes]:
    """Two photographs as cameras and programs write them."""
    written = {}
    turned = Image.Exif()
    turned[0x0112] = 8
    kinds: dict[str, dict[str, Any]] = {
        "jpg": {"format": "JPEG", "quality": 90},
        "turned.jpg": {"format": "JPEG", "quality": 90, "exif": turned},
        "png": {"format": "PNG"},
        "webp": {"format": "WEBP", "quality": 80},
        "tiff": {"format": "TIFF"},
        "bmp": {"format": "BMP"},
    }
    for name, photograph in photographs().items():
        for kind, options in kinds.items():
            buffer = io.BytesIO()
            photograph.save(buffer, **options)
            written[f"{Path(name).stem}.{kind}"] = buffer.getvalue()
        for mode, kind in (("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG")):
            buffer = io.BytesIO()
            photograph.convert(mode).save(buffer, kind)
            written[f"{Path(name).stem}.{mode}"] = buffer.getvalue()
    return written


@pytest.mark.parametrize("output", NAMES)
def test_a_served_embedding_is_that_of_torch(http: httpx.Client, trained: Model, tmp_path: Path, output: str) -> None:
    bodies = files()
    for name, data in bodies.items():
        (tmp_path / name).write_bytes(data)
    expected = trained.encode([tmp_path / name for name in bodies], NAMES[output])
    query = {"outputs": output}
    alone = np.concatenate(
        [array(http.post("/embed", params=query, content=data, headers=NPY)) for data in bodies.values()]
    )
    np.testing.assert_allclose(alone, expected, atol=1e-4)
    # The photographs are told apart, and turning one shows: a server that answered the same for all would not pass.
    assert np.abs(alone[0] - alone[1]).max() > 0.01
    together = http.post(
        "/embed", params=query, files=[("images", (name, data)) for name, data in bodies.items()], headers=NPY
    )
    np.testing.assert_allclose(array(together), expected, atol=1e-4)
