"""Every file that is not used, with a reason of a fixed vocabulary: `rejects.csv`, and when too many are an error."""

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

from cae.config import PrepareConfig
from cae.data import formats
from cae.data.sources import Reason, Reject
from cae.errors import UserError
from serving.preprocess import ImageError

logger = logging.getLogger(__name__)

SHOWN_REJECTS = 5
_REASONS: dict[str, Reason] = {"truncated": "truncated", "too_large": "too large", "too_small": "too small"}


def explain(key: str, error: ImageError, data: bytes, decoded: bool) -> Reject:
    """What `serving` says of `data` in our words; `decoded` tells that the file was read and only its pixels fail."""
    if not data:
        return Reject(key, "zero bytes", "the file is empty")
    kind = formats.image_kind(data[: formats.HEAD_BYTES])
    if kind is None:
        return Reject(key, "not an image", f"its first bytes are no image's; {error}")
    if error.reason in _REASONS:
        return Reject(key, _REASONS[error.reason], str(error))
    # A header of a kind that is read, and no image behind it: damaged, or for TIFF a layout that Pillow does not know.
    # Of a NumPy file that is damaged the error itself says so.
    known = kind not in ("other image", "NPY") and not (kind == "TIFF" and not formats.tiff_is_cut_off(data))
    return Reject(key, "truncated" if known and not decoded else "unsupported", str(error))


def write_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    """Write `rejects.csv`: key, reason, detail."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Reject._fields)
        writer.writerows(rejects)


def check_rejects(
    broken: Sequence[Reject], strays: Sequence[Reject], total: int, config: PrepareConfig, scratch: Path
) -> None:
    """Name some of the broken files; raise UserError where they are too many, or all."""
    for reject in broken[:SHOWN_REJECTS]:
        logger.warning("%s is not used: %s (%s)", *reject)
    if len(broken) <= config.max_reject_fraction * total and len(broken) < total:
        return
    scratch.mkdir(exist_ok=True)
    path = scratch / "rejects.csv"
    write_rejects(path, [*broken, *strays])
    raise UserError(
        f"prepare.source: {len(broken)} of {total} files of {config.source} cannot be used, more than "
        f"prepare.max_reject_fraction {config.max_reject_fraction}; {path} names each with its reason. "
        "Mend or remove them, or raise the fraction"
    )
