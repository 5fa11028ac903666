"""Source `csv:PATH`: a table of image files."""

import csv
from pathlib import Path

from cae.data.sources.base import SPLIT_NAMES, Table
from cae.errors import UserError

PATH_COLUMNS = ("path", "image", "file", "file_name", "filename")


class Manifest(Table):
    """The files that a CSV table names in `path` (or `image`, `file`), with `label` and `split` where it has them.

    Paths are absolute or relative to the table's folder. A file that is not there fails when it is read.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.paths: list[str] = []
        labels: list[str] = []
        splits: list[str | None] = []
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                columns = list(reader.fieldnames or [])
                name = next((name for name in PATH_COLUMNS if name in columns), None)
                if name is None:
                    raise UserError(
                        f"prepare.source: {path}, line 1: no column `path` (or image, file) among "
                        f"{', '.join(columns) or 'none'}; expected a comma-separated table with a header line"
                    )
                for row in reader:
                    self.paths.append(_cell(path, reader.line_num, row, name))
                    labels.append((row.get("label") or "").strip())
                    splits.append(_split(path, reader.line_num, row) if "split" in columns else None)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"prepare.source: {path}: cannot be read as CSV ({reason}); give `csv:PATH`") from None
        if not self.paths:
            raise UserError(f"prepare.source: {path} names no image; expected one line for each below the header")
        super().__init__(
            str(path),
            len(self.paths),
            labels if "label" in columns else None,
            None,
            splits if "split" in columns else None,
        )

    def key(self, row: int) -> str:
        return self.paths[row]

    def read_row(self, row: int) -> bytes:
        return (self.folder / self.paths[row]).read_bytes()


def _cell(path: Path, line: int, row: dict[str, str], name: str) -> str:
    value = (row[name] or "").strip()
    if not value:
        raise UserError(f"prepare.source: {path}, line {line}, column {name}: empty; expected the path of an image")
    return value


def _split(path: Path, line: int, row: dict[str, str]) -> str:
    value = (row["split"] or "").strip().lower()
    if value not in SPLIT_NAMES:
        raise UserError(
            f"prepare.source: {path}, line {line}, column split: {value!r} is unknown; "
            f"expected one of {', '.join(SPLIT_NAMES)}"
        )
    return value
