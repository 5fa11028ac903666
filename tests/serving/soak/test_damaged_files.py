"""Files of every format, damaged in thousands of ways: answered or refused, never a fault, nothing left behind."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from running_server import Server, running
from sizes import FULL, SIZES
from traffic import connect, draw_pixels, encoded, form_body, gauges, good_call, refused, rss_mib, wrapped

_log = logging.getLogger(__name__)
ALLOWED_MIB = 60


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = {"CAE_SERVING_MAX_PIXELS": "1000000"}
    with running(tiny_bundle, tmp_path_factory.mktemp("server") / "log", limits) as running_server:
        yield running_server
        assert [line for line in running_server.log.read_text().splitlines() if "Traceback" in line] == []


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with connect(server.url) as client:
        yield client


def originals() -> dict[str, bytes]:
    """Small files that take each way through the decoders."""
    rng = np.random.default_rng(5)
    pixels = draw_pixels(rng)[0]
    files = {form: encoded(pixels, form) for form in ("PNG", "WEBP", "BMP", "TIFF", "NPY")}

    def saved(image: Image.Image, form: str, **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, form, **options)
        return file.getvalue()

    colour = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    exif = Image.Exif()
    exif[0x0112] = 6
    files["JPEG"] = saved(colour, "JPEG", exif=exif)
    files["progressive"] = saved(colour, "JPEG", progressive=True)
    files["CMYK"] = saved(colour.convert("CMYK"), "JPEG")
    files["lossy WEBP"] = saved(colour, "WEBP", exif=exif)
    files["animated WEBP"] = saved(colour, "WEBP", save_all=True, append_images=[colour.rotate(90)])
    files["animated PNG"] = saved(colour, "PNG", save_all=True, append_images=[colour.rotate(90)])
    files["palette PNG"] = saved(colour.quantize(16), "PNG", transparency=3)
    files["grey16 PNG"] = saved(Image.fromarray(pixels[0].astype(np.uint16) * 257), "PNG")
    files["RGBA PNG"] = saved(colour.convert("RGBA"), "PNG", exif=exif)
    files["palette BMP"] = saved(colour.quantize(256), "BMP")
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "group4"):
        image = colour.convert("1") if compression == "group4" else colour
        files[compression] = saved(image, "TIFF", compression=compression)
    files["LAB TIFF"] = saved(Image.new("LAB", (32, 32)), "TIFF")
    files["uint16 NPY"] = encoded(pixels.astype(np.uint16), "NPY")
    return files


ORIGINALS = originals()


def mended(data: bytes) -> bytes:
    """A PNG with the checksums of its chunks made anew, so that damage gets past them."""
    pieces, place = [data[:8]], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        body = data[place + 4 : place + 8 + length]
        if len(body) < length + 4:
            break
        pieces += [data[place : place + 4], body, struct.pack(">I", zlib.crc32(body))]
        place += 12 + length
    return b"".join([*pieces, data[place:]])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(ORIGINALS[draw(st.sampled_from(sorted(ORIGINALS)))])
    # The heads decide most, so that half of the damage is done there.
    places = st.one_of(st.integers(0, min(len(data), 200) - 1), st.integers(0, len(data) - 1))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(places)
        kind = draw(st.sampled_from(["bit", "byte", "word", "insert", "remove", "repeat"]))
        if kind == "bit":
            data[place % len(data)] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte":
            data[place % len(data)] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
        elif kind == "word":
            data[place : place + 4] = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x80"]))
        elif kind == "insert":
            data[place:place] = draw(st.binary(max_size=8))
        elif kind == "remove" and len(data) > 20:
            del data[place : place + draw(st.integers(1, 8))]
        elif kind == "repeat":
            data[place:place] = data[place : place + draw(st.integers(1, 300))] * draw(st.integers(1, 20))
    if draw(st.booleans()):
        data = data[: draw(st.integers(0, len(data)))]
    if data.startswith(b"\x89PNG") and draw(st.booleans()):
        return mended(bytes(data))
    return bytes(data)


def test_damaged_files_are_answered_or_refused(server: Server, http: httpx.Client) -> None:
    statuses: Counter[int] = Counter()
    rng = np.random.default_rng(6)

    def send(file: bytes, path: str) -> None:
        if path == "mask":
            path = "/reconstruct"
            body, media_type = form_body([("images", ORIGINALS["PNG"]), ("mask", file)])
            headers = {"Content-Type": media_type}
        else:
            body, headers = wrapped(rng, [file]) if file else (file, {})
        response = http.post(path, content=body, headers={**headers, "Accept": "application/x-npy"})
        statuses[response.status_code] += 1
        if response.status_code != 200:
            refused(response, 400, 413, 415, 422)
        else:
            assert np.isfinite(np.load(io.BytesIO(response.content))).all()

    def run(count: int) -> None:
        settings(
            max_examples=count, derandomize=not FULL, deadline=None, database=None, suppress_health_check=[*HealthCheck]
        )(given(damaged(), st.sampled_from(["/embed", "/reconstruct", "mask"]))(send))()

    # The first cases load the decoders.
    run(SIZES.damaged_cases // 5)
    before = rss_mib(server.process.pid)
    run(SIZES.damaged_cases)
    after = rss_mib(server.process.pid)
    _log.info("%d cases: %s; memory %.0f to %.0f MiB", statuses.total(), dict(statuses), before, after)
    assert after - before < ALLOWED_MIB
    assert {200, 415} <= set(statuses)
    for _ in range(20):
        call = good_call(rng)
        call.verify(http.post(call.path, content=call.body, headers=call.headers))
    assert set(gauges(server.url).values()) == {0.0}
