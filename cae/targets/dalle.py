"""The tokenizer of DALL-E as a target (CAE* in the paper): a discrete VAE that others trained, with 8192 codes.

One token stands for 8 × 8 pixels of the tokenizer's view. Patches of the model are larger (16 px), so the tokenizer
reads a smaller view of the same crop, 112 px for 224. Modules and parameters are named as in the published files.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cae.config import DALLE_PATCH_PX
from cae.section import Count, Section
from cae.targets.tokens import TokenTarget

NUM_GROUPS = 4
RGB = 3
# Pixels in 0-1 become MARGIN to 1 - MARGIN, so that the decoder's sigmoid reaches every value.
MARGIN = 0.1

DtypeName = Literal["float32", "bfloat16", "float16"]


class DalleSizes(Section):
    """What fixes the shapes of encoder and decoder."""

    vocab_size: Count
    hidden_width: Count  # of the first group of the encoder; it doubles from group to group
    code_width: Count  # of the decoder's first layer, a table of codes
    num_res_blocks: Count  # in each of the four groups


PUBLISHED_SIZES = DalleSizes(vocab_size=8192, hidden_width=256, code_width=128, num_res_blocks=2)


class DalleArchitecture(DalleSizes):
    """Sizes, the images that the tokens stand for, and how tokens are computed in training."""

    channels: Literal[1, 3]  # of the images; the tokenizer itself reads three
    patch_size: Count
    grid: tuple[Count, Count]
    dtype: DtypeName
    channels_last: bool


class Conv(nn.Module):
    """A convolution that keeps the size, its parameters named as in the published files."""

    def __init__(self, num_inputs: int, num_outputs: int, kernel: int) -> None:
        super().__init__()
        # Never trained here: weights come from a file.
        self.w = nn.Parameter(torch.zeros(num_outputs, num_inputs, kernel, kernel), requires_grad=False)
        self.b = nn.Parameter(torch.zeros(num_outputs), requires_grad=False)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    """x + gain · four convolutions at a quarter of the width; a 1×1 convolution on x where the width changes."""

    def __init__(self, num_inputs: int, num_outputs: int, kernels: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        quarter = num_outputs // 4
        widths = [num_inputs, quarter, quarter, quarter, num_outputs]
        self.gain = gain
        self.id_path = Conv(num_inputs, num_outputs, 1) if num_inputs != num_outputs else nn.Identity()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            layers[f"relu_{i + 1}"] = nn.ReLU()
            layers[f"conv_{i + 1}"] = Conv(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        return self.id_path(x) + self.gain * self.res_path(x)


class Encoder(nn.Module):
    """Mapped pixels [b, 3, 8·gh, 8·gw] to logits over the codes [b, k, gh, gw]."""

    def __init__(self, sizes: DalleSizes) -> None:
        super().__init__()
        width = sizes.hidden_width
        self.blocks = nn.Sequential(
            OrderedDict(
                input=Conv(RGB, width, 7),
                **_groups(sizes, width, [width * 2**i for i in range(NUM_GROUPS)], (3, 3, 3, 1), "pool"),
                output=_output(width * 2 ** (NUM_GROUPS - 1), sizes.vocab_size),
            )
        )

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k gh gw"]:
        """The last layer runs in float32, as published, whatever the dtype of the others."""
        *body, output = self.blocks
        x = pixels.to(self.blocks.get_parameter("input.w").dtype)
        for part in body:
            x = part(x)
        return output(x.float())

    def cast(self, dtype: torch.dtype, channels_last: bool) -> None:
        """Dtype of all layers but the last, and the order of weights in memory."""
        self.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        for name, part in self.blocks.named_children():
            if name != "output":
                part.to(dtype)


class Decoder(nn.Module):
    """Tokens [b, gh, gw] to six channels [b, 6, 8·gh, 8·gw]: three of colours before the sigmoid, three of scales."""

    def __init__(self, sizes: DalleSizes) -> None:
        super().__init__()
        width = sizes.hidden_width
        widths = [width * 2**i for i in reversed(range(NUM_GROUPS))]
        self.blocks = nn.Sequential(
            OrderedDict(
                input=Conv(sizes.vocab_size, sizes.code_width, 1),
                **_groups(sizes, sizes.code_width, widths, (1, 3, 3, 3), "upsample"),
                output=_output(width, 2 * RGB),
            )
        )

    def forward(self, tokens: Int[Tensor, "b gh gw"]) -> Float[Tensor, "b 6 h w"]:
        # A 1×1 convolution on one-hot codes is a look-up, and 8192 channels are a lot.
        table, bias = (self.blocks.get_parameter(f"input.{name}") for name in ("w", "b"))
        x = (table.flatten(1).T[tokens] + bias).movedim(-1, 1)
        for part in list(self.blocks)[1:]:
            x = part(x)
        return x


def _groups(
    sizes: DalleSizes, num_inputs: int, widths: list[int], kernels: tuple[int, int, int, int], between: str
) -> dict[str, nn.Module]:
    """Four groups of residual blocks; all but the last halve (`pool`) or double (`upsample`) the size."""
    gain = 1 / (NUM_GROUPS * sizes.num_res_blocks) ** 2
    groups: dict[str, nn.Module] = {}
    for i, width in enumerate(widths):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for j in range(sizes.num_res_blocks):
            layers[f"block_{j + 1}"] = Block(width if j else num_inputs, width, kernels, gain)
        num_inputs = width
        if i + 1 < NUM_GROUPS:
            layers[between] = nn.MaxPool2d(2) if between == "pool" else nn.Upsample(scale_factor=2)
        groups[f"group_{i + 1}"] = nn.Sequential(layers)
    return groups


def _output(num_inputs: int, num_outputs: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv(num_inputs, num_outputs, 1)))


class DalleTarget(TokenTarget):
    """The DALL-E tokenizer as a `Target`. Images are float32 in 0-1; grey is read as RGB, and the mean comes back."""

    kind = "dalle"
    patch_px = DALLE_PATCH_PX

    def __init__(self, architecture: DalleArchitecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.num_outputs = architecture.vocab_size
        self.encoder, self.decoder = Encoder(architecture), Decoder(architecture)
        self.factor = architecture.patch_size // DALLE_PATCH_PX

    def view(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c vh vw"]:
        # Windows that never cross a patch: what is hidden in the image is hidden in the view.
        return F.avg_pool2d(images, self.factor) if self.factor > 1 else images

    def speed_up(self) -> None:
        self.encoder.cast(getattr(torch, self.architecture.dtype), self.architecture.channels_last)

    def logits(self, view: Float[Tensor, "b c vh vw"]) -> Float[Tensor, "b k gh gw"]:
        size_px = tuple(DALLE_PATCH_PX * side for side in self.architecture.grid)
        if tuple(view.shape[2:]) != size_px:
            raise ValueError(f"a view of {tuple(view.shape[2:])} px was given to a DALL-E tokenizer of {size_px} px")
        with full_float32(view.device):
            return self.encoder((1 - 2 * MARGIN) * view.expand(-1, RGB, -1, -1) + MARGIN)

    @torch.no_grad()
    def encode(self, view: Float[Tensor, "b c vh vw"]) -> Int[Tensor, "b n"]:
        return self.logits(view).argmax(dim=1).flatten(1)

    def decode(self, codes: Int[Tensor, "b n"]) -> Float[Tensor, "b c h w"]:
        mapped = self.decoder(codes.unflatten(1, self.architecture.grid))[:, :RGB].sigmoid()
        images = ((mapped - MARGIN) / (1 - 2 * MARGIN)).clamp(0, 1)
        if self.architecture.channels == 1:
            images = images.mean(dim=1, keepdim=True)
        return F.interpolate(images, scale_factor=self.factor, mode="bilinear") if self.factor > 1 else images


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """On a GPU, convolutions of float32 tensors in float32: by default they round to ten bits (TF32)."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
