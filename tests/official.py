"""Checkpoints in the format of the official CAE release, of any size, with weights that the key decides.

Its forward pass on them is in tests/data/cae_forward.json; `differences` holds ours against it.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cae.model import ContextAutoencoder, alignment_loss
from cae.official import from_official
from cae.positions import sincos_positions

CASES: dict[str, Any] = json.loads((Path(__file__).parent / "data/cae_forward.json").read_text())
TOLERANCE = 1e-5

# Small, with every part of the large one: two blocks each, a projection, a grid that is not square.
SMALL = {
    "embed_dim": 24,
    "predictor_dim": 16,
    "patch_size": 4,
    "depth": 2,
    "regressor_depth": 2,
    "decoder_depth": 2,
    "vocab_size": 11,
}
GRID = (3, 5)


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
    imported = from_official(state, Path("reference.pth"), config["num_heads"], config["predictor_heads"])
    assert isinstance(imported.model, ContextAutoencoder)
    return imported.model


@torch.no_grad()
def differences(case: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Largest difference of each tensor and loss of the forward pass, on a device, to the official code's."""
    config = case["config"]
    num_patches = (config["img_size"] // config["patch_size"]) ** 2
    rng = np.random.default_rng(config["data_seed"])
    size = (config["batch"], 3, config["img_size"], config["img_size"])
    images = torch.from_numpy(rng.standard_normal(size).astype(np.float32)).to(device)
    masked = torch.tensor(case["masked_indices"], device=device)
    visible = [sorted(set(range(num_patches)) - set(row)) for row in case["masked_indices"]]

    model = reference_model(config).to(device)
    output = model(images, torch.tensor(visible, device=device), masked)
    everything = model.encoder(images)
    labels = torch.tensor(case["labels"], device=device).gather(1, masked)
    decoding = F.cross_entropy(output.prediction.flatten(0, 1), labels.flatten())
    alignment = alignment_loss(output.z_m, output.z_m_target)

    tensors = {
        "logits": output.prediction,
        "latent_pred": output.z_m,
        "latent_target": output.z_m_target,
        "encoder_all_visible": everything,
    }
    losses = {
        "decoding_loss": decoding,
        "alignment_mse": alignment,
        "total_loss_lambda2": decoding + 2 * alignment,
    }
    return {
        **{key: difference(ours, case[key]) for key, ours in tensors.items()},
        **{key: abs(float(loss) - case[key]) for key, loss in losses.items()},
    }


def difference(ours: Tensor, theirs: dict[str, Any]) -> float:
    """Largest absolute difference to values of which every so many are stored; infinite for another shape."""
    if list(ours.shape) != theirs["shape"]:
        return float("inf")
    return float(np.abs(ours.flatten()[:: theirs["stride"]].cpu().numpy() - np.array(theirs["values"])).max())


def official_state(**changes: int) -> dict[str, Tensor]:
    """A pretraining checkpoint with fixed tables and the alignment copy of the encoder."""
    config = {**SMALL, **changes}
    state = {key: reference_weight(key, shape) for key, shape in official_keys(config).items()}
    state["encoder.pos_embed"] = sincos_positions(GRID, config["embed_dim"])[None]
    state["rd_pos_embed"] = sincos_positions(GRID, config["predictor_dim"])[None]
    copies = {f"alignment_{key}": value.clone() for key, value in state.items() if key.startswith("encoder.")}
    return state | copies


def finetuned_state(num_heads: int = 4, *, relative: bool = True) -> dict[str, Tensor]:
    """A fine-tuned encoder with its classifier and, as the official recipe has it, a relative position bias."""
    state = {
        key.removeprefix("encoder."): value
        for key, value in official_state().items()
        if key.startswith("encoder.") and not key.startswith("encoder.norm.")
    }
    width = SMALL["embed_dim"]
    for key, shape in {"fc_norm.weight": (width,), "fc_norm.bias": (width,), "head.weight": (7, width)}.items():
        state[key] = reference_weight(key, shape)
    state["head.bias"] = torch.zeros(7)
    if relative:
        rows, columns = GRID
        distances = (2 * rows - 1) * (2 * columns - 1) + 3
        for block in range(SMALL["depth"]):
            name = f"blocks.{block}.attn.relative_position"
            state[f"{name}_bias_table"] = 10 * reference_weight(f"{name}_bias_table", (distances, num_heads))
            state[f"{name}_index"] = beit_index(GRID)
    return state


def beit_index(grid: tuple[int, int]) -> Tensor:
    """Which entry of the table each pair of tokens has, written out pair by pair; the class token is first."""
    rows, columns = grid
    num_patches = rows * columns
    index = torch.zeros(1 + num_patches, 1 + num_patches, dtype=torch.int64)
    distances = (2 * rows - 1) * (2 * columns - 1)
    for i in range(num_patches):
        for j in range(num_patches):
            down, right = i // columns - j // columns, i % columns - j % columns
            index[1 + i, 1 + j] = (down + rows - 1) * (2 * columns - 1) + right + columns - 1
    index[0, :], index[:, 0], index[0, 0] = distances, distances + 1, distances + 2
    return index
