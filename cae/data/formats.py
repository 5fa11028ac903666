"""What a file is by its first bytes: an image of a kind that is read, another image, or no image at all."""

import io
import struct
from typing import Literal

import numpy as np

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
# The whole header of a NumPy file of one image.
HEAD_BYTES = 128

Kind = Literal["JPEG", "PNG", "WEBP", "BMP", "TIFF", "NPY", "other image"]

_TIFF_MARKS = (b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"II+\0", b"MM\0+")
# Two letters alone would make an image of any text that begins with them.
_BMP_HEADER_SIZES = (12, 16, 40, 52, 56, 64, 108, 124)
_OTHER_MARKS = (
    b"GIF87a",
    b"GIF89a",
    b"8BPS",  # Photoshop
    b"\0\0\x01\0",  # icon
    b"\0\0\0\x0cjP  ",  # JPEG 2000
    b"\xff\x4f\xff\x51",  # JPEG 2000, bare
    b"\xff\x0a",  # JPEG XL, bare
    b"\0\0\0\x0cJXL ",
    b"\x76\x2f\x31\x01",  # OpenEXR
    b"DDS ",
)
_HEIF_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")


def image_kind(head: bytes) -> Kind | None:
    """The kind of image that begins with `head` (HEAD_BYTES of it are enough), None for anything else."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith(b"BM") and len(head) >= 18 and struct.unpack_from("<I", head, 14)[0] in _BMP_HEADER_SIZES:
        return "BMP"
    if head.startswith(_TIFF_MARKS):
        return "TIFF"
    if head.startswith(b"\x93NUMPY"):
        return "NPY" if _npy_is_image(head) else None
    heif = head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS
    portable = len(head) > 2 and head[:1] == b"P" and head[1:2] in b"1234567" and head[2:3] in b" \t\r\n"
    return "other image" if heif or portable or head.startswith(_OTHER_MARKS) else None


def _npy_is_image(head: bytes) -> bool:
    """Whether a NumPy file holds what may be meant as an image: labels and features lie beside images, too."""
    stream = io.BytesIO(head)
    try:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception:  # the header is Python's syntax, so its reader raises errors of many types
        return False
    # Three axes of another type are an image saved in a way that is not read, and its owner wants to know.
    return len(shape) == 3 or (len(shape) == 2 and dtype.kind == "u" and dtype.itemsize <= 2)


def tiff_is_cut_off(data: bytes) -> bool:
    """True when the first directory of a TIFF file does not lie inside its bytes."""
    if len(data) < 8:
        return True
    order = "<" if data[:2] == b"II" else ">"
    start = struct.unpack_from(f"{order}I", data, 4)[0]
    if start + 2 > len(data):
        return True
    num_entries = struct.unpack_from(f"{order}H", data, start)[0]
    return start + 2 + 12 * num_entries > len(data)
