"""Features and reconstructions from the command line, by the same bundle and the same code as the server."""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from tqdm import tqdm

from cae.data.sources.folder import image_files
from cae.errors import NotReady, UserError
from serving.bundle import Bundle, CapabilityError, Device
from serving.bundle_info import OUTPUTS, BundleError, BundleMissingError, Output
from serving.masks import MaskKind, View, draw
from serving.preprocess import PILLOW_MAX_PIXELS, ImageError, Preprocessing, decode, prepare

logger = logging.getLogger(__name__)

OUT_SUFFIXES = (".parquet", ".npz")
PICTURE_SUFFIXES = (".png", ".jpg", ".webp")


def open_bundle(folder: Path, device: Device) -> Bundle:
    """The bundle in `folder`; UserError says what is wrong with it and what to do."""
    try:
        return Bundle.open(folder, device)
    except BundleMissingError as error:
        raise NotReady(str(error)) from None
    except BundleError as error:
        raise UserError(str(error)) from None


def parse_outputs(text: str) -> list[Output]:
    """Names of outputs from a comma-separated list."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in OUTPUTS:
            raise UserError(f"--outputs: {name!r} is none of {', '.join(OUTPUTS)}")
    return [output for output in OUTPUTS if output in names]


def embed(bundle: Bundle, images: Sequence[Path], out: Path, outputs: Sequence[Output], batch_size: int) -> list[Path]:
    """Write the features of `images` (files, or folders searched for images) to `out`; return the files left out.

    A file that cannot be read is left out with a warning, and the others are written all the same. Raises UserError
    for an unknown kind of output file, a missing path, or when no image at all can be read.
    """
    check_out(out, OUT_SUFFIXES)
    files = find_images(images)
    left_out: list[Path] = []
    writer = _ParquetWriter(out, bundle) if out.suffix == ".parquet" else _NpzWriter(out, bundle)
    readable = _read(bundle, tqdm(files, desc="embed", unit="image", disable=None), left_out)
    while group := list(islice(readable, batch_size)):
        features = bundle.embed(np.stack([pixels for _, pixels in group]), outputs)
        writer.add([str(path) for path, _ in group], features)
    if len(left_out) == len(files):
        raise UserError(f"none of the {len(files)} images could be read; nothing was written")
    writer.close()
    logger.info("%d images written to %s", len(files) - len(left_out), out)
    return left_out


def reconstruct(
    bundle: Bundle,
    image: Path,
    out: Path,
    *,
    mask_kind: MaskKind,
    mask_ratio: float | None,
    seed: int,
    view: View,
    skip_regressor: bool,
) -> None:
    """Write the picture of a reconstruction, the same as `POST /reconstruct` answers."""
    check_out(out, PICTURE_SUFFIXES)
    pixels = read_image(image, bundle.info.preprocessing)
    model = bundle.info.model
    masked = None
    try:
        if skip_regressor:
            result = bundle.skip_reconstruct(pixels[None])[0]
        else:
            _, (visible, masked) = bundle.draw_mask(mask_kind, mask_ratio, seed)
            result = bundle.reconstruct(pixels[None], visible[None], masked[None])[0]
    except CapabilityError as error:
        raise UserError(str(error)) from None
    draw(view, pixels, result, masked, model.patch_size).save(out)
    logger.info("%s written", out)


def read_image(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    """Pixels uint8 [c, h, w] of an image file as the model sees them; UserError where it cannot be read."""
    try:
        return _pixels(path, preprocessing)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ImageError as error:
        raise UserError(f"{path}: {error}") from None


def _pixels(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    return prepare(decode(path.read_bytes(), max_pixels=PILLOW_MAX_PIXELS), preprocessing)


def check_out(out: Path, suffixes: tuple[str, ...], option: str = "--out") -> None:
    """Raise UserError, before any work, for a file that could not be written."""
    if out.suffix not in suffixes:
        raise UserError(f"{option}: {out} must end in {' or '.join(suffixes)}")
    if not out.parent.is_dir():
        raise UserError(f"{option}: there is no folder {out.parent}; make it first")


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths` and the image files below the folders among them, in order."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += image_files(path)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    if not files:
        raise UserError(f"no image files below {', '.join(map(str, paths))}")
    return files


def _read(bundle: Bundle, files: Sequence[Path], left_out: list[Path]) -> Iterator[tuple[Path, np.ndarray]]:
    for path in files:
        try:
            yield path, _pixels(path, bundle.info.preprocessing)
        except (ImageError, OSError) as error:
            logger.warning("%s is left out: %s", path, error)
            left_out.append(path)


class _ParquetWriter:
    """Rows of (path, one column an output), written batch by batch; the shapes stand in the schema's metadata."""

    def __init__(self, out: Path, bundle: Bundle) -> None:
        self.out, self.bundle = out, bundle
        self.temporary = out.with_name(out.name + ".tmp")
        self.writer: parquet.ParquetWriter | None = None

    def add(self, paths: list[str], features: dict[Output, Any]) -> None:
        columns: dict[str, pa.Array] = {"path": pa.array(paths)}
        metadata = {"bundle_sha256": self.bundle.sha256}
        for name, values in features.items():
            flat = values.reshape(len(values), -1)
            columns[name] = pa.FixedSizeListArray.from_arrays(flat.reshape(-1), flat.shape[1])
            metadata[f"{name}_shape"] = "x".join(map(str, values.shape[1:]))
        table = pa.table(columns).replace_schema_metadata(metadata)
        if self.writer is None:
            self.writer = parquet.ParquetWriter(self.temporary, table.schema)
        self.writer.write_table(table)

    def close(self) -> None:
        assert self.writer is not None
        self.writer.close()
        self.temporary.replace(self.out)


class _NpzWriter:
    """Arrays `path`, `bundle_sha256` and one an output, in memory until the end, as the format wants it."""

    def __init__(self, out: Path, bundle: Bundle) -> None:
        self.out, self.bundle = out, bundle
        self.paths: list[str] = []
        self.features: dict[str, list[np.ndarray]] = {}

    def add(self, paths: list[str], features: dict[Output, Any]) -> None:
        self.paths += paths
        for name, values in features.items():
            self.features.setdefault(name, []).append(values)

    def close(self) -> None:
        arrays: dict[str, Any] = {name: np.concatenate(parts) for name, parts in self.features.items()}
        np.savez(self.out, path=np.array(self.paths), bundle_sha256=np.array(self.bundle.sha256), **arrays)
