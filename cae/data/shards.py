"""Prepared images on disk: Arrow IPC files, memory-mapped, read in any order without unpacking.

One row is (key, label, image): the encoded image as it will be decoded in training. The files are plain Arrow, so
pyarrow, polars and `datasets` read them too.
"""

import hashlib
import io
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from cae.errors import NotReady, UserError

Split = Literal["train", "val"]
UNLABELLED = -1
Picture = Image.Image | tuple[Image.Image, ...]
"""A stored image: mode L for one channel, RGB for three, for another number one picture of mode L a channel."""
SCHEMA = pa.schema([("key", pa.string()), ("label", pa.int32()), ("image", pa.binary())])
INDEX_NAME = "index.json"
MAX_OPEN = 512  # shards mapped at a time in a process: a map holds a file handle and addresses


class Row(NamedTuple):
    """One prepared image: where it came from, its class number or UNLABELLED, its encoded bytes."""

    key: str
    label: int
    image: bytes


class ShardInfo(BaseModel):
    """One file of the prepared data."""

    model_config = ConfigDict(extra="forbid")

    file: str
    split: Split
    count: int
    bytes: int
    sha256: str


class Index(BaseModel):
    """index.json of the prepared data."""

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    source: str
    count: dict[Split, int]
    classes: list[str]  # empty where the source has no labels
    channels: int
    mean: list[float]  # of each channel over the training images, pixels in 0-1
    std: list[float]
    shards: list[ShardInfo]
    hash: str  # of the shards' hashes, in order

    @classmethod
    def read(cls, folder: Path) -> "Index":
        path = folder / INDEX_NAME
        if not path.exists():
            raise NotReady(f"{path}: no prepared data; run `dvc repro prepare` (or `make repro`) first")
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise UserError(f"{path}: damaged ({error}); run `dvc repro --force prepare` to make it again") from None

    def write(self, folder: Path) -> None:
        (folder / INDEX_NAME).write_text(self.model_dump_json(indent=2) + "\n")


class ShardWriter:
    """Writes rows of one split into files of about `shard_mb` megabytes; the bytes depend on the rows alone."""

    def __init__(self, folder: Path, split: Split, shard_mb: float) -> None:
        self.folder, self.split = folder, split
        self.limit_bytes = int(shard_mb * 1e6)
        self.shards: list[ShardInfo] = []
        self._rows: list[Row] = []
        self._bytes = 0

    def add(self, row: Row) -> None:
        self._rows.append(row)
        self._bytes += len(row.image)
        if self._bytes >= self.limit_bytes:
            self._flush()

    def close(self) -> list[ShardInfo]:
        """Write what is left and return every file written."""
        if self._rows:
            self._flush()
        return self.shards

    def _flush(self) -> None:
        path = self.folder / f"{self.split}-{len(self.shards):05d}.arrow"
        keys, labels, images = zip(*self._rows, strict=True)
        batch = pa.record_batch(
            [pa.array(keys, pa.string()), pa.array(labels, pa.int32()), pa.array(images, pa.binary())], schema=SCHEMA
        )
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_batch(batch)
        self.shards.append(
            ShardInfo(
                file=path.name,
                split=self.split,
                count=len(self._rows),
                bytes=path.stat().st_size,
                sha256=file_sha256(path),
            )
        )
        self._rows, self._bytes = [], 0


class ImageShards:
    """The images of one split, by position.

    Files are mapped on first use in each process, never loaded whole; those longest unused are closed.
    """

    def __init__(self, folder: Path, split: Split) -> None:
        self.folder = folder
        self.index = Index.read(folder)
        self.infos = [shard for shard in self.index.shards if shard.split == split]
        self._ends = np.cumsum([shard.count for shard in self.infos])
        self._batches: OrderedDict[int, pa.RecordBatch] = OrderedDict()

    @property
    def counts(self) -> list[int]:
        """Images of each shard."""
        return [shard.count for shard in self.infos]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        # Arrow would copy the mapped bytes into the pickle that goes to a loader worker.
        return {**self.__dict__, "_batches": OrderedDict()}

    def image(self, position: int) -> Picture:
        """The decoded image."""
        batch, row = self._locate(position)
        return decode_stored(batch.column("image")[row].as_buffer(), self.index.channels)

    def key(self, position: int) -> str:
        batch, row = self._locate(position)
        return batch.column("key")[row].as_py()

    def place(self, position: int) -> str:
        """An image by its key and its file, for messages."""
        file = self.infos[int(np.searchsorted(self._ends, position, side="right"))].file
        return f"image {self.key(position)} in {self.folder / file}"

    def label(self, position: int) -> int:
        batch, row = self._locate(position)
        return batch.column("label")[row].as_py()

    def labels(self) -> Iterator[np.ndarray]:
        """Labels of all images in order, a shard at a time."""
        for shard in range(len(self.infos)):
            yield self._batch(shard).column("label").to_numpy()

    def _locate(self, position: int) -> tuple[pa.RecordBatch, int]:
        shard = int(np.searchsorted(self._ends, position, side="right"))
        start = int(self._ends[shard - 1]) if shard else 0
        return self._batch(shard), position - start

    def _batch(self, shard: int) -> pa.RecordBatch:
        if shard not in self._batches:
            path = self.folder / self.infos[shard].file
            try:
                self._batches[shard] = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
            except (OSError, pa.ArrowInvalid) as error:
                raise UserError(
                    f"{path}: cannot be read as a shard ({error}); run `dvc repro --force prepare` to make it again"
                ) from None
            if len(self._batches) > MAX_OPEN:
                self._batches.popitem(last=False)
        self._batches.move_to_end(shard)
        return self._batches[shard]


def decode_stored(data: bytes, channels: int) -> Picture:
    """The image of a row: encoded by Pillow for 1 and 3 channels, else a NumPy file with uint8 [c, h, w]."""
    if channels in (1, 3):
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("L" if channels == 1 else "RGB")
    return tuple(Image.fromarray(band) for band in np.load(io.BytesIO(data), allow_pickle=False))


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
