"""Pooled keys: a weighted mean of each block of an image's keys, and of its values, which all image tokens see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class PooledKeys(nn.Module):
    """Weighted sums over blocks of `side` x `side` tokens, as CLEAR's files have them (arXiv 2412.16112).

    The weights [side, side] are one for each place in a block, the same for keys and values and for all heads, and at
    the start those of a mean. Keys are pooled after norm and rotary embedding. Of a grid that blocks do not divide, the
    last row and column are repeated to whole blocks.
    """

    def __init__(self, side: int):
        super().__init__()
        self.side = side
        self.weight = nn.Parameter(torch.full((side, side), 1 / side**2))

    def forward(self, *images: torch.Tensor, grids: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
        """[B, N, heads, D] each -> [B, blocks, heads, D] each, of all grids one after another, row by row."""
        return tuple(self._pooled(tokens, grids) for tokens in images)

    def _pooled(self, tokens: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        side, pooled = self.side, []
        weight = self.weight.to(tokens.dtype).view(side, 1, side, 1, 1)
        for image, grid in zip(tokens.split([rows * columns for rows, columns in grids], dim=1), grids, strict=True):
            image = image.unflatten(1, grid)
            for dim, length in enumerate(grid, start=1):
                if length % side:
                    place = torch.arange(-(-length // side) * side, device=image.device).clamp_(max=length - 1)
                    image = image.index_select(dim, place)
            blocks = image.unflatten(2, (-1, side)).unflatten(1, (-1, side))
            pooled.append((blocks * weight).sum((2, 4)).flatten(1, 2))
        return torch.cat(pooled, dim=1)

    def count(self, grids: Sequence[tuple[int, int]]) -> int:
        """How many pooled keys grids have."""
        return sum(-(-rows // self.side) * -(-columns // self.side) for rows, columns in grids)

    def flops(self, tokens: int, width: int) -> int:
        """FLOPs of pooling the keys and values of so many tokens; width: key heads x head width."""
        return 4 * tokens * width
