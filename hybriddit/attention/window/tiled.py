"""Tiled ("halo") window attention in plain torch: exact, on any device, in memory linear in the tokens.

The grid is cut into tiles; each tile's queries attend to the union of their windows under a small mask. Tiles are
processed one row of tiles at a time, so that gathered keys and values stay in cache and never exist for the whole grid.
The backward gathers them again instead of keeping them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..inputs import sum_dtype
from .case import WindowCase
from .rule import KEPT_MASK_ELEMENTS, additive_mask, axis_distances, class_lengths, distance_limit

TILES = ((8, 8), (8, 16), (16, 16), (32, 32))
# The cost of gathering one key for a tile, and of one step of the loop over rows of tiles, measured on a CPU; the unit
# is a query-key pair of one head of width 64.
GATHER_COST, STEP_COST = 35, 60_000
# Text up to this length is copied behind every tile's keys; longer text is attended to once and merged.
SHORT_TEXT = 128
# Gathered keys of one work item, in elements: about what the cache of a core holds.
GATHER_ELEMENTS = 2**20
# The backend is chosen below this share of dense attention's work, by the costs above. The CPU's share is measured; the
# GPUs' is estimated from the pairs computed, unmeasured.
BREAK_EVEN = {"cpu": 0.65, "gpu": 0.5}


def attend(query, key, value, text_key, text_value, window, stride, dilation, scale, circle=False) -> Tensor:
    """Compute window attention (see `dispatch.Backend`)."""
    settings = (list(x) for x in (window, stride, dilation))
    return tiled_attention(query, key, value, text_key, text_value, *settings, scale, circle)[0]


def attend_with_lse(
    query, key, value, text_key, text_value, window, stride, dilation, scale, circle=False
) -> tuple[Tensor, Tensor]:
    """The same, and its log-sum-exp [B, H, W, heads], which has no gradients."""
    settings = (list(x) for x in (window, stride, dilation))
    out, log_sum = tiled_attention(query, key, value, text_key, text_value, *settings, scale, circle)
    return out, log_sum.squeeze(-1)


def refusal(case: WindowCase) -> str | None:
    """None: this backend runs everywhere."""
    return None


def slower(case: WindowCase) -> str | None:
    """Why dense attention is faster, or None."""
    shape = 1, *case.grid, case.heads, case.head_dim
    settings = case.window, case.stride, case.dilation, case.circle
    dense = case.heads * case.head_dim / 64 * case.tokens**2  # in the CPU's cost model, as for the tiles
    share = tiled_cost(shape, *settings, best_tile(shape, *settings)) / dense
    return case.too_much_work(share, BREAK_EVEN["gpu" if case.on_gpu else "cpu"])


class AxisTiles(NamedTuple):
    """Equal tiles of one axis: `len(keys)` tiles of `size` queries, from position `start` on.

    Tile t sees `span` keys from keys[t] on.
    distances [patterns, size, span] holds the distinct `axis_distances`, pattern[t] says which ones are tile t's.
    """

    start: int
    size: int
    span: int
    keys: tuple[int, ...]
    pattern: tuple[int, ...]
    distances: Tensor

    def queries(self, first: int, count: int = 1) -> slice:
        return slice(self.start + first * self.size, self.start + (first + count) * self.size)

    def key_slice(self, tile: int) -> slice:
        return slice(self.keys[tile], self.keys[tile] + self.span)


@lru_cache(maxsize=256)
def tile_axis(length: int, window: int, stride: int, dilation: int, circle: bool, tile: int) -> tuple[AxisTiles, ...]:
    """The full tiles of an axis, and the shorter last one where the tile does not divide the axis."""
    distances, tile = axis_distances(length, window, stride, dilation, circle), min(tile, length)
    limit = distance_limit(window, circle)
    full = length // tile
    parts = [(0, tile, full)] + [(full * tile, length % tile, 1)] * (length % tile > 0)
    return tuple(_equal_tiles(distances, limit, *part) for part in parts)


def _equal_tiles(distances: Tensor, limit: int, start: int, size: int, count: int) -> AxisTiles:
    rows = distances[start : start + size * count].unflatten(0, (count, size))
    seen = [(row < limit).any(0).nonzero() for row in rows]
    firsts, ends = [int(s[0]) for s in seen], [int(s[-1]) + 1 for s in seen]
    span = max(end - first for first, end in zip(firsts, ends, strict=True))
    keys = tuple(min(first, distances.shape[1] - span) for first in firsts)  # a shorter span is widened, inwards
    distinct, pattern = torch.stack([row[:, k : k + span] for row, k in zip(rows, keys, strict=True)]).unique(
        dim=0, return_inverse=True
    )
    return AxisTiles(start, size, span, keys, tuple(pattern.tolist()), distinct)


def tiled_work(grid, window, stride, dilation, circle, tile) -> tuple[int, int, int]:
    """Work per head: query-key pairs computed, masked ones included; keys gathered; steps over rows of tiles."""
    pairs = keys = 1
    counts = []
    for length, size, step, spread, cut in zip(grid, window, stride, dilation, tile, strict=True):
        lengths = _residue_lengths(length, spread, cut)
        parts = [part for n, d in lengths for part in tile_axis(n, size, step, d, circle, cut)]
        pairs *= sum(part.size * part.span * len(part.keys) for part in parts)
        keys *= sum(part.span * len(part.keys) for part in parts)
        counts.append((sum(len(part.keys) for part in parts), len(parts)))
    return pairs, keys, counts[0][0] * counts[1][1]


@lru_cache(maxsize=256)
def tiled_cost(shape, window, stride, dilation, circle, tile) -> float:
    """Estimated cost for a query [B, H, W, heads, D] of this shape, in query-key pairs of one head of width 64."""
    batch, height, width, heads, head_dim = shape
    pairs, keys, steps = tiled_work((height, width), window, stride, dilation, circle, tile)
    return batch * (heads * head_dim / 64 * (pairs + GATHER_COST * keys) + STEP_COST * steps)


def best_tile(shape, window, stride, dilation, circle=False) -> tuple[int, int]:
    """The one of TILES, (rows, columns), with the lowest estimated cost."""
    return min(TILES, key=lambda tile: tiled_cost(tuple(shape), window, stride, dilation, circle, tile))


def _residues(length: int, dilation: int, tile: int) -> int:
    """How many axes a dilated axis is split into: its residue classes; 1 where a tile covers it and is masked."""
    return 1 if tile >= length else min(dilation, length)


def _residue_lengths(length: int, dilation: int, tile: int) -> list[tuple[int, int]]:
    """The axes that an axis is split into, each as (length, remaining dilation)."""
    count = _residues(length, dilation, tile)
    return [(size, dilation if count == 1 else 1) for size in class_lengths(length, count)]


class _Item(NamedTuple):
    """One piece of work: a run of tiles in one row of tiles."""

    batch: slice
    rows: slice  # of the queries
    columns: slice
    tiles: int
    key_rows: slice
    key_columns: tuple[slice, ...]
    mask: Tensor | None  # additive, [tiles or 1, 1, queries, keys + text]


def _items(query: Tensor, window, stride, dilation, circle, tile, text_length: int):
    batch, heads, head_dim, dtype = query.shape[0], *query.shape[3:], _tile_dtype(query)
    row_axis, column_axis = zip(query.shape[1:3], window, stride, dilation, (circle, circle), tile, strict=True)
    for r, row_part in enumerate(tile_axis(*row_axis)):
        for c, column_part in enumerate(tile_axis(*column_axis)):
            count, keys = len(column_part.keys), row_part.span * column_part.span
            run = max(1, min(count, GATHER_ELEMENTS // ((keys + text_length) * heads * head_dim)))
            # a single tile needs no gathering, and its mask serves the whole batch
            batches = [slice(None)] if count == 1 else [slice(b, b + 1) for b in range(batch)]
            for row in range(len(row_part.keys)):
                for tiles in (range(first, min(first + run, count)) for first in range(0, count, run)):
                    patterns = row_part.pattern[row], tuple(column_part.pattern[t] for t in tiles)
                    elements = len(tiles) * row_part.size * column_part.size * keys
                    make_mask = _mask if elements <= KEPT_MASK_ELEMENTS else _mask.__wrapped__
                    mask = make_mask(row_axis, r, column_axis, c, *patterns, text_length, dtype, query.device)
                    for b in batches:
                        yield _Item(
                            b,
                            row_part.queries(row),
                            column_part.queries(tiles[0], len(tiles)),
                            len(tiles),
                            row_part.key_slice(row),
                            tuple(column_part.key_slice(t) for t in tiles),
                            mask,
                        )


@lru_cache(maxsize=32)
def _mask(row_axis, row_part, column_axis, column_part, row, columns, text_length, dtype, device) -> Tensor | None:
    """Additive [tiles, 1, queries, keys + text] for patterns of two `tile_axis` parts; None where all is seen."""
    rows = tile_axis(*row_axis)[row_part].distances[row].to(device)
    columns = tile_axis(*column_axis)[column_part].distances[list(columns)].to(device)
    seen = rows[None, :, None, :, None] + columns[:, None, :, None, :] < distance_limit(row_axis[1], row_axis[4])
    seen = seen.flatten(3, 4).flatten(1, 2).unsqueeze(1)
    if seen.all():
        return None
    return additive_mask(seen, text_length, dtype)


def _gather_queries(x: Tensor, item: _Item) -> Tensor:
    """[B, H, W, heads, D] -> [batch * tiles, heads, queries, D]."""
    tiles = x[item.batch, item.rows, item.columns].unflatten(2, (item.tiles, -1)).transpose(1, 2)
    tiles = tiles.to(_tile_dtype(x), memory_format=torch.contiguous_format)
    return tiles.flatten(2, 3).flatten(0, 1).transpose(1, 2)


def _scatter_queries(x: Tensor, item: _Item, tiles: Tensor) -> None:
    """The inverse of `_gather_queries`, into x."""
    target = x[item.batch, item.rows, item.columns].unflatten(2, (item.tiles, -1)).transpose(1, 2)
    target.copy_(tiles.transpose(1, 2).reshape(target.shape))


def _gather_keys(x: Tensor, item: _Item, text: Tensor | None, buffers: dict) -> Tensor:
    """Gather the tiles' keys or values, text included: -> [batch * tiles, heads, keys + S, D], in a reused buffer.

    x: [B, H, W, heads, D]. text: [B, S, heads, D] or None. buffers: kept by the caller for all its items.
    """
    x = x[item.batch, item.key_rows]
    if item.tiles == 1 and text is None:
        return x[:, :, item.key_columns[0]].flatten(1, 2).transpose(1, 2).to(_tile_dtype(x))
    batch, rows, _, heads, head_dim = x.shape
    span = item.key_columns[0].stop - item.key_columns[0].start
    shape = batch, item.tiles, rows * span + (0 if text is None else text.shape[1]), heads, head_dim
    if shape not in buffers:  # fresh memory for every item would cost more in page faults than the copies
        buffers[shape] = x.new_empty(shape, dtype=_tile_dtype(x))
    tiles = buffers[shape]
    image, starts = tiles[:, :, : rows * span].unflatten(2, (rows, span)), [c.start for c in item.key_columns]
    for first, count, step in _even_runs(starts):
        columns = x[:, :, starts[first] : starts[first] + step * (count - 1) + span].unfold(2, span, step)
        image[:, first : first + count].copy_(columns.permute(0, 2, 1, 5, 3, 4))
    if text is not None:
        tiles[:, :, rows * span :].copy_(text[item.batch].unsqueeze(1))
    return tiles.flatten(0, 1).transpose(1, 2)


def _even_runs(starts: list[int]):
    """Cut increasing numbers into runs of equal steps, as (first index, count, step): one copy gathers a run."""
    first = 0
    while first < len(starts):
        step, last = 1, first
        if first + 1 < len(starts):
            step = max(1, starts[first + 1] - starts[first])
            while last + 1 < len(starts) and starts[last + 1] - starts[last] == step:
                last += 1
        yield first, last - first + 1, step
        first = last + 1


def _add_keys(x: Tensor, item: _Item, text: Tensor | None, tiles: Tensor) -> None:
    """The transpose of `_gather_keys`: add every tile's share to x, and to text."""
    x = x[item.batch, item.key_rows]
    tiles = tiles.transpose(1, 2).unflatten(0, (-1, item.tiles))
    rows, span = x.shape[1], item.key_columns[0].stop - item.key_columns[0].start
    image, starts = tiles[:, :, : rows * span].unflatten(2, (rows, span)), [c.start for c in item.key_columns]
    for first, count, step in _even_runs(starts):
        skip = -(-span // step)  # every skip-th tile: those do not overlap, and one addition takes them all
        for tile in range(first, min(first + skip, first + count)):
            last = range(tile, first + count, skip)[-1]
            columns = x[:, :, starts[tile] : starts[last] + span].unfold(2, span, step * skip)
            columns.add_(image[:, tile : last + 1 : skip].permute(0, 2, 1, 4, 5, 3))
    if text is not None:
        text[item.batch].add_(tiles[:, :, rows * span :].sum(1))


def has_fused_kernel(query: Tensor) -> bool:
    return query.device.type == "cpu"  # its kernel returns the log-sum-exp, and takes a mask and every dtype and width


def _tile_dtype(x: Tensor) -> torch.dtype:
    """The dtype that tiles of x are gathered in.

    On small tiles the CPU's kernel is slower in bfloat16 than in float32: 1.1 times forward, 1.4 times backward.
    """
    return sum_dtype(x.dtype) if has_fused_kernel(x) else x.dtype


def _unit_stride(x: Tensor) -> Tensor:
    """x as the CPU's kernel needs it: it reads channels as neighbors in memory, and does not check that they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def attend_keys(query, key, value, mask, scale) -> tuple[Tensor, Tensor]:
    """[.., heads, L, D] each -> the attention output and its log-sum-exp [.., heads, L]."""
    if has_fused_kernel(query):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *map(_unit_stride, (query, key, value)), attn_mask=mask, scale=scale
        )
    scores = _scores(query, key, mask, scale)
    log_sum = scores.logsumexp(-1)
    return scores.sub_(log_sum.unsqueeze(-1)).exp_().to(value.dtype) @ value, log_sum


def attend_keys_backward(grad_out, query, key, value, out, log_sum, mask, scale) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_keys`, for an `out` and `log_sum` that may cover more keys than these (a merged attention)."""
    if has_fused_kernel(query):
        tensors = map(_unit_stride, (grad_out, query, key, value, out))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, log_sum, 0.0, False, attn_mask=mask, scale=scale
        )
    weights = _scores(query, key, mask, scale).sub_(log_sum.unsqueeze(-1)).exp_()
    grad_scores = (grad_out @ value.transpose(-1, -2)).to(weights.dtype)
    grad_scores = grad_scores.sub_((grad_out * out).sum(-1, keepdim=True, dtype=weights.dtype)).mul_(weights)
    grad_scores = grad_scores.mul_(scale).to(query.dtype)
    return (
        grad_scores @ key,
        grad_scores.transpose(-1, -2) @ query,
        weights.to(value.dtype).transpose(-1, -2) @ grad_out,
    )


