"""Checkpoints of the official release: every key used or named as dropped, and clear refusals."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cae.architecture import Architecture, EncoderArchitecture
from cae.errors import UserError
from cae.model import ContextAutoencoder, Encoder
from cae.official import from_official, official_names, summary
from tests.official import GRID, SMALL, finetuned_state, official_state

DATA = Path(__file__).parents[1] / "data"
PATH = Path("cae.pth")
State = dict[str, Tensor]


def published_keys(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint."""
    lines = (DATA / f"official_cae_{size}_keys.tsv").read_text().splitlines()[1:]
    return {key: tuple(map(int, shape.split("x"))) for key, shape in (line.split("\t") for line in lines)}


@pytest.mark.parametrize(
    ("size", "num_keys", "sizes"),
    [
        ("base", 524, {"depth": 12, "width": 768, "num_heads": 12, "predictor_width": 768}),
        ("large", 888, {"depth": 24, "width": 1024, "num_heads": 16, "predictor_width": 768}),
    ],
)
def test_the_names_are_those_of_the_published_checkpoints(size: str, num_keys: int, sizes: dict[str, int]) -> None:
    keys = published_keys(size)
    assert len(keys) == num_keys
    rest = {"predictor_num_heads": 12, "regressor_depth": 4, "decoder_depth": 4, "num_outputs": 8192}
    scales = {"layer_scale": 0.1, "predictor_layer_scale": 0.1}
    with torch.device("meta"):
        model = ContextAutoencoder(Architecture(channels=3, grid=(14, 14), patch_size=16, **sizes, **rest, **scales))
    ours = {}
    for key, value in model.state_dict().items():
        for name in official_names(key):
            ours[name] = (value.shape[0] // len(official_names(key)), *value.shape[1:])
    tables = {"rd_pos_embed": (1, 197, 768), "encoder.pos_embed": (1, 197, sizes["width"])}
    ours |= tables
    ours |= {f"alignment_{key}": shape for key, shape in ours.items() if key.startswith("encoder.")}
    assert ours == keys


@pytest.mark.parametrize("predictor", [16, 24])
def test_a_pretraining_checkpoint_is_read_with_every_key_accounted_for(predictor: int) -> None:
    state = official_state(predictor_dim=predictor)
    imported = from_official(state, PATH, num_heads=4, predictor_heads=2)
    assert isinstance(imported.model, ContextAutoencoder)
    assert isinstance(imported.architecture, Architecture)
    assert (imported.architecture.grid, imported.architecture.width) == (GRID, SMALL["embed_dim"])
    assert (imported.architecture.num_heads, imported.architecture.predictor_num_heads) == (4, 2)
    dropped = [key for keys in imported.dropped.values() for key in keys]
    assert imported.num_used + len(dropped) == len(state)
    assert set(dropped) == {key for key in state if "pos_embed" in key or key.startswith("alignment_encoder.")}
    assert "alignment_encoder (the alignment encoder, equal to the encoder)" in summary(imported.dropped)
    weights = imported.model.state_dict()
    assert torch.equal(weights["regressor.mask_query"], state["mask_token"])
    name = "regresser.regressor_blocks.1.cross_attn"
    assert torch.equal(weights["regressor.blocks.1.attn.qkv.weight"][-predictor:], state[f"{name}.v.weight"])


def test_heads_are_those_of_the_official_models_unless_told() -> None:
    state = official_state(embed_dim=48, predictor_dim=24)
    architecture = from_official(state, PATH, None, None).architecture
    assert isinstance(architecture, Architecture)
    assert (architecture.num_heads, architecture.predictor_num_heads) == (12, 12)
    with pytest.raises(UserError, match=r"--num-heads: 5 heads do not divide the width 48"):
        from_official(state, PATH, 5, None)


def without(key: str) -> Callable[[State], None]:
    return lambda state: state.__delitem__(key)


def renamed(old: str, new: str) -> Callable[[State], None]:
    return lambda state: state.update({new: state.pop(old)})


def changed(key: str, value: Tensor) -> Callable[[State], None]:
    return lambda state: state.update({key: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("decoder.head.bias"), r"missing keys \(1\): decoder\.head\.bias"),
        (
            without("regresser.regressor_blocks.0.cross_attn.k.weight"),
            r"missing keys \(1\): regresser\.regressor_blocks\.0\.cross_attn\.k\.weight",
        ),
        (without("encoder.norm.bias"), r"only in alignment_encoder: encoder\.norm\.bias"),
        (without("alignment_encoder.norm.bias"), r"only in encoder: encoder\.norm\.bias"),
        (renamed("decoder.norm.bias", "decoder.norms.bias"), r"was decoder\.norm\.bias renamed\?"),
        (changed("decoder.head.bias", torch.zeros(5)), r"decoder\.head\.bias is \[5\] in place of \[11\]"),
        (changed("decoder.extra", torch.zeros(5)), r"unknown keys \(1\): decoder\.extra"),
        (changed("rd_pos_embed", torch.zeros(1, 16, 16)), r"rd_pos_embed is not the 2-D sin-cos table of a 3 x 5 grid"),
        (changed("encoder.pos_embed", torch.rand(1, 16, 24)), r"alignment_encoder\.pos_embed differs from the encoder"),
        (without("mask_token"), r"mask_token is missing"),
        (changed("mask_token", torch.zeros(1, 1, 0)), r"mask_token has shape \[1, 1, 0\]"),
        (changed("encoder.blocks.9.norm1.weight", torch.zeros(24)), r"encoder\.blocks\.2 is missing"),
        (changed("encoder.patch_embed.proj.weight", torch.zeros(24, 17, 4, 4)), r"at most 16 channels"),
        (without("encoder.patch_embed.proj.weight"), r"encoder\.patch_embed\.proj\.weight is missing"),
    ],
)
def test_what_is_not_the_format_is_named(change: Callable[[State], None], said: str) -> None:
    state = official_state()
    change(state)
    with pytest.raises(UserError, match=rf"cae\.pth: .*{said}"):
        from_official(state, PATH, 4, 2)


