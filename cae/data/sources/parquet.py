"""Source `parquet:PATH`: images in the rows of parquet files."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from cae.data.sources.base import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    SPLIT_NAMES,
    Table,
    Unusable,
    glob_files,
    split_in_name,
)
from cae.errors import UserError

BATCH_ROWS = 64


class ParquetFiles:
    """The image column of several files, by row. A row group is decoded from its start on, a few rows at a time.

    Rows are cheap in rising order, which is how they are asked for; memory holds one batch, never a file.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.groups: list[tuple[int, int]] = []  # (file, row group)
        self.first_rows: list[int] = []  # of each file
        counts: list[int] = []
        self.schema = _open(self.files[0]).schema_arrow
        for number, path in enumerate(self.files):
            opened = _open(path)
            self.name = _find(IMAGE_COLUMNS, opened.schema_arrow.names)
            if self.name is None:
                raise UserError(
                    f"prepare.source: {path} has the columns {', '.join(opened.schema_arrow.names)}; "
                    f"expected one of {', '.join(IMAGE_COLUMNS)} with the images"
                )
            self.first_rows.append(sum(counts))
            for group in range(opened.num_row_groups):
                self.groups.append((number, group))
                counts.append(opened.metadata.row_group(group).num_rows)
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._cursor: _Cursor | None = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        # An open file does not travel to a loader's worker.
        return {**self.__dict__, "_cursor": None}

    def column(self, name: str) -> list[Any]:
        """A small column of all rows, such as the labels."""
        values: list[Any] = []
        for path in self.files:
            opened = _open(path)
            if name not in opened.schema_arrow.names:
                raise UserError(
                    f"prepare.source: {path} has the columns {', '.join(opened.schema_arrow.names)}; expected {name}"
                )
            values += opened.read([name]).column(name).to_pylist()
        return values

    def file_of(self, row: int) -> tuple[Path, int]:
        """The file of a row, and the row's number in it."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        number = self.groups[group][0]
        return self.files[number], row - self.first_rows[number]

    def read(self, row: int) -> bytes:
        group = int(np.searchsorted(self._ends, row, side="right"))
        within = row - (int(self._ends[group - 1]) if group else 0)
        if self._cursor is None or not self._cursor.reaches(group, within):
            number, row_group = self.groups[group]
            opened = _open(self.files[number])
            batches = opened.iter_batches(BATCH_ROWS, row_groups=[row_group], columns=[self.name])
            self._cursor = _Cursor(group, batches, self.files[number])
        return _image_bytes(self._cursor.cell(within), self.files[self.groups[group][0]].parent)


class _Cursor:
    """Where reading stands inside one row group."""

    def __init__(self, group: int, batches: Iterator[pa.RecordBatch], path: Path) -> None:
        self.group, self.batches, self.path = group, batches, path
        self.first = 0
        self.cells: pa.Array | None = None

    def reaches(self, group: int, row: int) -> bool:
        return group == self.group and row >= self.first

    def cell(self, row: int) -> Any:
        while self.cells is None or row >= self.first + len(self.cells):
            self.first += 0 if self.cells is None else len(self.cells)
            try:
                self.cells = next(self.batches).column(0)
            except (OSError, pa.ArrowException) as error:
                raise Unusable("unreadable", f"{self.path.name} is damaged: {error}") from None
        return self.cells[row - self.first].as_py()


class Parquet(Table):
    """Rows of one file, of the files below a folder, or of a glob, in the order of their names.

    Labels are numbers or texts, with the class names that `datasets` leaves in the schema. The split comes from a
    column `split`, or from the names of the files.
    """

    def __init__(self, location: Path) -> None:
        files = parquet_files(location)
        self.root = location if location.is_dir() else location.parent
        self.files = ParquetFiles(files)
        columns = self.files.schema.names
        label = _find(LABEL_COLUMNS, columns)
        labels = self.files.column(label) if label else None
        if "split" in columns:
            splits: list[str | None] = self.files.column("split")
            if unknown := {str(name) for name in splits} - set(SPLIT_NAMES):
                raise UserError(
                    f"prepare.source: {location}, column split: {min(unknown)!r} is unknown; "
                    f"expected one of {', '.join(SPLIT_NAMES)}"
                )
        else:
            splits = []
            for path in files:
                relative = path.relative_to(self.root) if path.is_relative_to(self.root) else path
                splits += [split_in_name(reversed(relative.parts))] * _open(path).metadata.num_rows
        super().__init__(
            str(location), len(self.files), labels, class_names(self.files.schema, label) if label else None, splits
        )

    def key(self, row: int) -> str:
        path, number = self.files.file_of(row)
        name = path.relative_to(self.root) if path.is_relative_to(self.root) else Path(path.name)
        return f"{name.with_suffix('').as_posix()}/{number:06d}"

    def read_row(self, row: int) -> bytes:
        return self.files.read(row)


def class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """The names of a ClassLabel as `datasets` writes them into the schema, or None."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        return info["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None


def _image_bytes(cell: Any, folder: Path) -> bytes:
    # `datasets` writes a struct of bytes and path, either of which may be empty; other writers the bytes alone.
    if isinstance(cell, dict):
        data, path = cell.get("bytes"), cell.get("path")
        if data is None and path:
            return (folder / path).read_bytes()
        cell = data
    if cell is None:
        raise Unusable("zero bytes", "the row holds no image")
    if not isinstance(cell, bytes):
        raise Unusable("unsupported", f"the row holds {type(cell).__name__}; expected the bytes of an image file")
    return cell


def parquet_files(location: Path) -> list[Path]:
    """What a file, a folder or a glob names, sorted; UserError where that is nothing."""
    if location.is_dir():
        files = sorted(location.rglob("*.parquet"))
    elif location.is_file():
        files = [location]
    else:
        files = glob_files(location)
    if not files:
        raise UserError(
            f"prepare.source: no parquet file at {location}; give `parquet:PATH` with a file, a folder or a glob"
        )
    return files


def _open(path: Path) -> parquet.ParquetFile:
    try:
        return parquet.ParquetFile(path, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"prepare.source: {path} cannot be read as parquet ({error}); mend it or take it away"
        ) from None


def _find(known: Sequence[str], columns: Sequence[str]) -> str | None:
    return next((name for name in known if name in columns), None)