def _scores(query, key, mask, scale):
    scores = (query @ key.transpose(-1, -2)).to(sum_dtype(query.dtype)).mul_(scale)
    return scores if mask is None else scores.add_(mask)


def _residue_grids(grid, dilation, tile):
    """The row and column slices of the independent sub-grids, and the remaining dilation within them."""
    counts = [_residues(*axis) for axis in zip(grid, dilation, tile, strict=True)]
    left = [d if count == 1 else 1 for d, count in zip(dilation, counts, strict=True)]
    rows, columns = ([slice(r, None, count) for r in range(count)] for count in counts)
    return [(r, c) for r in rows for c in columns], left


def _all_tokens(x: Tensor) -> Tensor:
    """[B, ..., heads, D] -> [B, heads, tokens, D]."""
    return x.flatten(1, -3).transpose(1, 2)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor | None,
    text_value: Tensor | None,
    window: list[int],
    stride: list[int],
    dilation: list[int],
    scale: float,
    circle: bool = False,
) -> tuple[Tensor, Tensor]:
    """The output [B, H, W, heads, D], and its log-sum-exp [B, H, W, heads, 1] for the backward."""
    out = query.new_empty(query.shape)
    log_sum = query.new_empty(*query.shape[:4], 1, dtype=sum_dtype(query.dtype))
    tile = best_tile(query.shape, tuple(window), tuple(stride), tuple(dilation), circle)
    with_tiles = text_key is not None and _text_joins_tiles(text_key.shape[1], query.shape[1:3], tile)
    tile_text = (text_key, text_value) if with_tiles else (None, None)
    text_length = text_key.shape[1] if with_tiles else 0
    with torch.autocast(query.device.type, enabled=False):
        key_buffers, value_buffers = {}, {}
        grids, dilation = _residue_grids(query.shape[1:3], dilation, tile)
        for rows, columns in grids:
            q, k, v, o, s = (x[:, rows, columns] for x in (query, key, value, out, log_sum))
            for item in _items(q, window, stride, dilation, circle, tile, text_length):
                tile_out, tile_log_sum = attend_keys(
                    _gather_queries(q, item),
                    _gather_keys(k, item, tile_text[0], key_buffers),
                    _gather_keys(v, item, tile_text[1], value_buffers),
                    item.mask,
                    scale,
                )
                _scatter_queries(o, item, tile_out)
                _scatter_queries(s, item, tile_log_sum.unsqueeze(-1))
        if text_key is not None and not with_tiles:
            text_out, text_log_sum = attend_keys(*map(_all_tokens, (query, text_key, text_value)), None, scale)
            text_out, text_log_sum = (
                x.transpose(1, 2).unflatten(1, query.shape[1:3]) for x in (text_out, text_log_sum.unsqueeze(-1))
            )
            total = torch.logaddexp(log_sum, text_log_sum)
            out = torch.lerp(out.to(total.dtype), text_out.to(total.dtype), (text_log_sum - total).exp_()).to(out.dtype)
            log_sum = total
    return out, log_sum


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor | None,
    text_value: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    window: list[int],
    stride: list[int],
    dilation: list[int],
    scale: float,
    circle: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, text_key, text_value; the last two are empty where there is no text."""
    grad_query = query.new_empty(query.shape)
    # tiles overlap in their keys: their shares are summed in at least float32
    grad_key, grad_value = (x.new_zeros(x.shape, dtype=log_sum.dtype) for x in (key, value))
    grad_text = [query.new_zeros(0 if x is None else x.shape, dtype=log_sum.dtype) for x in (text_key, text_value)]
    tile = best_tile(query.shape, tuple(window), tuple(stride), tuple(dilation), circle)
    with_tiles = text_key is not None and _text_joins_tiles(text_key.shape[1], query.shape[1:3], tile)
    tile_text = (text_key, text_value, *grad_text) if with_tiles else (None,) * 4
    text_length = text_key.shape[1] if with_tiles else 0
    with torch.autocast(query.device.type, enabled=False):
        key_buffers, value_buffers = {}, {}
        grids, dilation = _residue_grids(query.shape[1:3], dilation, tile)
        for rows, columns in grids:
            q, k, v, o, s, g = (x[:, rows, columns] for x in (query, key, value, out, log_sum, grad_out))
            grad_q, grad_k, grad_v = (x[:, rows, columns] for x in (grad_query, grad_key, grad_value))
            for item in _items(q, window, stride, dilation, circle, tile, text_length):
                tile_grads = attend_keys_backward(
                    _gather_queries(g, item),
                    _gather_queries(q, item),
                    _gather_keys(k, item, tile_text[0], key_buffers),
                    _gather_keys(v, item, tile_text[1], value_buffers),
                    _gather_queries(o, item),
                    _gather_queries(s, item).squeeze(-1),
                    item.mask,
                    scale,
                )
                _scatter_queries(grad_q, item, tile_grads[0])
                _add_keys(grad_k, item, tile_text[2], tile_grads[1])
                _add_keys(grad_v, item, tile_text[3], tile_grads[2])
        if text_key is not None and not with_tiles:
            text_grads = attend_keys_backward(
                *map(_all_tokens, (grad_out, query, text_key, text_value, out)),
                _all_tokens(log_sum).squeeze(-1),
                None,
                scale,
            )
            grad_query += text_grads[0].transpose(1, 2).unflatten(1, query.shape[1:3])
            grad_text = [grad.transpose(1, 2) for grad in text_grads[1:]]
    grads = (grad_key, grad_value, *grad_text)
    return grad_query, *(grad.to(query.dtype).contiguous() for grad in grads)


def _text_joins_tiles(text_length: int, grid, tile) -> bool:
    """Whether text is copied behind every tile's keys, instead of being attended to once and merged."""
    return text_length <= SHORT_TEXT or all(size >= length for size, length in zip(tile, grid, strict=True))


