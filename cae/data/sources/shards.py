"""Source `wds:PATTERN`: WebDataset shards, tar files in which the parts of a sample share a name."""

import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cae.data.sources.base import Reason, Reject, Table, Unusable, glob_files, split_in_name
from cae.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
MAX_LABEL_BYTES = 1 << 20


class _Part(NamedTuple):
    """A member of a tar file."""

    extension: str
    offset: int
    size: int


class WebDataset(Table):
    """Samples of local tar files, in the order of the files and of the members in them.

    A sample's label is its `cls`, or the `label` of its `json`. The split comes from the names of the shards. Only
    headers are read here; an image is read from its place in the file when it is asked for.
    """

    def __init__(self, pattern: str, root: Path) -> None:
        self.files = shard_files(pattern, root)
        self.root = root
        self.keys: list[str] = []
        self._unusable: dict[int, Unusable] = {}
        self._places: list[tuple[int, int, int]] = []  # file, offset, size
        labels: list[str | None] = []
        splits: list[str | None] = []
        strays: list[Reject] = []
        for number, path in enumerate(self.files):
            before = len(self.keys)
            samples, fault = _index(path)
            for name, parts in samples.items():
                self._add(number, f"{path.name}/{name}", parts, path, labels, strays)
            if fault:
                self._reject(number, path.name, fault, labels)
            splits += [split_in_name([path.name, path.parent.name])] * (len(self.keys) - before)
        if not any(row not in self._unusable for row in range(len(self.keys))):
            raise UserError(
                f"prepare.source: the {len(self.files)} shards of wds:{pattern} hold no image; expected members such "
                f"as 000001.jpg ({', '.join(IMAGE_EXTENSIONS)}) in tar files that are not compressed"
            )
        self._index = np.array(self._places, dtype=np.int64)
        self._places = []
        # What cannot be read has no label, and must not take those of the others away.
        known = [label for row, label in enumerate(labels) if row not in self._unusable]
        filler = next((label for label in known if label), None)
        usable = [filler if row in self._unusable else label for row, label in enumerate(labels)]
        super().__init__(f"wds:{pattern}", len(self.keys), usable if filler else None, None, splits)
        self.strays = strays

    def key(self, row: int) -> str:
        return self.keys[row]

    def read_row(self, row: int) -> bytes:
        if row in self._unusable:
            raise self._unusable[row]
        number, offset, size = self._index[row].tolist()
        data = _read(self.files[number], offset, size)
        if len(data) < size:
            raise Unusable("truncated", f"{self.files[number].name} ends in the middle of this member")
        return data

    def _add(
        self, number: int, key: str, parts: list[_Part], path: Path, labels: list[str | None], strays: list[Reject]
    ) -> None:
        image = _image_of(parts)
        if image is None:
            found = ", ".join(part.extension for part in parts)
            strays.append(Reject(key, "not an image", f"a sample without an image (it has {found})"))
            return
        self.keys.append(f"{key}.{image.extension}")
        self._places.append((number, image.offset, image.size))
        labels.append(_label_of(parts, path, key))

    def _reject(self, number: int, key: str, fault: Unusable, labels: list[str | None]) -> None:
        self._unusable[len(self.keys)] = fault
        self.keys.append(key)
        self._places.append((number, 0, 0))
        labels.append(None)


def _index(path: Path) -> tuple[dict[str, list[_Part]], Unusable | None]:
    """The members of a tar file by the name that they share, and why the file ends early, if it does."""
    from webdataset.tariterators import base_plus_ext

    samples: dict[str, list[_Part]] = {}
    size = path.stat().st_size
    if size == 0:
        return samples, Unusable("zero bytes", "the shard is empty")
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                name, extension = base_plus_ext(member.name)
                if member.isreg() and name is not None:
                    samples.setdefault(name, []).append(_Part(extension.lower(), member.offset_data, member.size))
                # tarfile remembers every member, which a large shard does not need.
                tar.members = []  # type: ignore[attr-defined]
            # Of a header that is cut off or damaged tarfile says nothing; it stands where a block of zeros should be.
            if _read(path, tar.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                fault = f"the shard breaks off after {tar.offset} bytes, without an end mark; what comes before is used"
                return samples, Unusable("truncated", fault)
    except tarfile.TarError as error:
        reason: Reason = "truncated" if samples else "unsupported"
        hint = "what comes before is used" if samples else "expected a tar file that is not compressed"
        return samples, Unusable(reason, f"the shard cannot be read further ({error}); {hint}")
    except OSError as error:
        return samples, Unusable("unreadable", str(error.strerror))
    return samples, None


def _image_of(parts: Iterable[_Part]) -> _Part | None:
    """`jpg` before `seg.png`, which is another picture of the same sample; `npy`, often its features, comes last."""
    ranked = [part for part in parts if part.extension in IMAGE_EXTENSIONS]
    ranked += [part for part in parts if part.extension.rpartition(".")[2] in IMAGE_EXTENSIONS]
    return next(iter(ranked + [part for part in parts if part.extension == "npy"]), None)


def _label_of(parts: list[_Part], path: Path, key: str) -> str | None:
    for part in parts:
        if part.extension not in ("cls", "json") or part.size > MAX_LABEL_BYTES:
            continue
        text = _read(path, part.offset, part.size).decode("utf-8", errors="replace").strip()
        if part.extension == "cls":
            return text
        try:
            value = json.loads(text)
        except ValueError:
            raise UserError(f"prepare.source: {path}: {key}.json is not valid JSON; mend the shard") from None
        if isinstance(value, dict) and value.get("label") is not None:
            return str(value["label"])
    return None


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def shard_files(pattern: str, root: Path) -> list[Path]:
    """What braces and globs name, below `root` where they are relative; UserError where that is nothing."""
    from webdataset.shardlists import expand_urls

    files: list[Path] = []
    for url in expand_urls(pattern):
        path = root / url
        found = [path] if path.is_file() else glob_files(path)
        if path.is_dir():
            found = sorted(path.glob("*.tar"))
        if not found:
            raise UserError(
                f"prepare.source: wds:{pattern}: there is no {path}; give local tar files such as "
                "`wds:shards/train-{000..009}.tar` or `wds:shards/*.tar`"
            )
        files += found
    return files
