"""One call of window attention, as far as the choice of its backend depends on it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

# A mask of more elements than this is not made on account of speed alone.
MASK_ELEMENTS = 2**26


class WindowCase(NamedTuple):
    """What decides which backend runs: sizes in tokens, pairs as (rows, columns), window and stride within the grid."""

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

    @property
    def on_gpu(self) -> bool:
        return self.device.type != "cpu"

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def dense_pairs(self) -> int:
        """Pairs of a query and a key that dense attention computes."""
        return self.tokens * (self.tokens + self.text_length)

    def too_much_work(self, share: float, limit: float) -> str | None:
        """Why dense attention under a mask is faster than a backend with this share of its work, or None.

        limit: the share from which on the backend does not pay.
        """
        if share < limit or self.tokens**2 > MASK_ELEMENTS:
            return None
        return f"it would do {share:.2f} of dense attention's work, and pays below {limit}"
