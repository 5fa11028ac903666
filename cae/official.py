"""Checkpoints of the official CAE release: their names, their sizes, and their way into our modules, strictly.

Source of the names: the published pretraining checkpoints, and `modeling_finetune.py` for fine-tuned encoders.
"""

import difflib
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from timm.layers import gen_relative_position_index
from torch import Tensor, nn

from cae.architecture import Architecture, EncoderArchitecture, check_heads
from cae.errors import UserError
from cae.model import ContextAutoencoder, Encoder
from cae.positions import sincos_positions

State = dict[str, Tensor]

# Our names on the left, official ones on the right; applied in order to every key.
NAMES = [
    (r"^(regressor\.blocks\.\d+)\.norm_([qkv])\.", r"\1.norm1_\2."),
    (r"^(regressor\.blocks\.\d+)\.(norm2|mlp)\.", r"\1.\2_cross."),
    (r"^(regressor\.blocks\.\d+)\.attn\.", r"\1.cross_attn."),
    (r"^(regressor\.blocks\.\d+)\.ls([12])\.gamma$", r"\1.gamma_\2_cross"),
    (r"^regressor\.mask_query$", "mask_token"),
    (r"^regressor\.blocks\.", "regresser.regressor_blocks."),
    (r"^regressor\.", "regresser."),
    (r"^decoder\.blocks\.", "decoder.decoder_blocks."),
    (r"^projection\.0\.", "encoder_to_regresser."),
    (r"^projection\.1\.", "encoder_to_regresser_norm."),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"\.relative_position\.", "."),
]
ALIGNMENT = "alignment_encoder."
# What a fixed table or the copy of the encoder may differ by: rounding of another machine, no more.
TOLERANCE = 1e-5
# The layer scale that training starts from; weights that were read replace it.
LAYER_SCALE, LARGE_LAYER_SCALE = 0.1, 1e-5
PREDICTOR_HEADS = 12
MAX_CHANNELS = 16
NAMED_SIZES = {(12, 384): "vit_small", (12, 768): "vit_base", (24, 1024): "vit_large"}
MAX_NAMED = 3


class Imported(NamedTuple):
    """A model out of a checkpoint, and the keys that were not needed, by reason."""

    model: ContextAutoencoder | Encoder
    architecture: EncoderArchitecture
    dropped: dict[str, list[str]]
    num_used: int

    @property
    def name(self) -> str:
        """The paper's name of the size."""
        return NAMED_SIZES.get((self.architecture.depth, self.architecture.width), "vit")


def from_official(state: State, path: Path, num_heads: int | None, predictor_heads: int | None) -> Imported:
    """A CAE from a pretraining checkpoint, or an encoder from a fine-tuned one; every key is used or named as dropped.

    Heads cannot be seen in the weights: by default those of the official models. Raises UserError for missing, unknown
    or misshapen keys, for an alignment encoder that is not the encoder's copy, and for tables that are no formula.
    """
    reader = _Reader(dict(state), path)
    if any(key.startswith("encoder.") for key in state):
        return _pretrained(reader, num_heads, predictor_heads)
    return _finetuned(reader, num_heads)


def official_names(key: str) -> list[str]:
    """The official names of a parameter of ours: one, or three where ours is their rows one below the other."""
    for pattern, replacement in NAMES:
        key = re.sub(pattern, replacement, key)
    # The official regressor keeps three projections.
    stem = key.removesuffix("cross_attn.qkv.weight")
    return [key] if stem == key else [f"{stem}cross_attn.{part}.weight" for part in "qkv"]


def default_heads(width: int) -> int:
    """Heads of the official encoders: 16 for width 1024, else 12."""
    return 16 if width == 1024 else 12


