"""Our encoder as a timm model and back, without loss.

timm's VisionTransformer has every part of our encoder: layer scale, a table of positions (ours is the formula), and one
bias for queries, keys and values (ours for the keys is zero). With a relative position bias it is timm's Beit, whose
parameters have the official names.
"""

import re

import torch
from torch import Tensor

from cae.architecture import EncoderArchitecture, TimmSource
from cae.model import Encoder
from cae.official import official_names
from cae.positions import sincos_positions
from cae.timm_encoder import architecture_of, create

State = dict[str, Tensor]

# timm's names of the sizes; any other size is the base one with other arguments.
NAMES = {(12, 192): "tiny", (12, 384): "small", (12, 768): "base", (24, 1024): "large"}


def to_timm(encoder: Encoder, architecture: EncoderArchitecture) -> tuple[TimmSource, State]:
    """The call of `timm.create_model` that builds the encoder, and its state dict for a strict load."""
    pooled = architecture.final_norm == "pooled"
    args = {
        "img_size": list(architecture.size_px),
        "patch_size": architecture.patch_size,
        "in_chans": architecture.channels,
        "embed_dim": architecture.width,
        "depth": architecture.depth,
        "num_heads": architecture.num_heads,
        "init_values": architecture.layer_scale,
        "global_pool": "avg" if pooled else "token",
    }
    given = encoder.state_dict()
    state = {"pos_embed": sincos_positions(architecture.grid, architecture.width)[None]}
    size = NAMES.get((architecture.depth, architecture.width), "base")
    if architecture.relative_position_bias:
        beit = "large" if size == "large" else "base"
        args |= {"use_abs_pos_emb": True, "use_rel_pos_bias": True, "use_fc_norm": pooled}
        state |= {official_names(key)[0]: value for key, value in given.items()}
        return TimmSource(name=f"beit_{beit}_patch16_224", args=args), state
    args["fc_norm"] = pooled
    for key, value in given.items():
        if key.endswith("attn.q_bias"):
            v_bias = given[key.replace("q_bias", "v_bias")]
            state[key.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.zeros_like(value), v_bias])
        elif not key.endswith("attn.v_bias"):
            state[key] = value
    return TimmSource(name=f"vit_{size}_patch16_224", args=args), state


def from_timm(source: TimmSource, state: State) -> tuple[Encoder, EncoderArchitecture] | None:
    """Our encoder from a timm model's weights; None where it could not give back just these."""
    described = architecture_of(create(source), source)
    architecture = described.model_copy(
        update={
            "timm": None,
            "layer_scale": float(source.args.get("init_values") or 1.0),
            "relative_position_bias": any("relative_position_bias_table" in key for key in state),
        }
    )
    if architecture.width % 4:
        return None
    encoder = Encoder(architecture).eval()
    ours = {}
    for key in encoder.state_dict():
        name = official_names(key)[0] if architecture.relative_position_bias else key
        ours[key] = _biases(state, key) if name not in state and re.search("attn.[qv]_bias$", key) else state.get(name)
    if any(value is None for value in ours.values()):
        return None
    try:
        encoder.load_state_dict({key: value for key, value in ours.items() if value is not None})
    except RuntimeError:
        return None
    _, again = to_timm(encoder, architecture)
    same = again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    return (encoder, architecture) if same else None


def _biases(state: State, key: str) -> Tensor | None:
    """The part of timm's common bias that is ours for queries or for values."""
    bias = state.get(re.sub("[qv]_bias$", "qkv.bias", key))
    return None if bias is None else bias.chunk(3)[0 if key.endswith("q_bias") else 2]
