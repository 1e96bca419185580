"""Window attention by torch's FlexAttention: compiled on a GPU, exact, in memory linear in the tokens.

The kernel computes blocks of 128 queries x 128 keys and skips blocks that are masked entirely. Tokens are therefore
reordered so that a block is a 2-D tile of the grid: a window touches fewer tiles than rows of tokens. Text keys follow
the image's. Which blocks see which is computed per axis; no mask of the grid is ever made.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..trial import TOLERANCE, triton_requirements
from .case import WindowCase
from .rule import class_windows, distance_limit, pair

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask  # takes seconds to import: only where it is used

BLOCK = 128
# Rows x columns of a tile, squarest first: the first of equally good ones is taken.
TILES = ((8, 16), (16, 8), (4, 32), (32, 4), (2, 64), (64, 2), (1, 128), (128, 1))
# The cost of masking a partly seen block, as a share of computing one (estimated, unmeasured).
MASKING_COST = 0.2
MIN_HEAD_DIM = 16  # the kernels' smallest; narrower heads are padded with zeros
MAX_HEAD_DIM = 256
# The backend is chosen below this share of dense attention's query-key pairs (estimated from the pairs, unmeasured).
BREAK_EVEN = 0.8


def refusal(case: WindowCase) -> str | None:
    """Why FlexAttention cannot do a case, or None."""
    if case.device.type == "cpu":
        return "it has no gradients on a CPU" if case.gradients else None
    if case.device.type not in ("cuda", "xpu"):
        return f"it does not run on {case.device.type}"
    if case.dtype not in TOLERANCE:
        return f"it has no {case.dtype} kernels"
    if case.head_dim > MAX_HEAD_DIM:
        return f"it has no kernels for head width {case.head_dim}"
    missing = triton_requirements()
    return f"it needs {' and '.join(missing)}" if missing else None


def slower(case: WindowCase) -> str | None:
    """Why another backend is faster, or None."""
    if not case.on_gpu:
        return "on a CPU it is not compiled"
    layout = best_layout(case.grid, case.window, case.stride, case.dilation, case.text_length, case.circle)
    return case.too_much_work(visited_blocks(layout)[0] * BLOCK**2 / case.dense_pairs, BREAK_EVEN)


class Axis(NamedTuple):
    """An axis of the grid, its window, and the tile it is cut into.

    With dilation, positions that are equal modulo `dilation` are put next to each other: the axis becomes `dilation`
    runs of `run` positions. It is padded to whole tiles.
    """

    length: int
    window: int
    stride: int
    dilation: int
    tile: int

    @property
    def run(self) -> int:
        return -(-self.length // self.dilation)

    @property
    def tiles(self) -> int:
        return -(-self.dilation * self.run // self.tile)


def axis_windows(axis: Axis, position):
    """What each position of a reordered axis sees: the first position, and the number of positions.

    position: ints, a torch tensor or a numpy array. A padding position sees what the last real one of its run sees,
    and is seen by none.
    """
    residue = 0 if axis.dilation == 1 else (position // axis.run).clip(max=axis.dilation - 1)
    begin = residue * axis.run
    first, count = class_windows(position - begin, residue, *axis[:4])
    return begin + first, count


class Layout(NamedTuple):
    """The reordered tokens: tiles of the grid row by row, then text keys, padded to whole blocks."""

    rows: Axis
    columns: Axis
    text_length: int
    circle: bool = False

    @property
    def image_blocks(self) -> int:
        return self.rows.tiles * self.columns.tiles

    @property
    def text_blocks(self) -> int:
        return -(-self.text_length // BLOCK)

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of queries and of keys, padding included."""
        return BLOCK * self.image_blocks, BLOCK * (self.image_blocks + self.text_blocks)

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """FlexAttention's mask function: whether a query sees a key, given their places in the reordered tokens."""
        rows, columns, text_length, circle = self
        image = self.lengths[0]

        def place(token):
            # shifts, because torch generates a dozen instructions for a floor division
            tile, inside = token >> BLOCK.bit_length() - 1, token & BLOCK - 1
            row = tile // columns.tiles * rows.tile + (inside >> columns.tile.bit_length() - 1)
            return row, tile % columns.tiles * columns.tile + (inside & columns.tile - 1)

        def seen(batch, head, query, key):
            (query_row, query_column), (row, column) = place(query), place(key)
            if circle:
                # a padding position sees what the last real one does, and is seen by none
                down, across = (
                    query_row.clip(max=rows.length - 1) - row,
                    query_column.clip(max=columns.length - 1) - column,
                )
                near = down * down + across * across < distance_limit(rows.window, circle)
                near = near & (row < rows.length) & (column < columns.length)
                return near | ((key >= image) & (key < image + text_length)) if text_length else near
            (first_row, height), (first_column, width) = (
                axis_windows(rows, query_row),
                axis_windows(columns, query_column),
            )
            near = (row >= first_row) & (row < first_row + height)
            near = near & (column >= first_column) & (column < first_column + width)
            # rows of text keys lie below the grid: they are never near
            return near | ((key >= image) & (key < image + text_length)) if text_length else near

        return seen

    def to_tiles(self, x: Tensor) -> Tensor:
        """Reorder the tokens and pad them: [B, H, W, heads, D] -> [B, heads, tokens, D]."""
        for dim, axis in enumerate((self.rows, self.columns), start=1):
            if axis.dilation > 1:
                x = _pad(x, dim, axis.run * axis.dilation)
                x = x.unflatten(dim, (axis.run, axis.dilation)).transpose(dim, dim + 1).flatten(dim, dim + 1)
            x = _pad(x, dim, axis.tiles * axis.tile)
        x = x.unflatten(2, (self.columns.tiles, self.columns.tile)).unflatten(1, (self.rows.tiles, self.rows.tile))
        return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(2, 5)

    def from_tiles(self, x: Tensor) -> Tensor:
        """The inverse of `to_tiles`, without the padding."""
        x = x.unflatten(2, (self.rows.tiles, self.columns.tiles, self.rows.tile, self.columns.tile))
        x = x.permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2)
        for dim, axis in enumerate((self.rows, self.columns), start=1):
            x = x.narrow(dim, 0, axis.run * axis.dilation)
            if axis.dilation > 1:
                x = x.unflatten(dim, (axis.dilation, axis.run)).transpose(dim, dim + 1).flatten(dim, dim + 1)
            x = x.narrow(dim, 0, axis.length)
        return x