@pytest.mark.parametrize("apart", [1e-3, math.nan])
def test_an_alignment_encoder_that_is_no_copy_is_refused(apart: float) -> None:
    state = official_state()
    state["alignment_encoder.norm.bias"] = state["encoder.norm.bias"] + apart
    with pytest.raises(UserError, match=r"alignment_encoder\.norm\.bias differs from the encoder by"):
        from_official(state, PATH, 4, 2)
    state["alignment_encoder.norm.bias"] = state["encoder.norm.bias"] + 1e-7
    from_official(state, PATH, 4, 2)


def test_a_checkpoint_without_the_copy_or_the_encoders_table_is_read_too() -> None:
    state = {key: value for key, value in official_state().items() if not key.startswith("alignment_encoder.")}
    del state["encoder.pos_embed"]
    assert from_official(state, PATH, 4, 2).architecture.grid == GRID
    del state["rd_pos_embed"]
    with pytest.raises(UserError, match=r"encoder\.pos_embed and rd_pos_embed are missing"):
        from_official(state, PATH, 4, 2)


def test_a_finetuned_encoder_computes_the_official_forward_pass() -> None:
    state = finetuned_state(num_heads=4)
    # The table of relative positions has a column a head, so here they need not be told.
    imported = from_official(dict(state), PATH, num_heads=None, predictor_heads=None)
    assert isinstance(imported.model, Encoder)
    assert imported.architecture == EncoderArchitecture(
        channels=3,
        grid=GRID,
        patch_size=4,
        depth=2,
        width=24,
        num_heads=4,
        layer_scale=0.1,
        final_norm="pooled",
        relative_position_bias=True,
    )
    assert imported.num_used + sum(map(len, imported.dropped.values())) == len(state)
    images = torch.randn(2, 3, 12, 20)
    tokens = finetuned_forward(state, images, num_heads=4)
    with torch.no_grad():
        ours = imported.model(images)
        pooled = imported.model.pool(ours[:, 1:])
        _, attention = imported.model.forward_with_attention(images)
    assert (ours - tokens).abs().max() < 1e-5
    expected = F.layer_norm(tokens[:, 1:].mean(1), (24,), state["fc_norm.weight"], state["fc_norm.bias"], 1e-6)
    assert (pooled - expected).abs().max() < 1e-5
    assert attention.shape == (2, 4, 15)
    without_bias = from_official(
        {key: torch.zeros_like(value) if key.endswith("bias_table") else value for key, value in state.items()},
        PATH,
        4,
        None,
    )
    with torch.no_grad():
        assert (without_bias.model(images) - tokens).abs().max() > 1e-3, "the bias must show"


def finetuned_forward(state: State, images: Tensor, num_heads: int) -> Tensor:
    """The official fine-tuned encoder, written down from its description: tokens before the norm of the mean."""
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
    x = torch.cat([state["cls_token"].expand(len(images), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    x = x + state["pos_embed"]
    width = x.shape[-1]
    for i in range(SMALL["depth"]):
        part = {key.removeprefix(f"blocks.{i}."): value for key, value in state.items() if f"blocks.{i}." in key}
        h = F.layer_norm(x, (width,), part["norm1.weight"], part["norm1.bias"], 1e-6)
        bias = torch.cat([part["attn.q_bias"], torch.zeros(width), part["attn.v_bias"]])
        q, k, v = (
            y.unflatten(-1, (num_heads, -1)).transpose(1, 2)
            for y in F.linear(h, part["attn.qkv.weight"], bias).chunk(3, dim=-1)
        )
        weights = q @ k.transpose(-2, -1) / math.sqrt(width // num_heads)
        weights += part["attn.relative_position_bias_table"][part["attn.relative_position_index"]].permute(2, 0, 1)
        h = (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + part["gamma_1"] * F.linear(h, part["attn.proj.weight"], part["attn.proj.bias"])
        h = F.layer_norm(x, (width,), part["norm2.weight"], part["norm2.bias"], 1e-6)
        h = F.gelu(F.linear(h, part["mlp.fc1.weight"], part["mlp.fc1.bias"]))
        x = x + part["gamma_2"] * F.linear(h, part["mlp.fc2.weight"], part["mlp.fc2.bias"])
    return x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read(dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in official_state().items()}
    weights = from_official(state, PATH, 4, 2).model.state_dict()
    assert torch.equal(weights["encoder.norm.bias"], state["encoder.norm.bias"].float())


def test_an_index_of_another_grid_is_refused() -> None:
    state = finetuned_state()
    state["blocks.1.attn.relative_position_index"] = state["blocks.1.attn.relative_position_index"].T
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.relative_position_index is not the index of a 3 x 5 grid"):
        from_official(state, PATH, 4, None)


def test_another_methods_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"patch_embed\.proj\.weight is missing; expected a pretraining checkpoint"):
        from_official({"conv1.weight": torch.zeros(3)}, PATH, None, None)
