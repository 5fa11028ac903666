"""Trained models on disk: a whole CAE, an encoder alone, or an encoder with the classifier it was fine-tuned with."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cae.architecture import Architecture, EncoderArchitecture
from cae.errors import NotReady, UserError
from cae.heads import Classifier
from cae.model import AnyEncoder, ContextAutoencoder, build_encoder
from cae.normalization import Normalization
from cae.storage import load_into, read_architecture, read_weights, save_weights

CAE_FILE, ENCODER_FILE, CLASSIFIER_FILE = "cae.safetensors", "encoder.safetensors", "classifier.safetensors"


class Trained(NamedTuple):
    """A trained model in eval mode and what its images must look like.

    `cae` is None for an encoder alone; else it holds the same encoder. `architecture` is an Architecture for a CAE.
    """

    encoder: AnyEncoder
    cae: ContextAutoencoder | None
    architecture: EncoderArchitecture
    normalization: Normalization
    metadata: dict[str, Any]

    @property
    def eval_crop(self) -> float:
        """Share of the short side that evaluation keeps."""
        return self.metadata["eval_crop"]

    @property
    def origin(self) -> dict[str, Any]:
        """From which data and with which parameters it was made."""
        return self.metadata["origin"]


def describe(
    architecture: EncoderArchitecture, normalization: Normalization, eval_crop: float, origin: dict[str, Any]
) -> dict[str, Any]:
    """What a file must hold beside the weights; `origin` tells from which data and with which parameters they are."""
    return {
        "architecture": architecture.model_dump(),
        "normalization": normalization._asdict(),
        "eval_crop": eval_crop,
        "origin": origin,
    }


def save_trained(
    folder: Path, model: ContextAutoencoder | AnyEncoder | Classifier, description: dict[str, Any]
) -> Path:
    """Write a model with what `describe` gives (a classifier also `classes`); return the file."""
    kind, name = "encoder", ENCODER_FILE
    if isinstance(model, ContextAutoencoder):
        kind, name = "cae", CAE_FILE
    elif isinstance(model, Classifier):
        kind, name = "classifier", CLASSIFIER_FILE
    save_weights(folder / name, model, {"kind": kind, **description})
    return folder / name


def find_weights(path: Path) -> Path:
    """The file of trained weights that `path` names, itself or the folder it lies in."""
    if not path.is_dir():
        return path
    names = (CAE_FILE, ENCODER_FILE, CLASSIFIER_FILE)
    for name in names:
        if (path / name).is_file():
            return path / name
    raise NotReady(f"{path}: holds none of {', '.join(names)}; expected what `dvc repro` or `cae-pipe import` made")


def load_trained(path: Path) -> Trained:
    """Read trained weights, a file or the folder it lies in. Of a classifier the encoder alone is taken."""
    path = find_weights(path)
    state, metadata = read_weights(path, "cae", "encoder", "classifier")
    if missing := [key for key in ("normalization", "eval_crop", "origin") if key not in metadata]:
        raise UserError(f"{path}: written by another version of cae-pipe ({missing[0]} is missing); make it again")
    cae = None
    encoder: AnyEncoder
    if metadata["kind"] == "cae":
        architecture: EncoderArchitecture = read_architecture(Architecture, path, metadata)
        assert isinstance(architecture, Architecture)
        cae = ContextAutoencoder(architecture).eval()
        load_into(cae, state, path)
        encoder = cae.encoder
    else:
        architecture = read_architecture(EncoderArchitecture, path, metadata)
        encoder = build_encoder(architecture).eval()
        if metadata["kind"] == "classifier":
            state = {key.removeprefix("encoder."): value for key, value in state.items() if not key.startswith("head.")}
        load_into(encoder, state, path)
    return Trained(encoder, cae, architecture, Normalization(**metadata["normalization"]), metadata)


def trained_encoder(trained: Trained, drop_path: float = 0.0) -> AnyEncoder:
    """A copy of the trained encoder, with drop path where it is to be trained further."""
    encoder = random_encoder(trained, 0, drop_path)
    encoder.load_state_dict(trained.encoder.state_dict())
    return encoder


def random_encoder(trained: Trained, seed: int, drop_path: float = 0.0) -> AnyEncoder:
    """An encoder of the same shape with random weights: the baseline of every figure."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_encoder(trained.architecture, drop_path).eval()


def for_finetuning(
    trained: Trained, drop_path: float, relative_position_bias: bool, seed: int | None
) -> tuple[AnyEncoder, EncoderArchitecture]:
    """The encoder as fine-tuning changes it, and its architecture; with a `seed` in place of None, random weights.

    The last LayerNorm of every token goes, and a fresh one on the mean of the patches takes its place.
    Raises UserError where a timm encoder is to have a relative position bias.
    """
    if relative_position_bias and trained.architecture.timm:
        raise UserError("finetune.relative_position_bias: true is for our own encoder; this one is timm's, set false")
    sizes = {name: getattr(trained.architecture, name) for name in EncoderArchitecture.model_fields}
    sizes |= {"final_norm": "pooled"}
    sizes["relative_position_bias"] = relative_position_bias or trained.architecture.relative_position_bias
    architecture = EncoderArchitecture.model_validate(sizes)
    encoder = random_encoder(trained._replace(architecture=architecture), seed or 0, drop_path)
    if seed is None:
        fresh = re.compile(r"(model\.)?(fc_)?norm\.|.*\.relative_position\.")
        missing, unexpected = encoder.load_state_dict(trained.encoder.state_dict(), strict=False)
        assert all(fresh.match(key) for key in (*missing, *unexpected)), (missing, unexpected)
    return encoder, architecture
