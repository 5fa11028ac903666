"""Tiny models, masks and parameters that several tests need."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from torch import Tensor

from cae.architecture import Architecture
from cae.masking import MaskSampler

SHIPPED_PARAMS = Path(__file__).parents[2] / "params.yaml"
ARCHITECTURE = {
    "channels": 3,
    "grid": (4, 5),
    "patch_size": 2,
    "depth": 3,
    "width": 16,
    "num_heads": 2,
    "predictor_width": 16,
    "predictor_num_heads": 2,
    "regressor_depth": 2,
    "decoder_depth": 2,
    "num_outputs": 11,
    "layer_scale": 0.5,
    "predictor_layer_scale": 0.5,
}


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same weights and pixels in every run of a test."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_architecture() -> Callable[..., Architecture]:
    """A tiny Architecture with a non-square grid, any size of it changed by keyword."""
    return lambda **changes: Architecture(**{**ARCHITECTURE, **changes})


@pytest.fixture(scope="session")
def draw_masks() -> Callable[..., tuple[Tensor, Tensor]]:
    """Visible and masked indices of `batch` images: another mask for every image."""

    def draw(grid: tuple[int, int], num_masked: int, batch: int) -> tuple[Tensor, Tensor]:
        sampler = MaskSampler(grid, num_masked, "random", 0.1)
        visible, masked = zip(*(sampler(np.random.default_rng(i)) for i in range(batch)), strict=True)
        return torch.from_numpy(np.stack(visible)), torch.from_numpy(np.stack(masked))

    return draw


@pytest.fixture
def raw_params() -> dict[str, Any]:
    """The shipped params.yaml as nested dictionaries, the sizes that messages repeat set to known values."""
    raw = YAML(typ="safe", pure=True).load(SHIPPED_PARAMS)
    raw["model"] |= {"name": "vit_nano", "depth": None, "width": None, "num_heads": None}
    raw["model"] |= {"image_size": 28, "patch_size": 4}
    raw["pretrain"] |= {"predictor_width": None, "predictor_num_heads": None}
    raw["tokenizer"] |= {"temperature_start": 1.0}
    return raw
