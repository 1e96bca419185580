"""Open image files with clear errors; save PNG files with a record of how they were made. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from .files import replacing

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # the files of a folder that are read as images
RECORD_KEY = "hybriddit"  # the key of the PNG text chunk that holds the record


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file with PIL for the block; pixels are decoded on first use, inside the block.

    Raises FileNotFoundError if there is no file, and ValueError, in one line, if it is damaged or not an image.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no image file {path}")
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged or no image: {reason}") from error


def open_image(path: str | Path, mode: str = "RGB") -> Image.Image:
    """Decode an image file, turned upright by its EXIF orientation, as "RGB" or "L". Raises as `opened` does."""
    with opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16-bit grey, which convert would clip to 8 bits
            upright = upright.point(lambda level: level / 256, "F")
        return upright.convert(mode)


def save_png(image: Image.Image, path: Path, record: dict[str, Any] | None = None) -> None:
    """Write a PNG file, whole or not at all, with `record` as JSON in its text chunk "hybriddit" if given."""
    info = PngInfo()
    if record is not None:
        info.add_itxt(RECORD_KEY, json.dumps(record, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        image.save(partial, format="PNG", pnginfo=info)


def read_record(path: str | Path) -> dict[str, Any] | None:
    """The record that `save_png` wrote; None for an image without one. Raises as `opened` does."""
    with opened(path) as image:
        image.load()  # the text chunk may follow the pixels, and a damaged file shows here
        text = image.info.get(RECORD_KEY)
        return None if text is None else json.loads(text)


def save_grid(path: Path, columns: Sequence[Sequence[Image.Image]]) -> None:
    """Write a PNG file with a grid of images of one size; each sequence is one column."""
    width, height = columns[0][0].size
    grid = Image.new(columns[0][0].mode, (width * len(columns), height * len(columns[0])))
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            grid.paste(image, (x * width, y * height))
    save_png(grid, path)