def _pad(x: Tensor, dim: int, size: int) -> Tensor:
    """Pad one dimension to `size` with zeros at its end."""
    if x.shape[dim] == size:
        return x
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, size - x.shape[dim]))


class _Tiles(NamedTuple):
    """How far tiles of an axis are from each other, as in `rule.axis_distances`: integers [query tiles, key tiles].

    nearest, farthest: of all their queries and keys. A block of two axes' tiles is seen where the sum of both nearest is
    below the limit, and seen wholly where that of both farthest is.
    """

    nearest: np.ndarray
    farthest: np.ndarray
    limit: int

    @property
    def transposed(self) -> _Tiles:
        return _Tiles(self.nearest.T, self.farthest.T, self.limit)


@lru_cache(maxsize=256)
def _axis_tiles(axis: Axis, circle: bool) -> _Tiles:
    limit = distance_limit(axis.window, circle)
    if circle:
        low = np.arange(axis.tiles, dtype=np.int32) * axis.tile
        high, whole = np.minimum(low + axis.tile, axis.length) - 1, low + axis.tile <= axis.length
        apart = low[None] - high[:, None], low[:, None] - high[None]
        nearest = np.maximum(np.maximum(*apart), 0) ** 2
        return _Tiles(nearest, np.where(whole, np.minimum(*apart) ** 2, np.int32(limit)), limit)
    start, count = axis_windows(axis, np.arange(axis.tiles * axis.tile))
    start, stop = (x.reshape(axis.tiles, axis.tile, 1) for x in (start, start + count))
    edges = np.arange(axis.tiles) * axis.tile
    seen = (start < edges + axis.tile) & (stop > edges)
    whole = (start <= edges) & (stop >= edges + axis.tile)
    return _Tiles((~seen.any(1)).astype(np.uint8), (~whole.all(1)).astype(np.uint8), limit)


