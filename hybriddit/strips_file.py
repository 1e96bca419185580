"""Image files that are written while the image is made, strip by strip, so that no one holds it whole.

Imports no torch.
"""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from .files import replacing
from .images import PNG_START, RECORD_KEY, TIFF_DESCRIPTION, image_size, reduced_image, save_png

STRIP_ENDINGS = (".png", ".tif", ".tiff")
BAND = 2**18  # bytes that are compressed at once, or somewhat more
THREADS = min(8, os.cpu_count() or 1)  # zlib and numpy let others run
PREVIEW_FROM = 4096  # pixels of the longest side, above which few viewers open an image quickly
PREVIEW_SIDE = 1024  # of the preview's longest side, at most


def write_strips(
    path: Path, strips: Iterable[np.ndarray], width: int, height: int, record: dict[str, Any] | None = None
) -> Path | None:
    """Write an image as its strips come, whole or not at all, and a small copy of a large one beside it.

    path: ends in .png, .tif or .tiff; its folder is made. strips: uint8 [rows, width, 3], from the top, of any numbers of
    rows that add up to `height`; each may be changed once the next is asked for. record: kept in the file, see
    `images.read_record`. While it works it holds a few bands of a MiB at most, and a strip. The pixels are kept exactly,
    and the file does not depend on how they come.

    Returns the path of the preview, `preview_path`, of which no side has more than 1024 pixels; None for an image of at
    most 4096 pixels a side, which gets none. Raises ValueError for strips that do not make such an image, and for more
    than a TIFF file holds (4 GiB); OSError, with the path, where the disk is full.
    """
    check_strips_file(path, width, height)
    side = _preview_square(width, height)
    least = max(1, side)
    rows = min(height, -(-max(1, BAND // (3 * width)) // least) * least)  # of whole squares
    bands, small = _bands(strips, width, height, rows), []
    if side:
        bands = _noting(bands, lambda band: small.append(np.asarray(Image.fromarray(band).reduce(side))))
    write = _write_png if path.suffix.lower() == ".png" else partial(_write_tiff, rows=rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        write(file, bands, width, height, record)
        if side:
            preview_path(path).unlink(missing_ok=True)  # of another image
    return _save_preview(path, Image.fromarray(np.concatenate(small))) if side else None


def add_preview(path: Path) -> Path | None:
    """Write the small copy of a large image that is there without it, because the disk was full or the process was killed.

    Returns its path; None where none is missing. Raises as `write_strips` and `images.open_image` do.
    """
    side = _preview_square(*image_size(path))
    if not side or preview_path(path).exists():
        return None
    return _save_preview(path, reduced_image(path, side))


def save_image(image: Image.Image, path: Path, record: dict[str, Any] | None = None) -> Path | None:
    """Write an image that is there as a whole, as `write_strips` does; PIL writes PNG files of common size."""
    if path.suffix.lower() == ".png" and max(image.size) <= PREVIEW_FROM:
        save_png(image, path, record)
        return None
    return write_strips(path, [np.asarray(image.convert("RGB"))], *image.size, record)


def check_strips_file(path: Path, width: int, height: int) -> None:
    """Raise ValueError for a path whose ending no strips are written to, and an image larger than its format holds."""
    if path.suffix.lower() not in STRIP_ENDINGS:
        raise ValueError(f"{path} must end in .png, .tif or .tiff: no others are written strip by strip")
    if path.suffix.lower() != ".png" and 3 * width * height >= 2**32 - 2**24:  # the rest is for record and tables
        raise ValueError(f"{path}: a TIFF file holds 4 GiB, and {width} x {height} pixels are more: give a .png")


def _preview_square(width: int, height: int) -> int:
    """The side of the square that is a pixel of an image's preview; 0 for an image that gets none."""
    longest = max(width, height)
    return -(-longest // PREVIEW_SIDE) if longest > PREVIEW_FROM else 0


def _save_preview(path: Path, small: Image.Image) -> Path:
    with replacing(preview_path(path)) as temporary:
        small.save(temporary, format="JPEG", quality=90)
    return preview_path(path)


def preview_path(path: Path) -> Path:
    """Where the small copy of a large image is."""
    return path.with_suffix(".preview.jpg")


def seconds_of_file(width: int, height: int) -> float:
    """About how long this machine compresses an image, found on a small part of one in some milliseconds."""
    band = np.random.default_rng(0).integers(0, 256, (16, 2048, 3), np.uint8)
    begin = time.perf_counter()
    _packed_paeth(band, band[0])
    return (time.perf_counter() - begin) * 3 * width * height / band.nbytes / THREADS


def _bands(strips: Iterable[np.ndarray], width: int, height: int, rows: int) -> Iterator[np.ndarray]:
    """The image in bands of so many rows, the last of what is left; arrays of their own."""
    done = filled = 0
    band = np.empty((rows, width, 3), np.uint8)
    for strip in strips:
        if strip.dtype != np.uint8 or strip.shape[1:] != (width, 3):
            raise ValueError(f"a strip is {strip.dtype} {strip.shape}: it must be uint8 [rows, {width}, 3]")
        if done + filled + len(strip) > height:
            raise ValueError(f"the strips have more than the {height} rows of the image")
        while len(strip):
            part = strip[: len(band) - filled]
            band[filled : filled + len(part)] = part
            filled, strip = filled + len(part), strip[len(part) :]
            if filled == len(band):
                yield band
                done, filled = done + len(band), 0
                band = np.empty((min(rows, height - done), width, 3), np.uint8)
    if done < height:
        raise ValueError(f"the strips have {done + filled} rows, and the image {height}")


def _noting(bands: Iterable[np.ndarray], note: Callable[[np.ndarray], None]) -> Iterator[np.ndarray]:
    for band in bands:
        note(band)
        yield band


def _write_png(
    file: BinaryIO, bands: Iterable[np.ndarray], width: int, height: int, record: dict[str, Any] | None
) -> None:
    def chunk(name: bytes, data: bytes) -> None:
        file.write(struct.pack(">I", len(data)) + name)
        file.write(data)
        file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(name))))

    file.write(PNG_START)
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))  # 8 bits, RGB
    if record is not None:
        text = json.dumps(record, ensure_ascii=False).encode("utf-8")
        chunk(b"iTXt", RECORD_KEY.encode() + b"\0\0\0\0\0" + text)  # not compressed, of no language
    chunk(b"IDAT", b"\x78\x01")  # one zlib stream, of which each band is a part
    check = zlib.adler32(b"")
    for rows, packed in _in_order(_packed_paeth, _with_row_above(bands)):
        check = zlib.adler32(rows, check)
        chunk(b"IDAT", packed)
    chunk(b"IDAT", b"\x03\0" + struct.pack(">I", check))  # the stream's last part, which is empty
    chunk(b"IEND", b"")


