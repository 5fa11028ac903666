"""The published files of the DALL-E tokenizer, whole modules in pickles, read as tensors; or plain state dicts."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cae.errors import UserError
from cae.foreign import Shell, read_file, shell, state_in
from cae.targets.dalle import DalleArchitecture, DalleSizes, DalleTarget, Decoder, Encoder

ADDRESSES = {
    "encoder": "https://cdn.openai.com/dall-e/encoder.pkl",
    "decoder": "https://cdn.openai.com/dall-e/decoder.pkl",
}
# Classes of the published pickles. Of their objects the tensors are read and nothing else.
SHELLS = [
    shell(name)
    for name in (
        "dall_e.encoder.Encoder",
        "dall_e.encoder.EncoderBlock",
        "dall_e.decoder.Decoder",
        "dall_e.decoder.DecoderBlock",
        "dall_e.utils.Conv2d",
        "torch.nn.modules.activation.ReLU",
        "torch.nn.modules.container.Sequential",
        "torch.nn.modules.linear.Identity",
        "torch.nn.modules.pooling.MaxPool2d",
        "torch.nn.modules.upsampling.Upsample",
    )
]
# Of modules within modules; the published files have five.
MAX_DEPTH = 16
NUM_NAMED = 4


class DalleModules(NamedTuple):
    """Encoder and decoder of a file pair, in float32 and eval mode, and the sizes that their shapes say."""

    sizes: DalleSizes
    encoder: Encoder
    decoder: Decoder

    def target(self, architecture: DalleArchitecture) -> DalleTarget:
        """The target of these weights; `architecture` has the same sizes."""
        with torch.device("meta"):
            target = DalleTarget(architecture)
        target.encoder, target.decoder = self.encoder, self.decoder
        return target.eval()


def read_dalle(encoder: Path, decoder: Path) -> DalleModules:
    """Read both files strictly.

    Raises UserError, which names the file, where one is missing, carries code, or has not just the tensors expected.
    """
    paths = {"encoder": encoder, "decoder": decoder}
    states = {part: _read(part, path) for part, path in paths.items()}
    blocks = {key.split(".")[2] for key in states["encoder"] if key.startswith("blocks.group_1.block_")}
    sizes = DalleSizes(
        vocab_size=_num_outputs("encoder", "blocks.output.conv.w", states, paths),
        hidden_width=_num_outputs("encoder", "blocks.input.w", states, paths),
        code_width=_num_outputs("decoder", "blocks.input.w", states, paths),
        num_res_blocks=max(1, len(blocks)),
    )
    with torch.device("meta"):
        modules = DalleModules(sizes, Encoder(sizes), Decoder(sizes))
    for part, module in (("encoder", modules.encoder), ("decoder", modules.decoder)):
        _load(module, states[part], part, paths[part])
    return modules


def _read(part: str, path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; the DALL-E {part} is published at {ADDRESSES[part]}")
    content = read_file(path, SHELLS)
    return state_in(_flatten(content, path, "", set()) if isinstance(content, Shell) else content, path)


def _flatten(module: Any, path: Path, prefix: str, seen: set[int]) -> dict[str, Tensor]:
    """The state dict that a pickled module would have; `seen` are the modules before it."""
    held: list[Any] = [getattr(module, name, None) for name in ("_parameters", "_buffers", "_modules")]
    if prefix.count(".") > MAX_DEPTH or not all(isinstance(part, dict) for part in held):
        raise UserError(f"{path}: {prefix or 'its content'} is no module as PyTorch pickles them; download it again")
    parameters, buffers, children = held
    if children and id(module) in seen:
        raise UserError(f"{path}: {prefix} is in it twice, which no DALL-E tokenizer has; download it again")
    seen.add(id(module))
    tensors = {**parameters, **buffers}
    state = {f"{prefix}{name}": tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    for name, child in children.items():
        state |= _flatten(child, path, f"{prefix}{name}.", seen)
    return state


def _num_outputs(part: str, key: str, states: dict[str, dict[str, Tensor]], paths: dict[str, Path]) -> int:
    tensor = states[part].get(key)
    if tensor is None or tensor.dim() != 4 or not tensor.numel():
        found = "no such tensor" if tensor is None else f"a shape of {list(tensor.shape)}"
        raise UserError(
            f"{paths[part]}: not the {part} of a DALL-E tokenizer: {found} for {key!r}, which is a convolution's "
            f"weight there; expected {ADDRESSES[part]}, or its state dict"
        )
    return tensor.shape[0]


def _load(module: nn.Module, state: dict[str, Tensor], part: str, path: Path) -> None:
    expected = module.state_dict()
    misshapen = [
        f"{key} {list(state[key].shape)} instead of {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and (state[key].shape != tensor.shape or not state[key].is_floating_point())
    ]
    wrong = {
        "missing": [key for key in expected if key not in state],
        "unknown": [key for key in state if key not in expected],
        "of another shape": misshapen,
    }
    if any(wrong.values()):
        told = "; ".join(f"{what}: {_some(names)}" for what, names in wrong.items() if names)
        raise UserError(
            f"{path}: not the {part} of a DALL-E tokenizer. {told}. Expected {ADDRESSES[part]}, or its state dict"
        )
    # Into a module without memory of its own: a second copy would take as much again.
    module.load_state_dict({key: state[key].detach().float().contiguous() for key in expected}, assign=True)
    module.requires_grad_(False).eval()


def _some(names: list[str]) -> str:
    rest = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")
