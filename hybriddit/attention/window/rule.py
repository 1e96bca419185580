"""Which tokens a window holds: natten's rule (arXiv 2204.07143; with a stride 2504.16922), one axis at a time.

A window is centred on the leader of a group of `stride` positions, which share it, and shifted inwards at the borders.
With dilation d, each of the d residue classes of an axis (positions 0, d, 2d, …; 1, d + 1, …) is an axis of its own.
A window longer than its axis is clamped to it, then the stride to the window. A grid's window is the product of its
rows' and its columns'.

A circular window (CLEAR's, arXiv 2412.16112) holds the tokens at a Euclidean distance below its radius, which is what
`window` then is, for both axes: it does not shift at borders and is not clamped, and has neither stride nor dilation.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Masks up to this size are kept: building one costs as much as attention with it on a small grid.
KEPT_MASK_ELEMENTS = 2**21


def class_windows(index, residue, length: int, window: int, stride: int, dilation: int):
    """The window of each position of an axis, as (first, count), both counted within the position's residue class.

    index: each position's place within its residue class, a torch tensor or a numpy array. residue: which class that
    is, likewise or an int. The result is of the same type.
    """
    size = (length - residue + dilation - 1) // dilation  # of the residue class
    window = _at_most(size, window)
    leader = index
    if stride > 1:
        stride = _at_most(window, stride)
        leader = index // stride * stride + stride // 2
    first = leader.clip(max=size - 1) - window // 2
    return first.clip(min=0).clip(max=size - window), window


@lru_cache(maxsize=1024)
def key_rows(
    first: int, count: int, *, height: int, window: int, stride: int = 1, dilation: int = 1, circle: bool = False
) -> tuple[int, int]:
    """The (first, end) of the rows that hold the windows of `count` rows from `first` on, of an axis of `height`.

    These rows, taken as an axis of their own, give those queries the same windows: they begin with a group of each
    residue class, and end where the axis ends if a window has been shifted inwards there.
    """
    if circle:
        return max(0, first - window + 1), min(height, first + count + window - 1)
    position = np.arange(first, first + count)  # torch's would be without data where tensors are
    residue, index = position % dilation, position // dilation
    start, size = class_windows(index, residue, height, window, stride, dilation)
    start, end = start * dilation + residue, (start + size - 1) * dilation + residue + 1
    # a window reaches back to its own group at least, so that the group of the first of its rows is not cut either
    begin = min(int(start.min()), first) // (stride * dilation) * (stride * dilation)
    return begin, max(int(end.max()), first + count)


def _at_most(x, limit: int):
    return min(x, limit) if isinstance(x, int) else x.clip(max=limit)


def class_lengths(length: int, dilation: int) -> list[int]:
    """How many positions each residue class of an axis has."""
    return [(length - residue + dilation - 1) // dilation for residue in range(dilation)]


def axis_mask(length: int, window: int, stride: int, dilation: int) -> Tensor:
    """[length, length] bool, on the CPU: which positions of an axis (columns) each position (row) sees."""
    position = torch.arange(length, device="cpu")
    residue, index = position % dilation, position // dilation
    first, count = class_windows(index, residue, length, window, stride, dilation)
    first, count = first.unsqueeze(1), count.unsqueeze(1)
    return (residue.unsqueeze(1) == residue) & (index >= first) & (index < first + count)


def axis_distances(length: int, window: int, stride: int, dilation: int, circle: bool) -> Tensor:
    """[length, length] integers, on the CPU: how far each position of an axis (columns) is from each position (row).

    A token of a grid sees another one where the sum of both axes' is below `distance_limit`. Of a circle they are
    squares, up to that limit; else 0 for a position that is seen and 1 for one that is not.
    """
    if not circle:
        return (~axis_mask(length, window, stride, dilation)).to(torch.uint8)
    position = torch.arange(length, device="cpu", dtype=torch.int32)
    return (position.unsqueeze(1) - position).square_().clamp_(max=distance_limit(window, circle))


def distance_limit(window: int, circle: bool) -> int:
    """What the sum of the `axis_distances` of a grid's axes is below for tokens that are seen; of either axis' window."""
    return window**2 if circle else 1


def additive_mask(seen: Tensor, text_length: int, dtype: torch.dtype) -> Tensor:
    """Make a bool mask [..., keys] additive, [..., keys + text]: 0 for seen keys and for all text, else -inf."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)
    return F.pad(mask, (0, text_length))


def covers(grid: tuple[int, int], window: tuple[int, int], dilation: tuple[int, int], circle: bool = False) -> bool:
    """Whether every token sees the whole grid; the window is clamped to the grid, but for a circle."""
    if circle:
        return sum((n - 1) ** 2 for n in grid) < distance_limit(window[0], circle)
    return window == grid and all(d == 1 or n == 1 for n, d in zip(grid, dilation, strict=True))


def seen_pairs(grid: tuple[int, int], window: tuple[int, int], dilation: tuple[int, int], circle: bool = False) -> int:
    """The number of pairs of a token of the grid and a token that it sees."""
    if circle:
        return circle_pairs(*(np.arange(n) for n in grid), grid, window[0])
    axes = zip(grid, window, dilation, strict=True)
    return math.prod(sum(n * min(w, n) for n in class_lengths(length, d)) for length, w, d in axes)


def circle_pairs(rows: np.ndarray, columns: np.ndarray, grid: tuple[int, int], radius: int) -> int:
    """The number of tokens of a grid in the circles around all its places (row, column), for each of rows and columns."""
    offsets = np.arange(1 - radius, radius)
    inside = offsets[:, None] ** 2 + offsets**2 < radius**2
    row_pairs, column_pairs = (
        ((places + offsets[:, None] >= 0) & (places + offsets[:, None] < length)).sum(1)
        for places, length in zip((rows, columns), grid, strict=True)
    )
    return int(row_pairs @ inside @ column_pairs)


def pair(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    """An int or (rows, columns) as a pair. Raises ValueError with `name` for anything else and for sizes below 1."""
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if not (len(sides) == 2 and _is_size(sides[0]) and _is_size(sides[1])):
        raise ValueError(f"{name} must be an int of at least 1 or two of them (rows, columns), got {size!r}")
    return sides


def _is_size(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 1
