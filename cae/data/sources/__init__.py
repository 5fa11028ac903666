"""Where images come from: a URL-like string names a source of encoded images."""

from collections.abc import Callable
from pathlib import Path

from cae.data.formats import IMAGE_SUFFIXES
from cae.data.sources.base import Reason, Reject, Source, SourceItem, Unusable
from cae.data.sources.builtin import Cifar10, Cifar10Download, Mnist5k
from cae.data.sources.folder import Folder
from cae.data.sources.hub import HubDataset
from cae.data.sources.manifest import Manifest
from cae.data.sources.parquet import Parquet
from cae.data.sources.shards import WebDataset
from cae.errors import UserError

__all__ = ["IMAGE_SUFFIXES", "Cifar10", "Folder", "Reason", "Reject", "Source", "SourceItem", "Unusable", "open_source"]

KNOWN = "mnist5k, cifar10, cifar10:FOLDER, folder:PATH, csv:PATH, parquet:PATH, hf:NAME or wds:PATTERN"


def open_source(url: str, root: Path, download_folder: Path) -> Source:
    """The source that `url` names, one of KNOWN.

    Relative paths start at `root`. Raises UserError that names the value and what is known.
    """
    kind, _, location = url.partition(":")
    known: dict[str, Callable[[], Source]] = {"mnist5k": Mnist5k, "cifar10": lambda: Cifar10Download(download_folder)}
    if location:
        path = (root / location).resolve()
        known = {
            "cifar10": lambda: Cifar10(path),
            "folder": lambda: Folder(path),
            "csv": lambda: Manifest(path),
            "parquet": lambda: Parquet(path),
            "hf": lambda: HubDataset(location, path),
            "wds": lambda: WebDataset(location, root.resolve()),
        }
    if kind not in known:
        raise UserError(f"prepare.source: {url!r} is not a known source; expected {KNOWN}")
    return known[kind]()
