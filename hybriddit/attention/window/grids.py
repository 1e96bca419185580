"""Window attention of several images in one sequence: an image that is made, and reference images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .dispatch import neighborhood_attention
from .rule import circle_pairs, class_lengths, seen_pairs

Grid = tuple[int, int]
Positions = TypeVar("Positions", Tensor, np.ndarray)


def attention_over_grids(
    query: Tensor, key: Tensor, value: Tensor, grids: Sequence[Grid], *, return_lse: bool = False, **settings: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every token to the window around it, a window of each other grid, and all text.

    The window of another grid is that of its token at the same relative position: the one in which the middle of the
    query's row and column falls when both grids are laid over one another. All keys have one sum of weights.

    query, key, value: [B, N, heads, D], the tokens of all grids one after another, each row by row. grids: their
    (height, width) in tokens. settings: the other arguments of `neighborhood_attention`.

    Returns [B, N, heads, D], or that and the log-sum-exp [B, N, heads] in at least float32.
    """
    if len(grids) == 1:
        images = (tokens.unflatten(1, grids[0]) for tokens in (query, key, value))
        found = neighborhood_attention(*images, return_lse=return_lse, **settings)
        return tuple(x.flatten(1, 2) for x in found) if return_lse else found.flatten(1, 2)
    lengths = [rows * columns for rows, columns in grids]
    images = list(zip(grids, *(tokens.split(lengths, dim=1) for tokens in (query, key, value)), strict=True))
    without_text = settings | {"text_key": None, "text_value": None, "text_mask": None}
    outs, sums = [], []
    for number, (grid, queries, _, _) in enumerate(images):
        parts = [
            _attend(queries, keys, values, grid, other, settings if number == place else without_text)
            for place, (other, _, keys, values) in enumerate(images)
        ]
        lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
        out = sum((part_lse - lse).exp().unsqueeze(-1) * part for part, part_lse in parts)
        outs.append(out.to(query.dtype))
        sums.append(lse)
    return (torch.cat(outs, 1), torch.cat(sums, 1)) if return_lse else torch.cat(outs, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, grid: Grid, other: Grid, settings: dict[str, Any]):
    """Attention of one grid's queries to windows of one grid, and its log-sum-exp."""
    if grid == other:
        images = (tokens.unflatten(1, grid) for tokens in (query, key, value))
        return tuple(x.flatten(1, 2) for x in neighborhood_attention(*images, return_lse=True, **settings))
    # Queries take the places of the other grid's tokens, in as many layers as have to share a place. Free places have
    # the first query, whose results there are not used.
    (rows, row_layers), (columns, column_layers) = (
        _places(n, m, query.device) for n, m in zip(grid, other, strict=True)
    )
    layers, (height, width) = row_layers * column_layers, other
    (row, row_layer), (column, column_layer) = ((x.unsqueeze(1) for x in rows), (x.unsqueeze(0) for x in columns))
    place = (((row_layer * column_layers + column_layer) * height + row) * width + column).flatten()
    taken = place.new_zeros(layers * height * width).index_copy(0, place, torch.arange(len(place), device=place.device))
    query = query[:, taken].unflatten(1, (layers, *other)).flatten(0, 1)
    key, value = (tokens.unflatten(1, other).repeat_interleave(layers, 0) for tokens in (key, value))
    found = neighborhood_attention(query, key, value, return_lse=True, **settings)
    return tuple(x.unflatten(0, (-1, layers)).flatten(1, 3)[:, place] for x in found)


def _places(length: int, other: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], int]:
    """Where the positions of an axis are on another axis, as (position there, layer), and how many layers they need.

    Positions that fall on the same one are in different layers.
    """
    position = torch.arange(length, device=device)
    there = _there(position, length, other)
    return (there, position - torch.searchsorted(there, there)), -(-length // other)


def seen_over_grids(grids: Sequence[Grid], window: Grid, dilation: Grid, circle: bool = False) -> int:
    """The number of pairs of a token and a token that it sees, as in `attention_over_grids`."""
    return sum(
        seen_pairs(grid, window, dilation, circle)
        if number == place
        else circle_pairs(*(_there(np.arange(n), n, m) for n, m in zip(grid, other, strict=True)), other, window[0])
        if circle
        else math.prod(_seen_of_axis(*axis) for axis in zip(grid, other, window, dilation, strict=True))
        for number, grid in enumerate(grids)
        for place, other in enumerate(grids)
    )


def _there(position: Positions, length: int, other: int) -> Positions:
    """Where positions of an axis are on another one: where the middle of each falls."""
    return (2 * position + 1) * other // (2 * length)


def _seen_of_axis(length: int, other: int, window: int, dilation: int) -> int:
    lengths = class_lengths(other, dilation)
    return sum(min(window, lengths[(2 * i + 1) * other // (2 * length) % dilation]) for i in range(length))
