"""Our forward pass equals the official code's, within 1e-5 (numbers: tests/data/cae_forward.json)."""

import json
import logging
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cae.model import ContextAutoencoder, alignment_loss
from cae.official import from_official
from cae.positions import sincos_positions

logger = logging.getLogger(__name__)

CASES = json.loads((Path(__file__).parents[1] / "data" / "cae_forward.json").read_text())
TOLERANCE = 1e-5


def official_keys(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official state dict, without fixed tables and the alignment copy of the encoder."""
    width, predictor, patch = config["embed_dim"], config["predictor_dim"], config["patch_size"]

    def norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (size,), f"{name}.bias": (size,)}

    def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def block(name: str, size: int) -> dict[str, tuple[int, ...]]:
        return {
            **{f"{name}.{gain}": (size,) for gain in ("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias")},
            **norm(f"{name}.norm1", size),
            f"{name}.attn.qkv.weight": (3 * size, size),
            **linear(f"{name}.attn.proj", size, size),
            **norm(f"{name}.norm2", size),
            **linear(f"{name}.mlp.fc1", 4 * size, size),
            **linear(f"{name}.mlp.fc2", size, 4 * size),
        }

    def regressor_block(name: str, size: int) -> dict[str, tuple[int, ...]]:
        return {
            **{f"{name}.{gain}": (size,) for gain in ("gamma_1_cross", "gamma_2_cross")},
            **{f"{name}.cross_attn.{bias}": (size,) for bias in ("q_bias", "v_bias")},
            **{key: shape for part in "qkv" for key, shape in norm(f"{name}.norm1_{part}", size).items()},
            **norm(f"{name}.norm2_cross", size),
            **{f"{name}.cross_attn.{part}.weight": (size, size) for part in "qkv"},
            **linear(f"{name}.cross_attn.proj", size, size),
            **linear(f"{name}.mlp_cross.fc1", 4 * size, size),
            **linear(f"{name}.mlp_cross.fc2", size, 4 * size),
        }

    keys: dict[str, tuple[int, ...]] = {"mask_token": (1, 1, predictor), "encoder.cls_token": (1, 1, width)}
    keys["encoder.patch_embed.proj.weight"] = (width, 3, patch, patch)
    keys["encoder.patch_embed.proj.bias"] = (width,)
    for i in range(config["depth"]):
        keys |= block(f"encoder.blocks.{i}", width)
    keys |= norm("encoder.norm", width)
    if width != predictor:
        keys |= linear("encoder_to_regresser", predictor, width) | norm("encoder_to_regresser_norm", predictor)
    for i in range(config["regressor_depth"]):
        keys |= regressor_block(f"regresser.regressor_blocks.{i}", predictor)
    keys |= norm("regresser.norm", predictor)
    for i in range(config["decoder_depth"]):
        keys |= block(f"decoder.decoder_blocks.{i}", predictor)
    return keys | norm("decoder.norm", predictor) | linear("decoder.head", config["vocab_size"], predictor)


def reference_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight that the reference numbers were computed with: a normal draw seeded by the key's CRC."""
    values = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32) * 0.05
    if "norm" in key and key.endswith("weight"):
        values += 1
    return torch.from_numpy(values)


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
