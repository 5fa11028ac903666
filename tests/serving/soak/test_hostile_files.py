"""Image files made to break the server: each is refused with a reason, costs little, and fails alone."""

from __future__ import annotations

import io
import struct
import time
import zlib

import httpx
import numpy as np
import pytest
from PIL import Image
from running_server import Server
from traffic import encoded, form_body, peak_mib, refused, rss_mib

pytestmark = pytest.mark.usefixtures("the_next_caller_notices_nothing")


def png_of(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff_of(tags: dict[int, tuple[int, int, int]], data: bytes) -> bytes:
    """A little-endian TIFF: each tag has type, count and value; the data begins at byte 8."""
    directory = 8 + len(data) + len(data) % 2
    entries = b"".join(struct.pack("<HHII", tag, *value) for tag, value in sorted(tags.items()))
    head = b"II*\0" + struct.pack("<I", directory) + data + b"\0" * (len(data) % 2)
    return head + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


def huge_tiled_tiff(side: int) -> bytes:
    """64 x 64 pixels in one deflated tile that is far larger than the picture."""
    packer, packed = zlib.compressobj(9), []
    packed = [packer.compress(bytes(2**20)) for _ in range(side * side // 2**20)]
    data = b"".join([*packed, packer.flush()])
    short, long = 3, 4
    return tiff_of(
        {
            256: (short, 1, 64),
            257: (short, 1, 64),
            258: (short, 1, 8),
            259: (short, 1, 8),
            262: (short, 1, 1),
            277: (short, 1, 1),
            322: (long, 1, side),
            323: (long, 1, side),
            324: (long, 1, 8),
            325: (long, 1, len(data)),
        },
        data,
    )


def jpeg_of_many_scans(num_scans: int) -> bytes:
    """A progressive JPEG of 4000 x 4000 pixels whose last scan, a few bytes of no change, comes again and again."""
    file = io.BytesIO()
    Image.new("L", (4000, 4000), 90).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    return data[:last] + scan * num_scans + b"\xff\xd9"


def npy_of(shape: str, descr: str = "'|u1'") -> bytes:
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(600)


def picture(mode: str, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (40, 40)).save(file, form, **options)
    return file.getvalue()


def animation(form: str) -> bytes:
    frames = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in (51, 0, 255)]
    file = io.BytesIO()
    frames[0].save(
        file, form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    return file.getvalue()


HOSTILE_FILES = {
    "png of 10^10 pixels": (png_of(100_000, 100_000, zlib.compress(bytes(10**6))), (413,)),
    "png of 2^62 pixels": (png_of(2**31 - 1, 2**31 - 1, b""), (413, 415)),
    "png of one long line": (png_of(2**31 - 1, 8, b""), (413, 415)),
    "webp of 16383 x 16383": (
        b"RIFF\x16\0\0\0WEBPVP8L\x0a\0\0\0\x2f" + struct.pack("<I", 0x3FFF | 0x3FFF << 14) + bytes(5),
        (413, 415),
    ),
    "tiff of 2^32 x 2^32": (
        tiff_of(
            {256: (4, 1, 2**32 - 1), 257: (4, 1, 2**32 - 1), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)}
            | {273: (4, 1, 8), 277: (3, 1, 1), 278: (4, 1, 2**32 - 1), 279: (4, 1, 2**32 - 1)},
            b"x",
        ),
        (413, 415),
    ),
    "bmp of 2^31 x 2^31": (
        b"BM" + struct.pack("<IHHIIIIHHIIIIII", 60, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0),
        (413, 415),
    ),
    "lab tiff": (picture("LAB", "TIFF"), (200, 415)),
    "float tiff": (picture("F", "TIFF"), (415,)),
    "npy of a huge number": (npy_of(f"(3, 0x{'f' * 4000}, 8)"), (413, 415)),
    "npy of huge channels": (npy_of(f"(0x{'f' * 4000}, 8, 8)"), (413, 415)),
    "npy of many axes": (npy_of(f"({'0x' + 'f' * 4000}, 8, 8, 8)"), (413, 415)),
    "npy of negative sides": (npy_of("(3, -8, -8)"), (415, 422)),
    "npy of no channels": (npy_of("(0, 8, 8)"), (415, 422)),
    "npy of objects": (npy_of("(3, 8, 8)", "'|O'"), (415,)),
    "npy of nested types": (npy_of("(3, 8, 8)", "[('a', '|u1')] * 3"), (415,)),
    "npy of brackets": (npy_of("(" * 4000), (415,)),
    "one pixel": (encoded(np.zeros((3, 1, 1), np.uint8)), (422,)),
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
@pytest.mark.parametrize("path", ["/embed", "/reconstruct"])
def test_a_hostile_file_is_refused(server: Server, http: httpx.Client, path: str, name: str) -> None:
    file, statuses = HOSTILE_FILES[name]
    before = rss_mib(server.process.pid)
    response = http.post(path, content=file)
    if response.status_code != 200 or 200 not in statuses:
        refused(response, *statuses)
    assert rss_mib(server.process.pid) - before < 100


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_a_hostile_mask_is_refused(http: httpx.Client, png: bytes, name: str) -> None:
    body, media_type = form_body([("images", png), ("mask", HOSTILE_FILES[name][0])])
    # A mask that is read but hides nothing is a bad field.
    refused(http.post("/reconstruct", content=body, headers={"Content-Type": media_type}), 413, 415, 422)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "RGBX", "PA", "I;16B"])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_every_mode_that_a_format_can_hold_is_answered(http: httpx.Client, mode: str, form: str) -> None:
    try:
        file = picture(mode, form)
    except (OSError, KeyError, ValueError):
        return  # the format has no such mode
    try:
        Image.open(io.BytesIO(file)).load()
    except (OSError, ValueError):
        return  # what Pillow writes but cannot read
    assert http.post("/embed", content=file).status_code == 200


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(http: httpx.Client, form: str) -> None:
    pooled = http.post("/embed", content=animation(form)).json()["pooled"]
    np.testing.assert_allclose(pooled, [[0.2, 0, 0]], atol=1e-6)


def test_a_tile_larger_than_its_picture_is_not_unfolded(server: Server, http: httpx.Client) -> None:
    before = peak_mib(server.process.pid)
    refused(http.post("/embed", content=huge_tiled_tiff(16384)), 413, 415)
    assert peak_mib(server.process.pid) - before < 100


def test_a_jpeg_of_thousands_of_scans_does_not_hold_the_decoder(http: httpx.Client) -> None:
    started = time.monotonic()
    refused(http.post("/embed", content=jpeg_of_many_scans(2000)), 413, 415)
    assert time.monotonic() - started < 2


def test_what_stands_behind_a_jpeg_is_no_part_of_it(http: httpx.Client) -> None:
    """Telephones append a film to the picture, in which the bytes of a marker come by chance."""
    assert http.post("/embed", content=jpeg_of_many_scans(1) + b"\xff\xda\0\x02" * 1000).status_code == 200
