"""Which images are alike, by the features that `cae-pipe embed` wrote.

Similarity is the cosine after the mean of the set is subtracted. An encoder's features share a large common direction:
on 1,500 MNIST digits the median cosine of two images is 0.75 for `pooled` and 0.92 for `class_token`, and 0 for both
once centred. The nearest neighbour is of the same class as often either way (0.77 of the time); what centring gives is
a threshold that means the same for every encoder and output.
"""

import json
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.neighbors import NearestNeighbors

from cae.errors import NotReady, UserError
from pipeline.contact_sheet import Cell, draw_sheet
from pipeline.inference import PICTURE_SUFFIXES, check_out, open_bundle, read_image
from serving.bundle import Device
from serving.bundle_info import Output

logger = logging.getLogger(__name__)

COMPARED = ("pooled", "class_token")
# The mean of fewer images is not what all images share but what these images are.
FEW_IMAGES = 10
# Of the similarities of one block of pairs, and of the pairs that wait to be joined.
BLOCK_BYTES = 64 * 2**20
MAX_JOINING = 1_000_000
# Of a sum of products in float32.
ROUNDING = 1e-6
SHOWN_GROUPS = 30


@dataclass(frozen=True)
class Match:
    """An image and its similarity, -1 to 1: to the query, or to the nearest other image of its group."""

    path: str
    similarity: float
    is_query: bool = False


@dataclass(frozen=True)
class Found:
    """What a search found: rows of matches, one row for a query, one for each group of near-duplicates."""

    feature: str
    centered: bool
    num_images: int
    rows: list[list[Match]]
    query: str | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Features:
    """One output of the encoder for a set of images: `values` float32 [N, D]."""

    file: Path
    name: str
    paths: list[str]
    values: NDArray[np.float32]
    bundle_sha256: str | None

    @classmethod
    def read(cls, file: Path, name: str | None) -> "Features":
        """Read a .parquet or .npz of `cae-pipe embed`; `name` is the output to take, by default the first of COMPARED.

        Raises UserError for a file of another kind or without the output, NotReady where there is none.
        """
        if not file.exists():
            raise NotReady(f"{file}: no such file; write it with `cae-pipe embed IMAGES --out {file}` first")
        columns, metadata = _read_npz(file) if file.suffix == ".npz" else _open_parquet(file)
        names = [name] if name else list(COMPARED)
        chosen = next((known for known in names if known in columns), None)
        if chosen is None or "path" not in columns:
            missing = "path" if chosen else " or ".join(names)
            raise UserError(
                f"{file}: has the columns {', '.join(columns)} and no {missing}; write it again with "
                f"`cae-pipe embed IMAGES --out {file} --outputs {names[0]}`"
            )
        paths, values = columns["path"](), columns[chosen]()
        if values.ndim != 2 or len(values) == 0 or len(values) != len(paths) or not np.isfinite(values).all():
            raise UserError(
                f"{file}: {chosen} is {list(values.shape)} for {len(paths)} paths; expected one row of finite numbers "
                "for each path. Write the file again with `cae-pipe embed`"
            )
        return cls(file, chosen, paths, values, metadata.get("bundle_sha256"))


def neighbors(features: Features, image: Path, bundle: Path, device: Device, top: int, *, center: bool) -> Found:
    """The `top` images nearest to `image`; the image itself, where it is in the set, comes first and beside them."""
    query = _embed_query(features, image, bundle, device)
    space = _Space.of(features, center)
    count = min(top + 1, len(features.paths))
    index = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(space.apply(features.values))
    distances, positions = index.kneighbors(space.apply(query))
    itself = image.resolve()
    matches = []
    for distance, position in zip(distances[0], positions[0], strict=True):
        path = features.paths[position]
        matches.append(Match(path, _similarity(distance), Path(path).resolve() == itself))
    others = [match for match in matches if not match.is_query][:top]
    row = [match for match in matches if match.is_query] + others
    return Found(features.name, space.centered, len(features.paths), [row], query=str(image))