def _with_row_above(bands: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    above = None
    for band in bands:
        yield band, np.zeros_like(band[0]) if above is None else above
        above = band[-1]


def _packed_paeth(band: np.ndarray, above: np.ndarray) -> tuple[bytes, bytes]:
    """Rows with PNG's filter 4, and what deflate makes of them, to be joined with what follows.

    Of the filters and strategies, Paeth's with runs alone is as small as PIL's choice per row within 3 %, in a fifth of
    the time.
    """
    padded = np.zeros((len(band) + 1, band.shape[1] + 1, 3), np.uint8)
    padded[0, 1:], padded[1:, 1:] = above, band
    left, up, corner = padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
    to_left = np.abs(np.subtract(up, corner, dtype=np.int16))  # how far left is from left + up - corner
    to_up = np.abs(np.subtract(left, corner, dtype=np.int16))
    to_corner = np.abs(np.add(left, up, dtype=np.int16) - 2 * corner.astype(np.int16))
    nearest = np.where((to_left <= to_up) & (to_left <= to_corner), left, np.where(to_up <= to_corner, up, corner))
    rows = np.full((len(band), 1 + band.shape[1] * 3), 4, np.uint8)
    rows[:, 1:] = (band - nearest).reshape(len(band), -1)
    data, packer = rows.tobytes(), zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
    return data, packer.compress(data) + packer.flush(zlib.Z_FULL_FLUSH)


def _write_tiff(
    file: BinaryIO, bands: Iterable[np.ndarray], width: int, height: int, record: dict[str, Any] | None, rows: int
) -> None:
    """TIFF 6.0, little-endian, deflated strips of so many rows; the directory follows them."""
    file.write(b"II*\0\0\0\0\0")
    offsets, sizes = [], []
    for packed in _in_order(_packed_differences, ((band,) for band in bands)):
        offsets.append(file.tell())
        sizes.append(len(packed))
        file.write(packed)
    text = b"" if record is None else f"{RECORD_KEY} {json.dumps(record)}".encode("ascii")
    short, long, ascii = ("H", 3), ("I", 4), ("B", 2)
    entries = [
        (256, long, [width]),
        (257, long, [height]),
        (258, short, [8, 8, 8]),
        (259, short, [8]),  # deflate
        (262, short, [2]),  # RGB
        (TIFF_DESCRIPTION, ascii, text + b"\0"),
        (273, long, offsets),
        (277, short, [3]),
        (278, long, [rows]),
        (279, long, sizes),
        (284, short, [1]),  # one plane
        (317, short, [2]),  # differences along a row
    ]
    directory = struct.pack("<H", len(entries))
    for tag, (letter, kind), values in entries:
        data = struct.pack(f"<{len(values)}{letter}", *values)
        if len(data) > 4:
            file.write(b"\0" * (file.tell() % 2))  # on a word's border
            place = struct.pack("<I", file.tell())
            file.write(data)
        else:
            place = data.ljust(4, b"\0")
        directory += struct.pack("<HHI", tag, kind, len(values)) + place
    file.write(b"\0" * (file.tell() % 2))
    start = file.tell()
    file.write(directory + b"\0\0\0\0")
    file.seek(4)
    file.write(struct.pack("<I", start))


def _packed_differences(band: np.ndarray) -> bytes:
    rows = band.copy()
    rows[:, 1:] -= band[:, :-1]
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    return packer.compress(rows.tobytes()) + packer.flush()


def _in_order(work: Callable[..., Any], arguments: Iterable[tuple]) -> Iterator[Any]:
    """What the calls return, in order, of which some threads are at work on a few."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque = deque()
        for given in arguments:
            waiting.append(pool.submit(work, *given))
            if len(waiting) > 2 * THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
