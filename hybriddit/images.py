"""Open image files with clear errors; save PNG files with a record of how they were made. Imports no torch."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo
from PIL.TiffImagePlugin import TiffImageFile

from .files import replacing

# the files of a folder that are read as images
IMAGE_ENDINGS = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff")
IMAGE_ENDINGS += (".avif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".qoi")
POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")  # how such files begin
PNG_START = b"\x89PNG\r\n\x1a\n"
TIFF_DESCRIPTION = 270  # the tag
LEAST_WIDTH = 96  # of a picture in a grid, in pixels: narrower ones have no room for their captions
RECORD_KEY = "hybriddit"  # the key of the PNG text chunk that holds the record; with it a TIFF's description begins
UPRIGHT = {  # what turns a picture upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LYING = (UPRIGHT[5], UPRIGHT[6], UPRIGHT[7], UPRIGHT[8])  # those that make the width the height


def open_image(path: str | Path, mode: str = "RGB", background: str = "white") -> Image.Image:
    """Read an image file as it is seen: upright, on a background where it is transparent, as "RGB" or "L".

    The first frame of an animation, the first page of a document. 16 bits become 8, by the upper byte. Broken or
    oversized metadata (EXIF, colour profile, XMP, text) is ignored.

    Raises FileNotFoundError if there is no file, and ValueError, in one line, if it is damaged, not an image, of
    levels whose range is unknown (floating-point numbers, integers of 32 bits), or, but for images that hybriddit made
    (with a record, see `read_record`), of more pixels than PIL opens (twice PIL.Image.MAX_IMAGE_PIXELS, 179 million).
    """
    return _decode(path, lambda image: _upright(flatten(image, mode, background), image))


def reduced_image(path: str | Path, factor: int) -> Image.Image:
    """An RGB image of hybriddit's, of which factor x factor pixels become one, their mean. Raises as `open_image` does.

    The file and its pixels are in memory once meanwhile.
    """
    return _decode(path, lambda image: image.reduce(factor))


def flatten(image: Image.Image, mode: str = "RGB", background: str = "white") -> Image.Image:
    """An image as "RGB" or "L", put on a background where it is transparent.

    Raises ValueError for levels whose range is unknown.
    """
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode == "F":
        raise ValueError("its levels are floating-point numbers of no known range: save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert(mode)
    if image.mode == "La":  # which PIL converts to nothing else
        image = image.convert("LA")
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey, which PIL would clip to 8 bits, as "L"; as "LA" where one of its levels stands for transparent."""
    levels = np.asarray(image)
    # of what PIL reads as 32 bits, PPM alone is of a known range, to which PIL scales it
    if levels.min() < 0 or levels.max() > 65535 or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError("its levels are integers of 32 bits, of no known range: save it with 8 or 16 bits")
    grey = Image.fromarray((levels // 256).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _upright(image: Image.Image, original: Image.Image) -> Image.Image:
    """Turn an image by the EXIF orientation of the one that it was made from."""
    method = _turn(original)
    return image if method is None else image.transpose(method)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns an image upright, by its EXIF orientation; None if nothing does."""
    try:  # ImageOps.exif_transpose also fails where other EXIF entries are broken
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:
        return None


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of an image as `open_image` gives it, in pixels; from its header where that can be read.

    Raises as `open_image` does.
    """
    path = Path(path) if isinstance(path, str) else path  # or a member of a tar
    if path.is_file():  # a pipe would be waited for
        try:
            with warnings.catch_warnings(action="ignore"), path.open("rb") as file, _open(file) as image:
                # of a PNG file, PIL reads all pixels to find the orientation; with a record it has none
                lies = _record_text(image) is None and _turn(image) in LYING
                return image.size[::-1] if lies else image.size
        except Exception:  # PIL's readers raise whatever they stumble over: it may still be read without its metadata
            pass
    return open_image(path).size


def _decode(path: str | Path, finish: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Every image file is read here, so that no check passes a file that a reader then refuses."""
    path = Path(path) if isinstance(path, str) else path  # or a member of a tar
    if not path.is_file():
        raise FileNotFoundError(f"no image file {path}")
    try:
        data = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata
            try:
                return finish(_load(data))
            except Exception:
                bare = _without_metadata(data)
                if len(bare) == len(data):
                    raise
                return finish(_load(bare))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is damaged or no image: it is in no format that PIL reads") from error
    except Exception as error:  # PIL's readers raise whatever they stumble over, such as struct.error or IndexError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged or no image: {reason}") from error


def _load(data: bytes) -> Image.Image:
    if data.startswith(POSTSCRIPT):  # whatever the file's ending
        raise ValueError("PostScript, a program that PIL would let Ghostscript run, is not read")
    image = _open(BytesIO(data))
    if not isinstance(image.info.get("xmp", b""), bytes):  # of a TIFF, in which PIL looks for the orientation
        del image.info["xmp"]
    image.load()
    key = image.info.get("transparency")
    if image.format == "PNG" and key is not None:  # PIL leaves a transparent colour in the file's own levels
        depth = data[24]
        if image.mode == "L" and depth < 8:
            image.info["transparency"] = key * 255 // (2**depth - 1)
        elif image.mode == "RGB" and depth == 16:
            image.info["transparency"] = tuple(level // 256 for level in key)
    return image


def _open(file: BinaryIO) -> Image.Image:
    """PIL's Image.open, which also opens what is larger than PIL opens of strangers where hybriddit has made it."""
    try:
        return Image.open(file)
    except Image.DecompressionBombError:
        file.seek(0)
        kind = {PNG_START[:4]: PngImageFile, b"II*\0": TiffImageFile}.get(file.read(4))
        file.seek(0)
        if kind is None or _record_text(image := kind(file)) is None:
            raise
        image.im = Image.core.new(image.mode, image.size)  # else a TIFF's size is looked at again when it is loaded
        return image


def _record_text(image: Image.Image) -> str | None:
    """The record of an image that was opened, as JSON."""
    if image.format != "TIFF":
        return image.info.get(RECORD_KEY)
    key, _, text = str(image.tag_v2.get(TIFF_DESCRIPTION, "")).partition(" ")
    return text if key == RECORD_KEY else None


def _without_metadata(data: bytes) -> bytes:
    """A PNG or JPEG file without what does not change its pixels; other files as they are."""
    if data.startswith(PNG_START):
        return _without_chunks(data)
    return _without_segments(data) if data.startswith(b"\xff\xd8\xff") else data


def _without_chunks(data: bytes) -> bytes:
    """A PNG file with its critical chunks (named in upper case), its transparency and a whole EXIF block alone."""
    kept, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        name, sum_is_right = data[at + 4 : at + 8], zlib.crc32(data[at + 4 : end - 4]).to_bytes(4, "big")
        if name[:1].isupper() or name == b"tRNS" or (name == b"eXIf" and data[end - 4 : end] == sum_is_right):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _without_segments(data: bytes) -> bytes:
    """A JPEG file without comments and application segments, but for a whole one of Adobe's: it tells the colours."""
    kept, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:  # the picture's data begins
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        marker, adobe = data[at + 1], data[at + 4 : at + 9] == b"Adobe" and end - at >= 16
        if adobe or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[at:end])
        at = end
    return b"".join((*kept, data[at:]))


def save_png(image: Image.Image, path: Path, record: dict[str, Any] | None = None) -> None:
    """Write a PNG file, whole or not at all, with `record` as JSON in its text chunk "hybriddit" if given."""
    info = PngInfo()
    if record is not None:
        info.add_itxt(RECORD_KEY, json.dumps(record, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        image.save(partial, format="PNG", pnginfo=info)


def read_record(path: str | Path) -> dict[str, Any] | None:
    """The record that `save_png` or `write_strips` wrote; None for an image without one. Raises as `open_image` does."""
    path = Path(path)
    text = _record_of_png(path) if path.is_file() else None
    if text is None:
        text = _decode(path, _record_text)  # the text chunk may follow the pixels: they are read
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise ValueError(f"the record in {path} is damaged: {error}") from error


def _record_of_png(path: Path) -> str | None:
    """The record in a PNG file of which every chunk is whole; it is not decompressed, which of a large one takes long."""
    found, start = None, f"{RECORD_KEY}\0\0\0\0\0".encode()  # not compressed, of no language
    name, left = b"", path.stat().st_size
    with path.open("rb") as file:
        if file.read(8) != PNG_START:
            return None
        while name != b"IEND":
            size, name = int.from_bytes(file.read(4), "big"), file.read(4)
            data, check = file.read(min(size, left)), file.read(4)
            if len(check) < 4 or zlib.crc32(data, zlib.crc32(name)) != int.from_bytes(check, "big"):
                return None
            if name == b"iTXt" and data.startswith(start):
                found = data.removeprefix(start).decode("utf-8", "replace")
    return found


@dataclass(frozen=True)
class Grid:
    """Pictures of one size in columns, and what is written beside them.

    heads: the columns' names; none: they have none. captions: of each picture, as `columns`.
    """

    columns: Sequence[Sequence[Image.Image]]
    captions: Sequence[Sequence[str]]
    heads: Sequence[str] = ()


def save_grid(path: Path, grid: Grid, title: str) -> None:
    """Write a PNG file of a grid, with its title above it; small pictures are shown as whole multiples of their size."""
    first = grid.columns[0][0]
    scale = -(-LEAST_WIDTH // first.width)
    width, height, gap = first.width * scale, first.height * scale, 4
    font = ImageFont.load_default(max(11, width // 40))
    draw = ImageDraw.Draw(Image.new("L", (1, 1)))
    line = draw.textbbox((0, 0), "Ag", font)[3] + 2
    captions = [[_wrapped(text, width, draw, 4, font) for text in column] for column in grid.captions]
    below = max(text.count("\n") + 1 for column in captions for text in column) * line + gap
    above = (2 if grid.heads else 1) * line + gap
    rows, columns = max(map(len, grid.columns)), len(grid.columns)
    sheet = Image.new(first.mode, (columns * (width + gap) - gap, above + rows * (height + below)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((0, 0), title, "black", font)
    for x, (pictures, texts) in enumerate(zip(grid.columns, captions, strict=True)):
        left = x * (width + gap)
        for head in grid.heads[x : x + 1]:
            draw.text((left, line), head, "black", font)
        for y, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
            top = above + y * (height + below)
            sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
            draw.multiline_text((left, top + height), text, "black", font, spacing=2)
    save_png(sheet, path)


def contact_sheet(
    rows: Mapping[str, Sequence[np.ndarray]], captions: Sequence[str], path: Path, width: int = 128
) -> None:
    """Write a PNG: one labelled row of images per entry, one captioned column per image.

    rows: images of one size, uint8 [H, W, 3], by the row's name. width: of an image on the sheet, in pixels.
    """
    first = next(iter(rows.values()))[0]
    height = round(width * first.shape[0] / first.shape[1])
    filter = Image.Resampling.NEAREST if width >= first.shape[1] else Image.Resampling.LANCZOS
    margin, gap, spacing = 118, 6, 2
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    wrapped = [_wrapped(caption, width, draw) for caption in captions]
    header = max(34, 8 + max(draw.multiline_textbbox((0, 0), text, spacing=spacing)[3] for text in wrapped))
    sheet = Image.new("RGB", (margin + len(captions) * (width + gap), header + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(wrapped):
        draw.multiline_text((margin + column * (width + gap), 3), text, fill="black", spacing=spacing)
    for row, (name, images) in enumerate(rows.items()):
        y = header + row * (height + gap)
        draw.multiline_text((6, y + height // 2 - 12), name, fill="black")
        for column, image in enumerate(images):
            tile = Image.fromarray(image).resize((width, height), filter)
            sheet.paste(tile, (margin + column * (width + gap), y))
    save_png(sheet, path)


def _wrapped(
    text: str, width: int, draw: ImageDraw.ImageDraw, lines: int = 6, font: ImageFont.FreeTypeFont | None = None
) -> str:
    """A text in lines of at most so many pixels, at most `lines` of them: what is left is cut off with an ellipsis."""
    text = text.encode("latin-1", "replace").decode("latin-1")  # what PIL's own font draws
    wrapped = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        wrapped = (
            [*wrapped[:-1], longer] if draw.textlength(longer, font) < width or not wrapped[-1] else [*wrapped, word]
        )
    return "\n".join(wrapped if len(wrapped) <= lines else [*wrapped[: lines - 1], f"{wrapped[lines - 1]} ..."])