def near_duplicates(features: Features, threshold: float, *, center: bool) -> Found:
    """Groups of images joined by pairs at least `threshold` alike; the largest group first."""
    space = _Space.of(features, center)
    unit = space.apply(features.values)
    groups, nearest = _components(unit, threshold)
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    rows = [
        sorted((Match(features.paths[i], float(nearest[i])) for i in group), key=lambda m: (-m.similarity, m.path))
        for group in members
        if len(group) > 1
    ]
    rows.sort(key=lambda row: (-len(row), -row[0].similarity, row[0].path))
    return Found(features.name, space.centered, len(features.paths), rows, threshold=threshold)


def show(found: Found, *, as_json: bool, contact_sheet: Path | None) -> None:
    """Print what was found, as a table or JSON, and draw it where `contact_sheet` names a file."""
    if contact_sheet is not None:
        check_out(contact_sheet, PICTURE_SUFFIXES, "--contact-sheet")
        rows = [[Cell(found.query, "query")]] if found.query else []
        for group in found.rows[:SHOWN_GROUPS]:
            cells = [Cell(m.path, "itself" if m.is_query else f"{m.similarity:.3f}") for m in group]
            rows = [rows[0] + cells] if found.query else [*rows, cells]
        draw_sheet(rows).save(contact_sheet)
        logger.info("%s written", contact_sheet)
    if as_json:
        sys.stdout.write(json.dumps(_as_json(found), indent=2) + "\n")
    else:
        _print(found)