class _Reader:
    """The keys of a checkpoint that are still to be used, and those that were dropped."""

    def __init__(self, state: State, path: Path) -> None:
        self.state, self.path = state, path
        self.dropped: dict[str, list[str]] = {}

    def drop(self, key: str, reason: str) -> Tensor | None:
        if key in self.state:
            self.dropped.setdefault(reason, []).append(key)
        return self.state.pop(key, None)

    def size(self, key: str, num_dims: int) -> tuple[int, ...]:
        """Shape of a tensor that the sizes are read from."""
        if key not in self.state:
            raise UserError(
                f"{self.path}: {key} is missing; expected a pretraining checkpoint of the official CAE release, or a "
                f"fine-tuned encoder of it (found {len(self.state)} keys such as {', '.join(sorted(self.state)[:3])})"
            )
        shape = tuple(self.state[key].shape)
        if len(shape) != num_dims or not all(shape):
            raise UserError(f"{self.path}: {key} has shape {list(shape)}; expected {num_dims} dimensions of at least 1")
        return shape

    def depth(self, prefix: str) -> int:
        """Number of blocks below a name."""
        numbers = {int(match[1]) for key in self.state if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", key))}
        absent = next(number for number in range(len(numbers) + 1) if number not in numbers)
        if absent < max(len(numbers), 1):
            raise UserError(f"{self.path}: {prefix}.{absent} is missing; expected blocks numbered from 0 on")
        return len(numbers)

    def check_table(self, key: str, grid: tuple[int, int], width: int) -> None:
        """Drop a table of positions, if it is the formula."""
        table = self.drop(key, "a fixed table of positions, which is computed")
        if table is None:
            return
        if not _is_table(table, grid, width):
            raise UserError(
                f"{self.path}: {key} is not the 2-D sin-cos table of a {grid[0]} x {grid[1]} grid and width {width}; "
                "learned positions are not part of CAE"
            )

    def check_alignment_encoder(self) -> None:
        """Drop the copy of the encoder, if it is one."""
        copies = [key for key in self.state if key.startswith(ALIGNMENT)]
        originals = {key for key in self.state if key.startswith("encoder.")}
        copied = {key.removeprefix("alignment_") for key in copies}
        if copies and originals != copied:
            sides = ("encoder", originals - copied), ("alignment_encoder", copied - originals)
            odd = "; ".join(f"only in {side}: {_some(sorted(keys))}" for side, keys in sides if keys)
            raise UserError(f"{self.path}: encoder and alignment_encoder must have the same keys, and have not; {odd}")
        for key in copies:
            original = self.state[key.removeprefix("alignment_")]
            copy = self.drop(key, "the alignment encoder, equal to the encoder")
            assert copy is not None
            apart = float((original - copy).abs().max()) if original.shape == copy.shape else math.inf
            if not apart <= TOLERANCE:
                raise UserError(
                    f"{self.path}: {key} differs from the encoder by {apart:.1e} (at most {TOLERANCE} is a copy); in "
                    "CAE both are the same weights, so this is another method's checkpoint or a damaged one"
                )

    def load_into(self, module: nn.Module) -> int:
        """Load all that is left, strictly; return how many keys of the file were used."""
        num_used = len(self.state)
        missing, misshapen = [], []
        loaded = {}
        for key, value in module.state_dict().items():
            names = official_names(key)
            shape = [value.shape[0] // len(names), *value.shape[1:]] if value.dim() else []
            parts = [self.state.pop(name, None) for name in names]
            for name, part in zip(names, parts, strict=True):
                if part is None:
                    missing.append(name)
                elif list(part.shape) != shape:
                    misshapen.append(f"{name} is {list(part.shape)} in place of {shape}")
            loaded[key] = parts
        if missing or misshapen or self.state:
            raise UserError(f"{self.path}: {'; '.join(_complaints(missing, list(self.state), misshapen))}")
        module.load_state_dict({key: torch.cat([p for p in parts if p is not None]) for key, parts in loaded.items()})
        return num_used


def _pretrained(reader: _Reader, num_heads: int | None, predictor_heads: int | None) -> Imported:
    width, channels, patch_size = _projection(reader, "encoder.patch_embed.proj.weight")
    predictor_width = reader.size("mask_token", 3)[2]
    num_outputs = reader.size("decoder.head.weight", 2)[0]
    grid = _grid(reader, ("encoder.pos_embed", "rd_pos_embed"))
    architecture = Architecture(
        channels=channels,
        grid=grid,
        patch_size=patch_size,
        depth=reader.depth("encoder.blocks"),
        width=width,
        num_heads=num_heads or default_heads(width),
        layer_scale=_layer_scale(width),
        predictor_width=predictor_width,
        predictor_num_heads=predictor_heads or PREDICTOR_HEADS,
        predictor_layer_scale=LAYER_SCALE,
        regressor_depth=reader.depth("regresser.regressor_blocks"),
        decoder_depth=reader.depth("decoder.decoder_blocks"),
        num_outputs=num_outputs,
    )
    _check_heads(architecture.width, architecture.num_heads, "--num-heads")
    _check_heads(predictor_width, architecture.predictor_num_heads, "--predictor-heads")
    reader.check_alignment_encoder()
    reader.check_table("encoder.pos_embed", grid, width)
    reader.check_table("rd_pos_embed", grid, predictor_width)
    model = ContextAutoencoder(architecture).eval()
    num_used = reader.load_into(model)
    return Imported(model, architecture, reader.dropped, num_used)


def _finetuned(reader: _Reader, num_heads: int | None) -> Imported:
    width, channels, patch_size = _projection(reader, "patch_embed.proj.weight")
    grid = _grid(reader, ("pos_embed",))
    tables = [key for key in reader.state if key.endswith("attn.relative_position_bias_table")]
    for key in [key for key in reader.state if key.endswith("relative_position_index")]:
        index = reader.drop(key, "an index of relative positions, which is computed")
        expected = gen_relative_position_index(grid, class_token=True)
        if index is None or not torch.equal(index, expected.to(index.dtype)):
            raise UserError(f"{reader.path}: {key} is not the index of a {grid[0]} x {grid[1]} grid")
    for key in [key for key in reader.state if key.startswith("head.")]:
        reader.drop(key, "the classifier, for an encoder is imported")
    architecture = EncoderArchitecture(
        channels=channels,
        grid=grid,
        patch_size=patch_size,
        depth=reader.depth("blocks"),
        width=width,
        num_heads=num_heads or (reader.size(tables[0], 2)[1] if tables else default_heads(width)),
        layer_scale=_layer_scale(width),
        final_norm="pooled" if "fc_norm.weight" in reader.state else "tokens",
        relative_position_bias=bool(tables),
    )
    _check_heads(width, architecture.num_heads, "--num-heads")
    reader.check_table("pos_embed", grid, width)
    model = Encoder(architecture).eval()
    return Imported(model, architecture, reader.dropped, reader.load_into(model))


def _projection(reader: _Reader, key: str) -> tuple[int, int, int]:
    """Width, channels and patch size."""
    width, channels, *patch = reader.size(key, 4)
    if patch[0] != patch[1] or channels > MAX_CHANNELS:
        raise UserError(
            f"{reader.path}: {key} has shape {[width, channels, *patch]}; expected square patches of at most "
            f"{MAX_CHANNELS} channels"
        )
    return width, channels, patch[0]


def _grid(reader: _Reader, keys: tuple[str, ...]) -> tuple[int, int]:
    """Rows and columns out of the tables of positions; of the grids with as many patches the one whose table it is."""
    found = [key for key in keys if key in reader.state]
    if not found:
        raise UserError(f"{reader.path}: {' and '.join(keys)} are missing, and the patch grid is read from them")
    _, num_tokens, width = reader.size(found[0], 3)
    num_patches = num_tokens - 1
    grids = [(rows, num_patches // rows) for rows in range(1, num_patches + 1) if num_patches % rows == 0]
    # The square one first, or the one that is nearest to it.
    grids.sort(key=lambda grid: abs(grid[0] - grid[1]))
    if not grids:
        raise UserError(f"{reader.path}: {found[0]} has {num_tokens} positions; expected the class token and patches")
    # Where none fits `check_table` tells of it.
    return next((grid for grid in grids if _is_table(reader.state[found[0]], grid, width)), grids[0])


def _is_table(table: Tensor, grid: tuple[int, int], width: int) -> bool:
    """Whether a table of positions is the formula, in the precision that it is stored with."""
    if width % 4 or not table.is_floating_point():
        return False
    expected = sincos_positions(grid, width)[None].to(table.dtype)
    return table.shape == expected.shape and float((table - expected).abs().max()) <= TOLERANCE


def _layer_scale(width: int) -> float:
    return LARGE_LAYER_SCALE if width == 1024 else LAYER_SCALE


def _check_heads(width: int, num_heads: int, option: str) -> None:
    try:
        check_heads(width, num_heads, option, "width")
    except ValueError as error:
        raise UserError(str(error)) from None


def _complaints(missing: list[str], unknown: list[str], misshapen: list[str]) -> list[str]:
    said = []
    if missing:
        said.append(f"missing keys ({len(missing)}): {_some(missing)}")
    if unknown:
        near = [difflib.get_close_matches(key, missing, n=1) for key in unknown[:MAX_NAMED]]
        hint = next((f" (was {match[0]} renamed?)" for match in near if match), "")
        said.append(f"unknown keys ({len(unknown)}): {_some(unknown)}{hint}")
    if misshapen:
        said.append(f"keys of another shape than the rest asks for ({len(misshapen)}): {_some(misshapen)}")
    return said


def _some(keys: list[str]) -> str:
    more = len(keys) - MAX_NAMED
    return ", ".join(keys[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def summary(dropped: dict[str, list[str]]) -> str:
    """One phrase a reason: how many keys were dropped for it, and where."""
    parts = []
    for reason, keys in dropped.items():
        roots = Counter(key.split(".")[0] for key in keys)
        parts.append(f"{len(keys)} of {', '.join(roots)} ({reason})")
    return "; ".join(parts)