def _tiles(layout: Layout) -> tuple[_Tiles, _Tiles]:
    return _axis_tiles(layout.rows, layout.circle), _axis_tiles(layout.columns, layout.circle)


def visited_blocks(layout: Layout) -> tuple[int, int]:
    """The number of (query block, key block) pairs that are computed, and of those among them that need no mask."""
    rows, columns = _tiles(layout)
    text, whole_text = layout.image_blocks * layout.text_blocks, layout.image_blocks * (layout.text_length // BLOCK)
    seen, whole = (_below(rows.limit, *pair) for pair in zip(rows[:2], columns[:2], strict=True))
    return seen + text, whole + whole_text


def _below(limit: int, rows: np.ndarray, columns: np.ndarray) -> int:
    """The number of pairs, of a number of each, whose sum is below the limit."""
    (rows, counts), columns = np.unique(rows, return_counts=True), np.sort(columns, axis=None)
    return int(counts @ np.searchsorted(columns, limit - rows))


def best_layout(grid, window, stride, dilation, text_length: int, circle: bool = False) -> Layout:
    """The layout with the least work. Takes ints and pairs of ints, window and stride as in a WindowCase."""
    case = grid, window, stride, dilation, text_length, circle
    if torch.compiler.is_compiling():
        from ..tracing import constant

        return _layout(*case, constant(best_tile, *case))
    return _layout(*case, best_tile(*case))


def _layout(grid, window, stride, dilation, text_length, circle, tile) -> Layout:
    dilation = [min(d, n) for d, n in zip(dilation, grid, strict=True)]
    rows, columns = (Axis(*axis) for axis in zip(grid, window, stride, dilation, tile, strict=True))
    return Layout(rows, columns, text_length, circle)


def best_tile(*case) -> tuple[int, int]:
    """The tile of TILES with the least work, for the arguments of `best_layout`."""
    return _kept_best_tile(*case)


@lru_cache(maxsize=256)
def _kept_best_tile(*case):
    def cost(tile):
        visited, whole = visited_blocks(_layout(*case, tile))
        return visited + MASKING_COST * (visited - whole)

    return min(TILES, key=cost)


def _lists(rows: _Tiles, columns: _Tiles) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each block: which blocks it may see [blocks, k], which of these it sees, and which it sees wholly."""

    def neighbors(tiles):
        seen = tiles.nearest < tiles.limit
        index = np.argsort(~seen, axis=1, kind="stable")[:, : seen.sum(1).max()]
        return index, *(np.take_along_axis(distances, index, axis=1) for distances in tiles[:2])

    def outer(row, column):
        return (row[:, None, :, None] + column[None, :, None, :]).reshape(len(row) * len(column), -1)

    row, column = neighbors(rows), neighbors(columns)
    index = outer(row[0] * columns.nearest.shape[1], column[0])
    return index, *(outer(r, c) < rows.limit for r, c in zip(row[1:], column[1:], strict=True))


def _counted(index: np.ndarray, *kinds: np.ndarray, width: int = 1) -> list[np.ndarray]:
    """For each kind of block: their number in each row [1, 1, blocks], and their indices [1, 1, blocks, width].

    All kinds share one width: torch 2.11 reads the list of whole blocks with the strides of the other list.
    """
    width = max(width, *(int(kind.sum(1).max()) for kind in kinds))
    arrays = []
    for kind in kinds:
        order = np.argsort(~kind, axis=1, kind="stable")[:, :width]
        listed = np.zeros((len(kind), width), dtype=np.int32)
        listed[:, : order.shape[1]] = np.take_along_axis(index, order, axis=1)
        arrays += [kind.sum(1, dtype=np.int32)[None, None], listed[None, None]]
    return arrays


def block_arrays(layout: Layout, gradients: bool, all_columns: bool = False) -> list[np.ndarray]:
    """The arrays of torch's BlockMask.

    They are the counts and indices of each query block's partly seen and wholly seen key blocks and, for gradients, of
    each key block's query blocks. The lists are as wide as the longest needs to be; with `all_columns`, as torch's CPU
    kernel requires, as wide as the number of key blocks. Text is seen by all queries: with it, the lists for gradients
    hold a number for every pair of blocks (4 bytes per 16,384 pairs of tokens).
    """
    rows, columns = _tiles(layout)
    blocks, whole_text, text = layout.image_blocks, layout.text_length // BLOCK, layout.text_blocks
    index, seen, whole = _lists(rows, columns)
    if text:
        index = np.concatenate((index, np.broadcast_to(blocks + np.arange(text), (blocks, text))), 1)
        seen = np.pad(seen, ((0, 0), (0, text)), constant_values=True)
        whole = np.pad(whole, ((0, 0), (0, whole_text)), constant_values=True)
        whole = np.pad(whole, ((0, 0), (0, text - whole_text)))
    arrays = _counted(index, seen & ~whole, whole, width=blocks + text if all_columns else 1)
    if not gradients:
        return arrays
    index, seen, whole = _lists(rows.transposed, columns.transposed)
    lists = _counted(index, seen & ~whole, whole, width=blocks if text else 1)
    if text:
        count = np.zeros((2, 1, 1, text), dtype=np.int32)
        count[0, ..., whole_text:], count[1, ..., :whole_text] = blocks, blocks
        every = np.broadcast_to(np.arange(blocks, dtype=np.int32), (1, 1, text, blocks))
        lists = [np.concatenate(pair, 2) for pair in zip(lists, (count[0], every, count[1], every), strict=True)]
    return arrays + lists


@lru_cache(maxsize=256)
def _block_shapes(layout: Layout, gradients: bool, device_type: str) -> list[tuple[int, ...]]:
    return [array.shape for array in block_arrays(layout, gradients, device_type == "cpu")]


@lru_cache(maxsize=16)
def _kept_blocks(layout: Layout, gradients: bool, device: torch.device) -> list[Tensor]:
    with torch.inference_mode(False):  # tensors made in inference mode could not be saved for a later backward
        arrays = block_arrays(layout, gradients, device.type == "cpu")
        return [torch.from_numpy(array).to(device, copy=True) for array in arrays]


# An opaque operator for torch.compile, so that graphs hold neither the lists nor the code that makes them. The compiler
# may overwrite an operator's results, hence the copies.
@torch.library.custom_op("hybriddit::window_blocks", mutates_args=())
def _window_blocks(
    rows: Sequence[int],
    columns: Sequence[int],
    text_length: int,
    gradients: bool,
    device: torch.device,
    circle: bool = False,
) -> list[Tensor]:
    layout = Layout(Axis(*rows), Axis(*columns), text_length, circle)
    return [x.clone() for x in _kept_blocks(layout, gradients, device)]


@_window_blocks.register_fake
def _(rows, columns, text_length, gradients, device, circle=False):
    shapes = _block_shapes(Layout(Axis(*rows), Axis(*columns), text_length, circle), gradients, device.type)
    return [torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes]


def _block_mask(layout: Layout, blocks: list[Tensor]) -> BlockMask:
    from torch.nn.attention.flex_attention import BlockMask

    # the constructor, because `from_kv_blocks` makes a dense matrix of blocks to transpose the lists
    kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, *transposed = blocks
    q_num_blocks, q_indices, full_q_num_blocks, full_q_indices = transposed or (None,) * 4
    return BlockMask(
        seq_lengths=layout.lengths,
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num_blocks,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num_blocks,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num_blocks,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=layout.mask_mod(),
    )


def attend(query, key, value, text_key, text_value, window, stride, dilation, scale, circle=False) -> Tensor:
    """Compute window attention (see `dispatch.Backend`); on a CPU without gradients."""
    text_length = 0 if text_key is None else operator.index(text_key.shape[1])
    grid = tuple(operator.index(n) for n in query.shape[1:3])
    inputs = [x for x in (query, key, value, text_key, text_value) if x is not None]
    gradients = query.device.type != "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    layout = best_layout(grid, window, stride, dilation, text_length, circle)
    if query.device.type == "cpu":  # there FlexAttention refuses inputs with requires_grad, even under no_grad
        query, key, value = query.detach(), key.detach(), value.detach()
    settings = layout, scale
    if torch.compiler.is_compiling() or type(query) is not Tensor:
        blocks = torch.ops.hybriddit.window_blocks(
            list(layout.rows), list(layout.columns), text_length, gradients, query.device, circle
        )
        return _attend(query, key, value, text_key, text_value, blocks, *settings)
    blocks = _kept_blocks(layout, gradients, query.device)
    compiled = _compiled(*settings, query.shape, query.dtype, query.device, torch.is_grad_enabled(), gradients)
    return compiled(query, key, value, text_key, text_value, blocks, *settings)


def _attend(query, key, value, text_key, text_value, blocks, layout: Layout, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    head_dim = query.shape[-1]
    query, key, value = (layout.to_tiles(x) for x in (query, key, value))
    if text_key is not None:
        key, value = (
            torch.cat((x, _pad(text.transpose(1, 2), 2, BLOCK * layout.text_blocks)), dim=2)
            for x, text in ((key, text_key), (value, text_value))
        )
    # heads first in memory too: torch 2.11 addresses the tokens of a head by 32-bit numbers
    query, key, value = (_pad(x, 3, max(head_dim, MIN_HEAD_DIM)).contiguous() for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        out = flex_attention(query, key, value, block_mask=_block_mask(layout, blocks), scale=scale)
    return layout.from_tiles(out)[..., :head_dim]


@lru_cache(maxsize=128)
def _compiled(*case: Any) -> Callable[..., Tensor]:
    # torch counts recompilations by code object, and runs uncompiled after eight: every case gets a copy of its own
    copy = FunctionType(_attend.__code__.replace(), _attend.__globals__)
    backend = "eager" if case[4].type == "cpu" else "inductor"
    return torch.compile(copy, backend=backend, fullgraph=True, dynamic=False)


def aligned_window(
    grid: tuple[int, int], cost: float, *, tile: tuple[int, int] | None = None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Choose a window and stride that follow tile borders: key blocks are seen wholly or not at all, so none is masked.

    With a tile of t positions along an axis of n = c t, the window is b t and the stride a t, a = 1 where b is odd and
    2 where it is even: windows then start at multiples of t (generalized neighborhood attention, arXiv 2504.16922).
    Every query sees (b1 t1) (b2 t2) keys, the share b1 b2 / (c1 c2) of dense attention's. Of the windows whose share is
    at most `cost`, the one nearest to a square of that share is returned.

    Args:
        grid: (rows, columns) in tokens.
        cost: the largest share of dense attention's query-key pairs, above 0, at most 1; text is not counted.
        tile: (rows, columns); None takes the best of the tiles of 128 tokens that the "flex" backend uses.

    Returns (window, stride), each (rows, columns). Raises ValueError where no tile divides the grid, and where a single
    tile costs more than `cost`.
    """
    grid = pair("grid", grid)
    if not 0 < cost <= 1:
        raise ValueError(f"cost must be above 0 and at most 1, got {cost!r}")
    tiles = TILES if tile is None else (pair("tile", tile),)
    tiles = [tile for tile in tiles if all(n % t == 0 for n, t in zip(grid, tile, strict=True))]
    if not tiles:
        wanted = f"{tile} tokens" if tile else f"{BLOCK} tokens (as 8 x 16)"
        raise ValueError(f"no tile of {wanted} divides the grid {grid}")
    budget = cost * math.prod(grid) * (1 + 1e-9)  # allow for the rounding of a share such as 9 / 64
    side = math.sqrt(budget)
    # where one axis of the grid is too short for the square, the window may be longer along the other
    wanted = [min(n, max(side, budget / other)) for n, other in zip(grid, reversed(grid), strict=True)]
    windows = [
        ((b1 * t1, b2 * t2), (t1, t2))
        for t1, t2 in tiles
        for b1 in range(1, grid[0] // t1 + 1)
        for b2 in range(1, grid[1] // t2 + 1)
        if b1 * t1 * b2 * t2 <= budget
    ]
    if not windows:
        least = min(map(math.prod, tiles)) / math.prod(grid)
        raise ValueError(f"cost {cost:g} is below that of one tile, {least:.4g}")

    def distance(window):
        return sum(abs(math.log(size / goal)) for size, goal in zip(window[0], wanted, strict=True))

    window, tile = min(windows, key=distance)
    return window, tuple(t if w // t % 2 else 2 * t for w, t in zip(window, tile, strict=True))