class _Space:
    """Vectors whose distance tells the cosine: centred on the set's mean if wished, and of length 1."""

    def __init__(self, mean: NDArray[np.float32], centered: bool) -> None:
        self.mean, self.centered = mean, centered

    @classmethod
    def of(cls, features: Features, center: bool) -> "_Space":
        if center and len(features.paths) < FEW_IMAGES:
            logger.warning(
                "%s holds %d images, too few for a mean; similarities are not centred",
                features.file,
                len(features.paths),
            )
            center = False
        mean = features.values.mean(axis=0, dtype=np.float64).astype(np.float32)
        return cls(mean if center else np.zeros_like(mean), center)

    def apply(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """[N, D] to [N, D + 1]: the last number is 1 for what equals the mean, which has no direction of its own."""
        moved = values - self.mean
        length = np.linalg.norm(moved, axis=1, keepdims=True)
        none = length <= 1e-5 * np.linalg.norm(values, axis=1, keepdims=True)
        unit = np.where(none, 0, moved / np.where(none, 1, length))
        return np.concatenate([unit, none], axis=1, dtype=np.float32)


def _components(unit: NDArray[np.float32], threshold: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The group of each row, and its similarity to the nearest other row.

    Pairs are met block by block, and only those that join two groups are kept, until there are enough of them to join:
    100,000 equal images have 10^10 pairs.
    """
    num_rows = len(unit)
    groups = np.arange(num_rows)
    nearest = np.empty(num_rows, np.float32)
    joining: list[NDArray[np.int64]] = []
    num_joining = 0
    block = max(1, BLOCK_BYTES // (unit.itemsize * num_rows))
    for start in range(0, num_rows, block):
        similarities = unit[start : start + block] @ unit.T
        rows = np.arange(start, start + len(similarities))
        similarities[rows - start, rows] = -1
        nearest[rows] = similarities.max(axis=1)
        for row in rows[nearest[rows] >= threshold - ROUNDING]:
            near = np.flatnonzero(similarities[row - start] >= threshold - ROUNDING)
            near = near[groups[near] != groups[row]]
            joining.append(np.stack([np.full_like(near, row), near]))
            num_joining += len(near)
            if num_joining > MAX_JOINING:
                groups, joining, num_joining = _join(groups, joining), [], 0
    return _join(groups, joining), np.minimum(nearest, 1)


def _join(groups: NDArray[np.int64], pairs: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The groups after joining those of each pair; a group is known by its first member."""
    itself = np.arange(len(groups))
    heads, tails = np.concatenate([*pairs, np.stack([itself, groups])], axis=1)
    graph = coo_array((np.ones(len(heads), np.int8), (heads, tails)), shape=(len(groups), len(groups)))
    _, labels = connected_components(graph, directed=False)
    _, first = np.unique(labels, return_index=True)
    return first[labels]


def _embed_query(features: Features, image: Path, folder: Path, device: Device) -> NDArray[np.float32]:
    bundle = open_bundle(folder, device)
    if features.bundle_sha256 is None:
        logger.warning("%s does not say which bundle made it; it is taken for %s", features.file, folder)
    elif features.bundle_sha256 != bundle.sha256:
        raise UserError(
            f"{features.file}: made by bundle {features.bundle_sha256[:12]}…, but {folder} is {bundle.sha256[:12]}…; "
            f"features of two models cannot be compared. Write them again with `cae-pipe embed IMAGES --out "
            f"{features.file} --bundle {folder}`, or name the bundle that made them with --bundle"
        )
    pixels = read_image(image, bundle.info.preprocessing)
    name: Output = "pooled" if features.name == "pooled" else "class_token"
    query = bundle.embed(pixels[None], [name])[name]
    if query.shape[1] != features.values.shape[1]:
        raise UserError(
            f"{features.file}: {features.name} is {features.values.shape[1]} wide, the bundle's {query.shape[1]}; "
            "write the features again with `cae-pipe embed`"
        )
    return query


def _open_parquet(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """For each column a function that reads it (the patches of 100,000 images need not be loaded), and the metadata."""
    try:
        schema = parquet.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{file}: not a parquet file ({error}); expected what `cae-pipe embed --out FILE.parquet` (or .npz) writes"
        ) from None

    def reader(name: str) -> Any:
        def read() -> Any:
            column = parquet.read_table(file, columns=[name])[name]
            if name == "path":
                return column.to_pylist()
            if not pa.types.is_fixed_size_list(column.type) or column.null_count:
                raise UserError(f"{file}: {name} is {column.type}; expected lists of numbers, all of one length")
            # By chunks: one array of all values may pass the 2^31 that its offsets can count.
            parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
            return np.concatenate(parts).reshape(len(column), -1).astype(np.float32, copy=False)

        return read

    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items() if key[:6] == b"bundle"}
    return {name: reader(name) for name in schema.names}, metadata


def _read_npz(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if name in ("path", "bundle_sha256", *COMPARED)}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: not an .npz of `cae-pipe embed` ({error}); write it again") from None
    sha256 = arrays.pop("bundle_sha256", None)
    columns: dict[str, Any] = {name: (lambda values=values: values) for name, values in arrays.items()}
    if "path" in arrays:
        columns["path"] = lambda: [str(path) for path in arrays["path"]]
    return columns, {} if sha256 is None else {"bundle_sha256": str(sha256)}


def _similarity(distance: float) -> float:
    return float(1 - distance**2 / 2)


def _as_json(found: Found) -> dict[str, Any]:
    about = {"feature": found.feature, "centered": found.centered, "num_images": found.num_images}
    rows = [[{**asdict(match), "similarity": round(match.similarity, 6)} for match in row] for row in found.rows]
    if found.query is not None:
        return {**about, "query": found.query, "neighbors": rows[0]}
    groups = [[{key: match[key] for key in ("path", "similarity")} for match in row] for row in rows]
    return {**about, "threshold": found.threshold, "groups": groups}


def _print(found: Found) -> None:
    console = Console()
    about = f"{found.num_images} images by {found.feature}, {'centred' if found.centered else 'not centred'}"
    if found.query is not None:
        table = Table("similarity", "image", title=f"Nearest to {found.query}", caption=about)
        for match in found.rows[0]:
            table.add_row(
                f"{match.similarity:.4f}", f"{match.path} (the image itself)" if match.is_query else match.path
            )
        console.print(table)
        return
    if not found.rows:
        console.print(
            f"no two images are {found.threshold} alike or more ({about}); lower --threshold to see closer ones"
        )
        return
    table = Table("group", "nearest", "image", title=f"Alike by {found.threshold} or more", caption=about)
    for number, row in enumerate(found.rows, 1):
        for position, match in enumerate(row):
            last = position == len(row) - 1
            table.add_row(str(number) if not position else "", f"{match.similarity:.4f}", match.path, end_section=last)
    console.print(table)
