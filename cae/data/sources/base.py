"""What every source of images offers, and the rules that they share: splits, labels, reasons."""

import io
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from cae.data.shards import Split

logger = logging.getLogger(__name__)

VAL_NAMES = ("val", "valid", "validation", "test")
SPLIT_NAMES = ("train", *VAL_NAMES)
LABEL_COLUMNS = ("label", "labels", "class", "cls", "target", "fine_label")
IMAGE_COLUMNS = ("image", "img", "images", "jpg", "png", "webp")

Reason = Literal[
    "zero bytes",
    "not an image",
    "truncated",
    "too small",
    "too large",
    "unsupported",
    "unreadable",
    "duplicate",
]

_SPLIT_IN_NAME = re.compile(r"(?:^|[^a-z])(train|validation|valid|val|test)(?:ing)?(?:[^a-z]|$)")


class SourceItem(NamedTuple):
    """What a source knows of one image: a name, its class number and its split, where there are any."""

    key: str
    label: int | None
    split: Split | None


class Reject(NamedTuple):
    """A file that is not used, and why: a word of the fixed vocabulary, and a sentence."""

    key: str
    reason: Reason
    detail: str


class Unusable(Exception):  # noqa: N818 (a property of one image; the others go on)
    """Raised by `read` for an image that the source itself knows to be of no use."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception crosses from a loader's worker by its arguments.
        return type(self), (self.reason, str(self))


class Source(Protocol):
    """Items by position, in an order that is the same on every machine. Pickle carries it to loader workers."""

    classes: list[str]  # empty where there are no labels
    strays: list[Reject]  # what lies among the images and was never meant as one; named, but no fault of the data

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> SourceItem: ...

    def read(self, position: int) -> bytes:
        """The encoded image. Errors: Unusable, or OSError for a file that cannot be read."""
        ...


class Table(ABC):
    """Labels and splits of many rows in a few bytes each; a kind of source adds `key` and `read` of a row.

    `labels` are numbers or texts, None or "" for none; `class_names` turns numbers into names. `split_names` are taken
    from SPLIT_NAMES. Rows of a split that is not used do not appear.
    """

    def __init__(
        self,
        where: str,
        num_rows: int,
        labels: Sequence[Any] | None,
        class_names: Sequence[str] | None,
        split_names: Sequence[str | None] | None,
    ) -> None:
        self.strays: list[Reject] = []
        splits = used_splits({name for name in split_names if name}, where) if split_names else {}
        self._is_val: np.ndarray | None = None
        if split_names and splits and None not in split_names:
            self._rows = np.array([row for row, name in enumerate(split_names) if name in splits], dtype=np.int64)
            self._is_val = np.array([splits[split_names[row] or ""] == "val" for row in self._rows], dtype=bool)
        else:
            self._rows = np.arange(num_rows)
        self.classes: list[str] = []
        self._labels = np.empty(0, dtype=np.int32)
        if labels is not None:
            self.classes, self._labels = number_labels([labels[row] for row in self._rows], class_names, where)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> SourceItem:
        split: Split | None = None if self._is_val is None else ("val" if self._is_val[position] else "train")
        label = int(self._labels[position]) if self.classes else None
        return SourceItem(self.key(int(self._rows[position])), label, split)

    def read(self, position: int) -> bytes:
        return self.read_row(int(self._rows[position]))

    @abstractmethod
    def key(self, row: int) -> str:
        """The name of a row's image."""

    @abstractmethod
    def read_row(self, row: int) -> bytes:
        """As `Source.read`, by the row of the table."""


def used_splits(names: Collection[str], where: str) -> dict[str, Split]:
    """Which split names count and as what: `train`, and the first of VAL_NAMES that is there. Empty where one lacks."""
    val = next((name for name in VAL_NAMES if name in names), None)
    if "train" not in names or val is None:
        return {}
    if left_out := sorted(set(names) - {"train", val}):
        logger.warning("%s: %s left out; %s is validation", where, ", ".join(left_out), val)
    return {"train": "train", val: "val"}


def split_in_name(names: Iterable[str]) -> str | None:
    """The split that a file name, or else a folder above it (`names` from the file upwards), stands for."""
    for name in names:
        if match := _SPLIT_IN_NAME.search(name.lower()):
            return match[1]
    return None


def number_labels(
    values: Sequence[Any], class_names: Sequence[str] | None, where: str
) -> tuple[list[str], np.ndarray[Any, np.dtype[np.int32]]]:
    """Class names and the class number of every value; no classes where labels are missing or all the same.

    With `class_names` the values index them and negative ones are missing. Other values are sorted, numbers by size.
    """
    nothing: tuple[list[str], np.ndarray[Any, np.dtype[np.int32]]] = ([], np.empty(0, dtype=np.int32))
    missing = sum(value is None or value == "" or (class_names is not None and value < 0) for value in values)
    if missing:
        if missing < len(values):
            logger.warning("%s: %d of %d images have no label, so none is used", where, missing, len(values))
        return nothing
    if class_names is not None:
        return list(class_names), np.array(values, dtype=np.int32)
    texts = [str(value) for value in values]
    classes = sorted(set(texts), key=_by_number)
    if len(classes) < 2:
        return nothing
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, np.array([numbers[text] for text in texts], dtype=np.int32)


def _by_number(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return float("inf"), text


def glob_files(pattern: Path) -> list[Path]:
    """The files that an absolute pattern with *, ? or ** names, sorted."""
    anchor = Path(pattern.anchor)
    return sorted(path for path in anchor.glob(str(pattern.relative_to(anchor))) if path.is_file())


def png(pixels: np.ndarray) -> bytes:
    """uint8 [h, w] or [h, w, c] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
