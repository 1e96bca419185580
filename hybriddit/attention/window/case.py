"""The properties of a window attention call that decide which backend computes it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

# Dense attention with a mask of more elements than this is never chosen for its speed alone.
MASK_ELEMENTS = 2**26


class WindowCase(NamedTuple):
    """What decides which backend runs.

    Sizes are in tokens, pairs are (rows, columns), and window and stride are clamped to the grid, but for a circle, of
    which window is the radius, twice.
    """

    device: torch.device
    dtype: torch.dtype
    grid: tuple[int, int]
    heads: int
    head_dim: int
    window: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    text_length: int = 0
    gradients: bool = False
    circle: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.type != "cpu"

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def dense_pairs(self) -> int:
        """Number of query-key pairs that dense attention computes."""
        return self.tokens * (self.tokens + self.text_length)

    def too_much_work(self, share: float, limit: float) -> str | None:
        """Why dense attention under a mask is faster than a backend that does this share of its work, or None.

        limit: the share at and above which the backend is not worth it.
        """
        if share < limit or self.tokens**2 > MASK_ELEMENTS:
            return None
        return f"it would do {share:.2f} of dense attention's work, and pays below {limit}"
