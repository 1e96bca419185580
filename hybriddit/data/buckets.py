"""Buckets: the sizes that images of many shapes are scaled and cropped to. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]  # (height, width) in pixels
ASPECT = "aspect"  # the value of data.buckets that asks for `aspect_sizes`
MOST_ENLARGED = 2.0  # an image that would be scaled by more is left out


def bucket_sizes(buckets: str | Sequence[Sequence[int]] | None, height: int, width: int, side: int) -> list[Size]:
    """The sizes that `data.buckets` asks for; None: height x width alone. side: pixels of a token's side.

    Raises ValueError, in one line, for a size that is not a whole number of tokens.
    """
    for name, pixels in (("height", height), ("width", width)):
        if pixels % side:
            raise ValueError(f"data.{name} must be a multiple of {side}, the pixels of one token's side, got {pixels}")
    if buckets is None:
        return [(height, width)]
    if buckets == ASPECT:
        return aspect_sizes(height, width, side)
    for size in buckets:
        if any(pixels % side for pixels in size):
            raise ValueError(
                f"data.buckets must be of multiples of {side}, the pixels of one token's side, got {list(size)}"
            )
    return sorted((rows, columns) for rows, columns in buckets)


def aspect_sizes(height: int, width: int, side: int) -> list[Size]:
    """Sizes from 1:4 to 4:1 of as many pixels as height x width or slightly fewer, and height x width itself.

    Their sides are multiples of a step, about a sixteenth of that area's root in whole tokens: 64 pixels for 1024 x 1024,
    as in the lists of sizes that SDXL and PixArt-Sigma were trained on.
    """
    area, root = height * width, math.sqrt(height * width)
    step = side * max(1, round(root / 16 / side))
    sizes = {(height, width)}
    for one in range(math.ceil(root / 2 / step) * step, math.floor(2 * root) + 1, step):
        other = area // one // step * step
        if other:
            sizes |= {(one, other), (other, one)}
    return sorted(sizes)


def choose_bucket(width: int, height: int, sizes: Sequence[Size]) -> tuple[Size, float]:
    """The bucket of an image in which the least is lost, and the scale at which the image covers it.

    Lost is what is cropped of the image, and what of the bucket's pixels is made up by enlarging it: for an image larger
    than the buckets this is the one of the nearest aspect ratio. Among buckets that are equally good, up to 2 %, it is
    the largest.
    """

    def scale(size: Size) -> float:
        return max(size[0] / height, size[1] / width)

    def kept(size: Size) -> float:
        own = min(1.0, scale(size) ** -2)  # the share of the bucket's pixels that the image has
        return size[0] * size[1] / (scale(size) ** 2 * width * height) * own

    best = max(map(kept, sizes))
    good = [size for size in sizes if kept(size) >= 0.98 * best]
    chosen = max(good, key=lambda size: (size[0] * size[1], kept(size), size))
    return chosen, scale(chosen)


def describe_buckets(images: dict[Size, int]) -> str:
    """Sizes and numbers of images, in words."""
    return ", ".join(f"{height} x {width} ({count})" for (height, width), count in images.items())
