"""Small random DALL-E tokenizers, and files of them as they are published: whole modules of a package `dall_e`.

What the official code gives for one of them is in tests/data/dalle_tokenizer.json.
"""

import json
import sys
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cae.targets.dalle import DalleArchitecture, DalleSizes, DalleTarget
from tests.official import difference

CASE: dict[str, Any] = json.loads((Path(__file__).parent / "data/dalle_tokenizer.json").read_text())

SMALL = DalleSizes(vocab_size=32, hidden_width=8, code_width=4, num_res_blocks=1)
States = dict[str, dict[str, Tensor]]


def small_target(**changes: Any) -> DalleTarget:
    """A target with random weights that make its tokens and its pictures lively."""
    values = {**SMALL.model_dump(), "channels": 3, "patch_size": 16, "grid": (2, 3), "dtype": "float32"}
    target = DalleTarget(DalleArchitecture(**{**values, "channels_last": False, **changes}))
    generator = torch.Generator().manual_seed(0)
    for tensor in target.state_dict().values():
        scale = (2 / tensor[0].numel()) ** 0.5 if tensor.dim() == 4 else 0.05
        tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
    return target.eval()


def reference_target() -> DalleTarget:
    """The tokenizer that the official numbers were computed with: a normal draw seeded by the key's CRC."""
    config = CASE["config"]
    side = config["hw"] // 8
    architecture = DalleArchitecture(
        vocab_size=config["vocab_size"],
        hidden_width=config["n_hid"],
        code_width=config["n_init"],
        num_res_blocks=config["n_blk_per_group"],
        channels=3,
        patch_size=8,
        grid=(side, side),
        dtype="float32",
        channels_last=False,
    )
    target = DalleTarget(architecture)
    for module, keys in ((target.encoder, CASE["encoder_keys"]), (target.decoder, CASE["decoder_keys"])):
        module.load_state_dict({key: _reference_weight(key, shape) for key, shape in keys.items()})
    return target.eval()


def _reference_weight(key: str, shape: list[int]) -> Tensor:
    values = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) == 4 else 0.05
    return torch.from_numpy(values * np.float32(scale))


@torch.no_grad()
def official_differences(device: torch.device) -> dict[str, float]:
    """Largest difference of logits and reconstruction, on a device, to the official code's; share of other tokens."""
    size = CASE["config"]["hw"]
    rng = np.random.default_rng(CASE["config"]["seed"])
    images = torch.from_numpy(rng.random((2, 3, size, size)).astype(np.float32)).to(device)
    target = reference_target().to(device)
    tokens = target.encode(images)
    return {
        "tokens": float((tokens.flatten().cpu() != torch.tensor(CASE["tokens"])).double().mean()),
        "logits": difference(target.logits(images), CASE["logits"]),
        "reconstruction": difference(target.decode(tokens), CASE["reconstruction"]),
    }


def states_of(target: DalleTarget) -> States:
    """State dicts of encoder and decoder, by the published names."""
    return {"encoder": target.encoder.state_dict(), "decoder": target.decoder.state_dict()}


class Conv2d(nn.Module):
    def __init__(self, w: Tensor, b: Tensor) -> None:
        super().__init__()
        self.n_out, self.n_in, self.kw, _ = w.shape
        self.use_float16, self.device, self.requires_grad = True, torch.device("cpu"), False
        self.w, self.b = nn.Parameter(w.clone(), requires_grad=False), nn.Parameter(b.clone(), requires_grad=False)


class EncoderBlock(nn.Module): ...


class DecoderBlock(nn.Module): ...


class Encoder(nn.Module): ...


class Decoder(nn.Module): ...


PACKAGE: dict[str, list[type[nn.Module]]] = {
    "dall_e": [],
    "dall_e.utils": [Conv2d],
    "dall_e.encoder": [Encoder, EncoderBlock],
    "dall_e.decoder": [Decoder, DecoderBlock],
}


@contextmanager
def dall_e() -> Iterator[None]:
    """The package that the published files were pickled from, with stand-ins of the same structure."""
    for name, classes in PACKAGE.items():
        module = ModuleType(name)
        for kind in classes:
            kind.__module__ = name
            setattr(module, kind.__name__, kind)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in PACKAGE:
            del sys.modules[name]


def published(part: str, state: dict[str, Tensor]) -> nn.Module:
    """The module with these weights and with all the layers between that the published one has."""
    root, block = {"encoder": (Encoder, EncoderBlock), "decoder": (Decoder, DecoderBlock)}[part]
    module = root()
    module.group_count, module.n_hid, module.vocab_size = 4, 8, 32  # type: ignore[assignment]
    module.blocks = _sequential(state, "blocks.", block)
    for number in (1, 2, 3):
        between = nn.MaxPool2d(2) if part == "encoder" else nn.Upsample(scale_factor=2, mode="nearest")
        module.blocks.get_submodule(f"group_{number}").add_module("between", between)
    return module


def _sequential(state: dict[str, Tensor], prefix: str, block: type[nn.Module]) -> nn.Module:
    children: OrderedDict[str, nn.Module] = OrderedDict()
    for name in dict.fromkeys(key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)):
        if f"{prefix}{name}.w" in state:
            children[name.replace("conv", "relu")] = nn.ReLU()
            children[name] = Conv2d(state[f"{prefix}{name}.w"], state[f"{prefix}{name}.b"])
        else:
            children[name] = _sequential(state, f"{prefix}{name}.", block)
    if "res_path" not in children:
        return nn.Sequential(children)
    module = block()
    module.id_path = children.get("id_path", nn.Identity())
    module.res_path = children["res_path"]
    return module


def write_published(folder: Path, target: DalleTarget) -> tuple[Path, Path]:
    """`encoder.pkl` and `decoder.pkl` as they are published; the package is gone when they are read."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "encoder.pkl", folder / "decoder.pkl"
    with dall_e():
        for path, (part, state) in zip(paths, states_of(target).items(), strict=True):
            torch.save(published(part, state), path)
    return paths
