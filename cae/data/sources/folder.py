"""Source `folder:PATH`: image files below a folder."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from cae.data.formats import HEAD_BYTES, IMAGE_SUFFIXES, image_kind
from cae.data.shards import Split
from cae.data.sources.base import SPLIT_NAMES, Reject, SourceItem, Unusable, used_splits
from cae.errors import UserError


class Folder:
    """Every image file below a folder. Class sub-folders give labels; images directly in the folder have none.

    A file is an image by its first bytes, or is meant as one by its suffix; every other file is a stray. The suffix
    .npy says nothing, for labels and features have it too. Where the top
    has `train/` and otherwise only `val/`, `valid/`, `validation/` or `test/`, these are the split; of several
    validation folders the first of that list is used and the others are left out with a warning. With `train/` alone
    the split is drawn as usual. A folder in which nothing begins like an image is neither class nor split.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"prepare.source: {folder} is not a folder; give `folder:PATH` with an existing PATH")
        self.folder = folder
        self.strays: list[Reject] = []
        self._unusable: dict[str, Unusable] = {}
        self.keys: list[str] = []
        image_keys = set()
        # By parts, so that a folder's files stay together whatever characters sort before the slash.
        for key in sorted(_files_below(folder), key=lambda key: key.split("/")):
            is_image = self._look(key)
            if is_image:
                image_keys.add(key)
        if not self.keys:
            raise UserError(
                f"prepare.source: {folder} holds no image files ({', '.join(sorted(IMAGE_SUFFIXES))}; or .npy with "
                "uint8 or uint16 [C, H, W]); check the path"
            )
        self._choose_split({key.split("/")[0] for key in image_keys})
        image_keys &= set(self.keys)
        names = {self._class_name(key) for key in image_keys}
        # One image without a class folder means that folders are no classes.
        self.classes = [] if None in names or len(names) < 2 else sorted(name for name in names if name)
        self._numbers = {name: number for number, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, position: int) -> SourceItem:
        key = self.keys[position]
        split: Split | None = self._splits[key.split("/")[0]] if self._splits else None
        return SourceItem(key, self._numbers.get(self._class_name(key) or ""), split)

    def read(self, position: int) -> bytes:
        key = self.keys[position]
        if key in self._unusable:
            raise self._unusable[key]
        return (self.folder / key).read_bytes()

    def _look(self, key: str) -> bool:
        """Put the file among the images or the strays; True when it begins like an image."""
        path = self.folder / key
        meant = is_meant_as_image(path)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                # Reading from a pipe would wait for ever.
                raise Unusable("unreadable", "not a regular file")
            with path.open("rb") as file:
                kind = image_kind(file.read(HEAD_BYTES))
        except OSError as error:
            self._unusable[key] = Unusable("unreadable", _why(path, error))
        except Unusable as error:
            self._unusable[key] = error
        else:
            if kind is None and not meant:
                self.strays.append(Reject(key, "not an image", "neither its first bytes nor its suffix are an image's"))
                return False
            self.keys.append(key)
            return kind is not None
        self.keys.append(key)
        return False

    def _choose_split(self, tops: set[str]) -> None:
        self._splits: dict[str, Split] = {}
        self._has_split_folders = "train" in tops and tops <= set(SPLIT_NAMES)
        if self._has_split_folders:
            self._splits = used_splits(tops, str(self.folder))
        if self._splits:
            self.keys = [key for key in self.keys if key.split("/")[0] in self._splits]

    def _class_name(self, key: str) -> str | None:
        parts = key.split("/")[1 if self._has_split_folders else 0 :]
        return parts[0] if len(parts) > 1 else None


def is_meant_as_image(path: Path) -> bool:
    """By its suffix; `._` files are macOS's notes on a file."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("._")


def image_files(folder: Path) -> list[Path]:
    """All files below `folder` that are meant as images or begin like one, in order."""
    keys = sorted(_files_below(folder), key=lambda key: key.split("/"))
    return [folder / key for key in keys if is_meant_as_image(folder / key) or _begins_like_an_image(folder / key)]


def _begins_like_an_image(path: Path) -> bool:
    # Opening a pipe would wait for ever.
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return image_kind(file.read(HEAD_BYTES)) is not None
    except OSError:
        return False


def _files_below(folder: Path) -> Iterator[str]:
    """Relative paths of all that is no folder, through linked folders too, and of folders that cannot be opened."""
    pending: list[tuple[Path, str, tuple[Path, ...]]] = [(folder, "", (folder.resolve(),))]
    while pending:
        place, prefix, above = pending.pop()
        try:
            entries = list(os.scandir(place))
        except OSError:
            # As a name of its own it is opened, fails in the same way, and is reported with the cause.
            yield prefix.rstrip("/")
            continue
        for entry in entries:
            if not entry.is_dir():
                yield prefix + entry.name
                continue
            real = Path(entry.path).resolve()
            if real not in above:  # a link to a folder above would never end
                pending.append((Path(entry.path), f"{prefix}{entry.name}/", (*above, real)))


def _why(path: Path, error: OSError) -> str:
    if path.is_symlink() and not path.exists():
        return f"a link to {path.readlink()}, which is not there"
    return str(error.strerror)
