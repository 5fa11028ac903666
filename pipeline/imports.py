"""`cae-pipe import`: weights of other software as trained weights of this one."""

import difflib
import json
import logging
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
from torch import Tensor

from cae.architecture import Architecture, TimmSource
from cae.config import DALLE_PATCH_PX
from cae.data.shards import file_sha256
from cae.errors import UserError
from cae.foreign import read_state
from cae.model import AnyEncoder, ContextAutoencoder
from cae.normalization import Normalization
from cae.official import Imported, from_official, summary
from cae.targets.dalle import DalleTarget
from cae.targets.files import save_target
from cae.timm_encoder import TimmEncoder, architecture_of, create
from cae.timm_weights import from_timm
from cae.weights import Trained, describe, save_trained
from pipeline.dalle import build as dalle_target
from pipeline.export import check_new
from pipeline.workspace import TARGET_NAME, published

logger = logging.getLogger(__name__)

# The official checkpoints hold no preprocessing; they were trained with these, and evaluated on a crop of 224 of 256.
IMAGENET = Normalization([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
OFFICIAL_EVAL_CROP, OFFICIAL_MASK_RATIO = 0.875, 0.5
CONFIG = "config.json"
TIMM_FILES = ("model.safetensors", "pytorch_model.bin")


class TimmModel(NamedTuple):
    """A timm model as it was asked for: how it is built, its weights, its preprocessing, where the weights are from."""

    source: TimmSource
    state: dict[str, Tensor]
    data_config: dict[str, Any]
    origin: dict[str, Any]


def official(
    checkpoint: Path,
    out: Path,
    num_heads: int | None,
    predictor_heads: int | None,
    mean: list[float] | None,
    std: list[float] | None,
    dalle: Path | None,
) -> None:
    """Write a checkpoint of the official release to `out`; UserError, and nothing written, where it is not one.

    `dalle` is a folder with the tokenizer that its decoder predicts, which is then written beside it.
    """
    check_new(out)
    imported = from_official(read_state(checkpoint), checkpoint, num_heads, predictor_heads)
    target = _dalle_target(dalle, imported) if dalle else None
    channels = imported.architecture.channels
    normalization = _normalization(IMAGENET if channels == 3 else None, mean, std, channels)
    origin = {
        "name": imported.name,
        "source": f"official CAE checkpoint {checkpoint.name}",
        "sha256": file_sha256(checkpoint),
        "mask_ratio": OFFICIAL_MASK_RATIO,
    }
    description = describe(imported.architecture, normalization, OFFICIAL_EVAL_CROP, origin)
    logger.info("%s: %d keys used; dropped: %s", checkpoint, imported.num_used, summary(imported.dropped) or "none")
    _write(out, imported.model, description, target)


def from_timm_model(
    model: str,
    out: Path,
    architecture: str | None,
    image_size: tuple[int, int] | None,
    mean: list[float] | None,
    std: list[float] | None,
) -> None:
    """Write a timm Vision Transformer to `out`, as `load_timm`."""
    check_new(out)
    trained = load_timm(model, architecture, image_size, mean, std)
    _write(out, trained.encoder, trained.metadata)


def load_timm(
    model: str,
    architecture: str | None = None,
    image_size: tuple[int, int] | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> Trained:
    """A timm Vision Transformer by its name, from its folder, or from a file of weights, as an encoder.

    One that is a CAE encoder (an earlier `export --format timm`) becomes one again.
    """
    given = _find_timm(model, architecture, image_size)
    encoder: AnyEncoder
    if native := from_timm(given.source, given.state):
        encoder, sizes = native
    else:
        sizes = architecture_of(create(given.source), given.source)
        encoder = TimmEncoder(sizes).eval()
        _load_strictly(encoder, given.state, model)
    config = given.data_config
    normalization = Normalization(list(config["mean"]), list(config["std"]))
    normalization = _normalization(normalization, mean, std, sizes.channels)
    if config["interpolation"] != "bicubic":
        logger.warning("%s was evaluated with %s resizing; here it is bicubic", model, config["interpolation"])
    description = describe(sizes, normalization, float(config["crop_pct"]), given.origin)
    logger.info("%s: %d keys used, %s", model, len(given.state), "a CAE encoder" if native else "an encoder of timm's")
    if not (mean and std):
        logger.info("mean, std and crop are what timm has for this name; --mean and --std tell others")
    return Trained(encoder, None, sizes, normalization, description)


def _dalle_target(folder: Path, imported: Imported) -> DalleTarget:
    architecture = imported.architecture
    if not folder.is_dir():
        raise UserError(f"--dalle: there is no folder {folder}; `cae-pipe import dalle` writes one")
    if not isinstance(architecture, Architecture):
        raise UserError("--dalle: this checkpoint is an encoder without a decoder, so it predicts no tokens")
    if architecture.patch_size % DALLE_PATCH_PX or architecture.channels not in (1, 3):
        raise UserError(
            f"--dalle: patches of {architecture.patch_size} px and {architecture.channels} channels; expected a "
            f"multiple of {DALLE_PATCH_PX} px, and 1 or 3 channels"
        )
    encoder, decoder = folder / "encoder.safetensors", folder / "decoder.safetensors"
    channels: Literal[1, 3] = 1 if architecture.channels == 1 else 3
    target = dalle_target(encoder, decoder, channels, architecture.patch_size, architecture.grid)
    if target.num_outputs != architecture.num_outputs:
        raise UserError(
            f"--dalle: {folder} has {target.num_outputs} codes, the decoder predicts {architecture.num_outputs}"
        )
    return target


def _write(
    out: Path,
    model: ContextAutoencoder | AnyEncoder,
    description: dict[str, Any],
    target: DalleTarget | None = None,
) -> None:
    with published(out) as folder:
        save_trained(folder, model, description)
        if target:
            save_target(folder / TARGET_NAME, target, {})
    sizes = description["architecture"]
    rows, columns = sizes["grid"]
    predictor = f", {sizes['predictor_num_heads']} of regressor and decoder" if "predictor_num_heads" in sizes else ""
    logger.info(
        "%s: %s, %d x %d patches of %d px, %d channels, depth %d, width %d, %d heads%s; mean %s, std %s",
        out,
        "a Context Autoencoder" if isinstance(model, ContextAutoencoder) else "an encoder",
        rows,
        columns,
        sizes["patch_size"],
        sizes["channels"],
        sizes["depth"],
        sizes["width"],
        sizes["num_heads"],
        predictor,
        *description["normalization"].values(),
    )


def _normalization(
    given: Normalization | None, mean: list[float] | None, std: list[float] | None, channels: int
) -> Normalization:
    values = []
    for option, chosen, default in (("--mean", mean, given and given.mean), ("--std", std, given and given.std)):
        value = chosen or default
        if value is None or len(value) != channels:
            found = "nothing" if value is None else f"{len(value)} values"
            raise UserError(f"{option}: {found} for {channels} channels; give one value a channel, pixels in 0-1")
        values.append(value)
    if not all(map(math.isfinite, values[0])):
        raise UserError(f"--mean: {values[0]} must be numbers")
    if not all(0 < value < math.inf for value in values[1]):
        raise UserError(f"--std: {values[1]} must be above 0")
    return Normalization(*values)


def _find_timm(model: str, architecture: str | None, image_size: tuple[int, int] | None) -> TimmModel:
    path = Path(model)
    size = {"img_size": list(image_size)} if image_size else {}
    if path.is_dir():
        if image_size:
            raise UserError(f"--image-size: {path / CONFIG} says the size already; leave the option out")
        return _timm_folder(path)
    if path.is_file():
        if architecture is None:
            raise UserError(f"{path}: give timm's name of the model with --architecture, e.g. vit_base_patch16_224")
        state = read_state(path)
        projection = state.get("patch_embed.proj.weight")
        channels = {"in_chans": projection.shape[1]} if projection is not None and projection.shape[1] != 3 else {}
        source = TimmSource(name=architecture, args={**size, **channels})
        origin = {"name": architecture, "source": f"timm weights {path.name}", "sha256": file_sha256(path)}
        return TimmModel(source, _without_head(state, path), _data_config(create(source)), origin)
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=3, cutoff=0)
        raise UserError(
            f"{model}: neither a file, a folder nor a model of timm {timm.__version__}; its nearest: {', '.join(near)}"
        )
    source = TimmSource(name=model, args=size)
    try:
        built = timm.create_model(model, pretrained=True, num_classes=0, **source.args)
    except Exception as error:  # the hub's client raises errors of many types
        raise UserError(
            f"{model}: its pretrained weights could not be fetched ({str(error).splitlines()[0][:200]}). Where there "
            f"is no network, fetch the file elsewhere: cae-pipe import timm FILE --architecture {model}"
        ) from None
    origin = {"name": model, "source": f"timm {model}.{built.pretrained_cfg.get('tag', '')}".rstrip(".")}
    return TimmModel(source, built.state_dict(), _data_config(built), origin)


def _timm_folder(path: Path) -> TimmModel:
    """A folder as timm's `save_for_hf` and `cae-pipe export --format timm` write it."""
    weights = next((path / name for name in TIMM_FILES if (path / name).is_file()), None)
    if weights is None or not (path / CONFIG).is_file():
        raise UserError(f"{path}: expected {CONFIG} and {' or '.join(TIMM_FILES)}, as timm writes them")
    try:
        config = json.loads((path / CONFIG).read_text())
        args = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
        source = TimmSource(name=config["architecture"], args=args)
        built = timm.create_model(f"local-dir:{path}", pretrained=False, num_classes=0)
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path / CONFIG}: timm cannot build a model from it ({error})") from None
    origin = {"name": source.name, "source": f"timm folder {path.name}", "sha256": file_sha256(weights)}
    return TimmModel(source, _without_head(read_state(weights), weights), _data_config(built), origin)


def _data_config(model: Any) -> dict[str, Any]:
    return timm.data.resolve_model_data_config(model)


def _without_head(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    kept = {key: value for key, value in state.items() if not key.startswith(("head.", "head_dist."))}
    if len(kept) < len(state):
        logger.info("%s: %d keys dropped: the classifier, for an encoder is imported", path, len(state) - len(kept))
    return kept


def _load_strictly(encoder: TimmEncoder, state: dict[str, Tensor], name: str) -> None:
    expected = encoder.model.state_dict()
    odd = {
        "missing keys": [key for key in expected if key not in state],
        "unknown keys": [key for key in state if key not in expected],
        "keys of another shape": [
            f"{key} ({list(state[key].shape)} in place of {list(value.shape)})"
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    said = [f"{what} ({len(keys)}): {', '.join(keys[:3])}" for what, keys in odd.items() if keys]
    if said:
        hint = "; `cae-pipe import official` reads the CAE release" if any(".gamma_1" in key for key in state) else ""
        raise UserError(f"{name}: the weights do not fit the architecture: {'; '.join(said)}{hint}")
    encoder.model.load_state_dict(state)
