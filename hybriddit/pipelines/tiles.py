"""The tiles of a large image: made one after another, or shared by several processes, and joined."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

# (functions that make a tile each; a tensor of the tiles' dtype and number of dimensions, on their device) -> the tiles
Share = Callable[[Sequence[Callable[[], Tensor]], Tensor], Iterator[Tensor]]


def one_by_one(makes: Sequence[Callable[[], Tensor]], like: Tensor) -> Iterator[Tensor]:
    """All tiles, each made when it is asked for. Several processes have `parallel.shared_tiles` in its place."""
    return (make() for make in makes)


def in_rows(tiles: Iterator[Tensor], count: int) -> Iterator[list[Tensor]]:
    """So many tiles at a time."""
    while row := list(itertools.islice(tiles, count)):
        yield row


def blended_rows(vae: nn.Module, rows: Iterable[list[Tensor]], blended: int, kept: int) -> Iterator[Tensor]:
    """Join tiles [B, C, h, w] that overlap, given row by row, to strips from the top, as diffusers' VAEs do.

    blended: over how many rows and columns tiles are blended into their neighbours; kept: of each tile, from the top left.
    """
    above: list[Tensor] = []
    for row in rows:
        for i, tile in enumerate(row):  # both blend into their second argument
            if above:
                vae.blend_v(above[i], tile, blended)
            if i:
                vae.blend_h(row[i - 1], tile, blended)
        yield torch.cat([tile[:, :, :kept, :kept] for tile in row], 3)
        above = row
