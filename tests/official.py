"""Checkpoints in the format of the official CAE release, of any size, with weights that the key decides."""

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cae.positions import sincos_positions

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
