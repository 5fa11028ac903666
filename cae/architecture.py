"""Sizes that fix the shapes of a model; stored with its weights."""

from typing import Any, Literal

from cae.section import Count, Positive, Section


def check_heads(width: int, num_heads: int, heads_key: str, width_key: str) -> None:
    """Raise ValueError unless the heads divide the width and the 2-D sin-cos table fits it."""
    if width % 4:
        raise ValueError(f"{width_key}: {width} is not a multiple of 4, which 2-D sin-cos positions need")
    if width % num_heads:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - num_heads))
        raise ValueError(
            f"{heads_key}: {num_heads} heads do not divide the {width_key} {width}; the nearest is {nearest}"
        )


class TimmSource(Section):
    """The call of `timm.create_model` that builds an encoder of timm's."""

    name: str
    args: dict[str, Any]


class EncoderArchitecture(Section):
    """Every size that fixes the shapes of an encoder; stored with its weights.

    `final_norm` says where the last LayerNorm stands: on every token, or, after fine-tuning, on the mean of the patches
    alone. `relative_position_bias` is what the official code adds in fine-tuning. With `timm` the encoder is timm's,
    and the sizes only describe it.
    """

    channels: Count
    grid: tuple[Count, Count]
    patch_size: Count
    depth: Count
    width: Count
    num_heads: Count
    layer_scale: Positive
    final_norm: Literal["tokens", "pooled"] = "tokens"
    relative_position_bias: bool = False
    timm: TimmSource | None = None

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]


class Architecture(EncoderArchitecture):
    """Every size that fixes the shapes of a ContextAutoencoder."""

    predictor_width: Count
    predictor_num_heads: Count
    regressor_depth: Count
    decoder_depth: Count
    num_outputs: Count
    predictor_layer_scale: Positive
