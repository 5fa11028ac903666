"""Validation images whose pixels are those of a training image: found by hash, taken out of the shards."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from cae.data.shards import Picture, Row, ShardInfo, ShardWriter, Split
from cae.data.sources import Reject


def pixel_hash(image: Picture) -> int:
    """64 bits of the size and the pixels; at a million images a chance hit has a probability below 1e-7."""
    digest = hashlib.blake2b(digest_size=8)
    for picture in (image,) if isinstance(image, Image.Image) else image:
        digest.update(f"{picture.mode} {picture.size}".encode())
        digest.update(picture.tobytes())
    return int.from_bytes(digest.digest(), "little")


class Hashes:
    """Pixel hashes of the rows of both splits, eight bytes each, in the order in which the rows are written."""

    def __init__(self) -> None:
        self._values: dict[Split, array[int]] = {"train": array("Q"), "val": array("Q")}

    def add(self, split: Split, value: int) -> None:
        self._values[split].append(value)

    def duplicates(self) -> dict[int, int]:
        """Validation rows that are also in training, each with the first training row of the same pixels."""
        train, val = (np.frombuffer(self._values[split], dtype=np.uint64) for split in ("train", "val"))
        known, first_rows = np.unique(train, return_index=True)
        rows = np.flatnonzero(np.isin(val, known))
        return dict(zip(rows.tolist(), first_rows[np.searchsorted(known, val[rows])].tolist(), strict=True))


def remove_duplicates(
    folder: Path, train: Sequence[ShardInfo], val: list[ShardInfo], duplicates: dict[int, int], shard_mb: float
) -> tuple[list[ShardInfo], list[Reject]]:
    """Write the validation shards in `folder` anew without `duplicates`; return the new ones and what was left out."""
    if not duplicates:
        return val, []
    train_keys = _keys(folder, train, set(duplicates.values()))
    rejects = []
    partial = folder / "val-without-duplicates"
    partial.mkdir()
    writer = ShardWriter(partial, "val", shard_mb)
    for number, row in enumerate(_rows(folder, val)):
        if number in duplicates:
            twin = train_keys[duplicates[number]]
            rejects.append(Reject(row.key, "duplicate", f"the same pixels as {twin} of the training split"))
        else:
            writer.add(row)
    shards = writer.close()
    for old in val:
        (folder / old.file).unlink()
    for new in shards:
        (partial / new.file).rename(folder / new.file)
    partial.rmdir()
    return shards, rejects


def _keys(folder: Path, shards: Sequence[ShardInfo], rows: set[int]) -> dict[int, str]:
    """The keys of some rows, read from the shards that hold them."""
    keys: dict[int, str] = {}
    start = 0
    wanted = sorted(rows)
    for shard in shards:
        inside = [row for row in wanted if start <= row < start + shard.count]
        if inside:
            column = _batch(folder, shard).column("key")
            keys |= {row: column[row - start].as_py() for row in inside}
        start += shard.count
    return keys


def _rows(folder: Path, shards: Sequence[ShardInfo]) -> Iterator[Row]:
    for shard in shards:
        batch = _batch(folder, shard)
        for row in range(batch.num_rows):
            yield Row(*(batch.column(name)[row].as_py() for name in Row._fields))


def _batch(folder: Path, shard: ShardInfo) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(folder / shard.file))).get_batch(0)
