"""Source `hf:NAME`: a data set of the Hugging Face hub, or one in a folder."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from cae.data.sources.base import IMAGE_COLUMNS, LABEL_COLUMNS, SPLIT_NAMES, Table, Unusable, used_splits
from cae.errors import UserError

logger = logging.getLogger(__name__)


class HubDataset(Table):
    """`name`, `user/name` or either with `:config` through the `datasets` library; or a folder that it can load.

    The first feature of type Image is used, encoded as it is, and the first ClassLabel, or else a column called label.
    """

    def __init__(self, name: str, folder: Path) -> None:
        splits = _load(name, folder)
        used = used_splits([split for split in splits if split in SPLIT_NAMES], f"hf:{name}")
        if not used:
            first = "train" if "train" in splits else min(splits)
            if len(splits) > 1:
                logger.warning("hf:%s: only the split %s of %s is used", name, first, ", ".join(splits))
            used = {first: "train"}
        features = splits[next(iter(used))].features
        self.column, label = _image_column(name, features), _label_column(features)
        self.names = list(used)
        self.parts = [_undecoded(splits[split], self.column) for split in used]
        self._ends = np.cumsum([len(part) for part in self.parts])
        labels = None
        if label is not None:
            labels = [value for split in used for value in splits[split].select_columns([label])[:][label]]
        names = [split for split, part in zip(used, self.parts, strict=True) for _ in range(len(part))]
        class_names = getattr(features[label], "names", None) if label else None
        super().__init__(f"hf:{name}", int(self._ends[-1]), labels, class_names, names)

    def key(self, row: int) -> str:
        part, within = self._locate(row)
        return f"{self.names[part]}/{within:07d}"

    def read_row(self, row: int) -> bytes:
        part, within = self._locate(row)
        cell = self.parts[part][within][self.column]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise Unusable("zero bytes", "the row holds no image")
        return Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]

    def _locate(self, row: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, row, side="right"))
        return part, row - (int(self._ends[part - 1]) if part else 0)


def _load(name: str, folder: Path) -> dict[str, Any]:
    """The splits of a data set, by name."""
    import datasets  # the import takes seconds, which other sources need not wait

    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            loaded = datasets.load_from_disk(str(folder))
        elif folder.is_dir():
            loaded = datasets.load_dataset(str(folder))
        else:
            repository, _, config = name.partition(":")
            loaded = datasets.load_dataset(repository, config or None)
    except Exception as error:  # the library, its readers and its HTTP client raise errors of many types
        raise UserError(
            f"prepare.source: hf:{name} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}). "
            "Expected a data set of huggingface.co/datasets such as `hf:user/name` or `hf:name:config`, or a folder "
            "made by `save_to_disk`. Check the name and the network, log in with `hf auth login` for a private one, or "
            "load it once where there is a network and copy the folder"
        ) from None
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _image_column(name: str, features: Any) -> str:
    import datasets

    found = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    found += [column for column in IMAGE_COLUMNS if column in features and column not in found]
    if not found:
        raise UserError(f"prepare.source: hf:{name} has the features {', '.join(features)}; expected one of type Image")
    return found[0]


def _label_column(features: Any) -> str | None:
    import datasets

    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    known = [column for column in LABEL_COLUMNS if column in features]
    return next((column for column in known if column in classes), next(iter(classes + known), None))


def _undecoded(part: Any, column: str) -> Any:
    """Only the images, as bytes and path; the library would otherwise decode them by rules of its own."""
    import datasets

    return part.select_columns([column]).cast_column(column, datasets.Image(decode=False))
