"""Pretrained models on disk."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from cae.config import Architecture
from cae.model import ContextAutoencoder, Encoder
from cae.normalization import Normalization
from cae.storage import load_into, read_architecture, read_weights, save_weights


class LoadedCae(NamedTuple):
    """A pretrained model in eval mode and what its images must look like."""

    model: ContextAutoencoder
    architecture: Architecture
    normalization: Normalization
    metadata: dict[str, Any]


def save_cae(
    path: Path,
    model: ContextAutoencoder,
    architecture: Architecture,
    normalization: Normalization,
    origin: dict[str, Any],
) -> None:
    """Write a pretrained CAE; `origin` tells from which data and with which parameters it was made."""
    metadata = {
        "kind": "cae",
        "architecture": architecture.model_dump(),
        "normalization": normalization._asdict(),
        "origin": origin,
    }
    save_weights(path, model, metadata)


def load_cae(path: Path) -> LoadedCae:
    """Read a pretrained CAE."""
    state, metadata = read_weights(path, "cae")
    architecture = read_architecture(Architecture, path, metadata)
    model = ContextAutoencoder(architecture)
    load_into(model, state, path)
    return LoadedCae(model.eval(), architecture, Normalization(**metadata["normalization"]), metadata)


def pretrained_encoder(loaded: LoadedCae, drop_path: float = 0.0) -> Encoder:
    """A copy of the pretrained encoder, with drop path where it is to be trained further."""
    encoder = random_encoder(loaded, 0, drop_path)
    encoder.load_state_dict(loaded.model.encoder.state_dict())
    return encoder


def random_encoder(loaded: LoadedCae, seed: int, drop_path: float = 0.0) -> Encoder:
    """An encoder of the same shape with random weights: the baseline of every figure."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(loaded.architecture, drop_path).eval()
