"""Our forward pass equals the official code's, within 1e-5 (numbers: tests/data/cae_forward.json)."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cae.model import ContextAutoencoder, alignment_loss
from cae.official import from_official
from cae.positions import sincos_positions
from tests.official import official_keys, reference_weight

logger = logging.getLogger(__name__)

CASES = json.loads((Path(__file__).parents[1] / "data" / "cae_forward.json").read_text())
TOLERANCE = 1e-5


def reference_model(config: dict[str, Any]) -> ContextAutoencoder:
    """The model with the reference weights, by way of the official format."""
    side = config["img_size"] // config["patch_size"]
    state = {key: reference_weight(key, shape) for key, shape in official_keys(config).items()}
    state["rd_pos_embed"] = sincos_positions((side, side), config["predictor_dim"])[None]
    path = Path("reference.pth")
    imported = from_official(state, path, config["num_heads"], config["predictor_heads"])
    assert isinstance(imported.model, ContextAutoencoder)
    return imported.model


@pytest.mark.parametrize("name", CASES)
def test_forward_agrees_with_the_official_code(name: str) -> None:
    case = CASES[name]
    config = case["config"]
    model = reference_model(config)
    num_patches = (config["img_size"] // config["patch_size"]) ** 2
    rng = np.random.default_rng(config["data_seed"])
    size = (config["batch"], 3, config["img_size"], config["img_size"])
    images = torch.from_numpy(rng.standard_normal(size).astype(np.float32))
    masked = torch.tensor(case["masked_indices"])
    visible = torch.tensor([sorted(set(range(num_patches)) - set(row)) for row in case["masked_indices"]])

    with torch.no_grad():
        output = model(images, visible, masked)
        everything = model.encoder(images)
    labels = torch.tensor(case["labels"]).gather(1, masked)
    decoding = F.cross_entropy(output.prediction.flatten(0, 1), labels.flatten())
    alignment = alignment_loss(output.z_m, output.z_m_target)

    tensors = {
        "logits": output.prediction,
        "latent_pred": output.z_m,
        "latent_target": output.z_m_target,
        "encoder_all_visible": everything,
    }
    for key, ours in tensors.items():
        theirs = case[key]
        assert list(ours.shape) == theirs["shape"]
        difference = np.abs(ours.flatten()[:: theirs["stride"]].numpy() - np.array(theirs["values"])).max()
        logger.info("%s %s: %.1e", name, key, difference)
        assert difference < TOLERANCE, key
    losses = {
        "decoding_loss": decoding,
        "alignment_mse": alignment,
        "total_loss_lambda2": decoding + 2 * alignment,
    }
    for key, loss in losses.items():
        logger.info("%s %s: %.1e", name, key, abs(loss.item() - case[key]))
        assert abs(loss.item() - case[key]) < TOLERANCE, key