# Opaque operators: torch.compile sees one node each, and no shape or cached mask of ours leaks into its graphs.
tiled_attention = torch.library.custom_op("hybriddit::tiled_attention", _forward, mutates_args=())
tiled_attention_backward = torch.library.custom_op("hybriddit::tiled_attention_backward", _backward, mutates_args=())


@tiled_attention.register_fake
def _(query, *args):
    log_sum = query.new_empty(*query.shape[:4], 1, dtype=sum_dtype(query.dtype))
    return query.new_empty(query.shape), log_sum


@tiled_attention_backward.register_fake
def _(grad_out, query, key, value, text_key, text_value, *args):
    texts = (query.new_empty(0) if x is None else x.new_empty(x.shape) for x in (text_key, text_value))
    return *(x.new_empty(x.shape) for x in (query, key, value)), *texts


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.settings = inputs[5:]


def _autograd(ctx, grad_out, grad_log_sum):
    # grad_log_sum is zero: the log-sum-exp is only used without gradients
    saved = ctx.saved_tensors  # read once: under checkpointing a second read is an error
    grads = tiled_attention_backward(grad_out, *saved, *ctx.settings)
    texts = (None, None) if saved[3] is None else grads[3:]
    return *grads[:3], *texts, *(None for _ in ctx.settings)


tiled_attention.register_autograd(_autograd, setup_context=_setup_context)


# torch's FLOP counter cannot look into custom operators.
@register_flop_formula(torch.ops.hybriddit.tiled_attention)
def _forward_flops(
    query, key, value, text_key, text_value, window, stride, dilation, scale, circle=False, *, out_shape=None, **kwargs
):
    batch, height, width, heads, head_dim = query
    settings = tuple(window), tuple(stride), tuple(dilation), circle
    pairs, _, _ = tiled_work((height, width), *settings, best_tile(query, *settings))
    pairs += height * width * (text_key[1] if text_key else 0)
    return 4 * batch * heads * head_dim * pairs  # scores, and their product with the values


@register_flop_formula(torch.ops.hybriddit.tiled_attention_backward)
def _backward_flops(grad_out, query, key, value, text_key, text_value, out, log_sum, *settings, **kwargs):
    return _forward_flops(query, key, value, text_key, text_value, *settings) * 5 // 2  # five products instead of two
