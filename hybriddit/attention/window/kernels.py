"""Triton kernels of window attention, forward and backward; they read queries, keys and values where they lie.

One more does the forward pass joined with linear attention over the whole image, given that one's sums over the keys.

A program takes a tile of queries, some rows by some columns of the grid, and walks the keys that any of their windows
holds, row by row, then the text. Keys that all of the tile see are walked without a mask. With dilation, each residue
class of rows and columns is a grid of its own, whose rows and columns are further apart in memory.

The gradient of queries walks the same way. That of keys and values takes a tile of keys and walks the queries that see
any of it: an interval of rows by one of columns, because windows do not move back as positions move on. Text keys are
seen by all queries: each program sums a share of them, and the shares are added in a fixed order. So all results are
reproducible bit for bit. Offsets are 64-bit.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ..launch import in_force, laid_out, multiprocessors, on_device, over, power_of_2, target_of
from ..layout import room_for
from ..linear import phi
from ..linear import triton as linear
from ..tuned import tuned_options

LOG2_E = tl.constexpr(math.log2(math.e))
# The running maximum before the first key: finite, so that no difference of two infinities is taken.
LOWEST = tl.constexpr(-3.0e38)
# Programs per multiprocessor among which the queries that see a block of text are shared out.
PROGRAMS_PER_SM = 2
# Kernel -> options that replace those of `launch_options`, for sweeps on a GPU.
OVERRIDES: dict[str, dict] = {}


@triton.jit
def _first(index, size, window, stride):
    """Where the window of a position begins, in a residue class of this size: as `rule.class_windows`."""
    leader = tl.minimum(index // stride * stride + stride // 2, size - 1)
    return tl.minimum(tl.maximum(leader - window // 2, 0), size - window)


@triton.jit
def _seeing(key, size, window, stride):
    """How many positions have a window that begins at `key` or before it; they are the first ones."""
    group = (key + window // 2 - stride // 2) // stride
    count = tl.where(key >= size - window, size, tl.minimum((group + 1) * stride, size))
    return tl.where(key < 0, 0, count)


@triton.jit
def _axis(length, residue, dilation, window, stride):
    """A residue class of an axis: its size, and the window and stride clamped to it."""
    size = (length - residue + dilation - 1) // dilation
    window = tl.minimum(window, size)
    return size, window, tl.minimum(stride, window)


@triton.jit
def _tile_of_program(heads, lengths, window, stride, dilation, residues, tiles, tile):
    """What a program has: its place (batch and head, both 64-bit, and residue classes), axes, first row and column.

    All arguments but the first are pairs: of the grid, its windows, the number of residue classes and of tiles in each,
    and a tile's sides.
    """
    program = tl.program_id(0)
    tile_x = program % tiles[1]
    program = program // tiles[1]
    tile_y = program % tiles[0]
    program = program // tiles[0]
    residue_x = program % residues[1]
    program = program // residues[1]
    residue_y = program % residues[0]
    pair = (program // residues[0]).to(tl.int64)
    axis_y = _axis(lengths[0], residue_y, dilation[0], window[0], stride[0])
    axis_x = _axis(lengths[1], residue_x, dilation[1], window[1], stride[1])
    place = pair // heads, pair % heads, residue_y, residue_x
    return place, axis_y, axis_x, tile_y * tile[0], tile_x * tile[1]


@triton.jit
def _base(pointer, place, strides, dilation, UNIT: tl.constexpr):
    """(pointer, row stride, column stride) of a residue class; strides: of batch, row, column and head in UNIT."""
    batch, head, residue_y, residue_x = place
    row, column = strides[1].to(tl.int64), strides[2].to(tl.int64)
    pointer += (batch * strides[0] + residue_y * row + residue_x * column + head * strides[3]) * UNIT
    return pointer, row * dilation[0] * UNIT, column * dilation[1] * UNIT


@triton.jit
def _text_base(pointer, place, strides, UNIT: tl.constexpr):
    """The same of text, a single row; strides: of batch, token and head."""
    return pointer + (place[0] * strides[0] + place[1] * strides[2]) * UNIT, 0, strides[1].to(tl.int64) * UNIT


@triton.jit
def _text_walk(length, BLOCK: tl.constexpr):
    """The walk over text, as `_walk` takes it, by blocks that are a single row."""
    blocks = tl.cdiv(length, BLOCK)
    return blocks, 0, 0, blocks, 0, 0, 1, length


@triton.jit
def _interval(axis, position, TRANSPOSED: tl.constexpr):
    """The first one and the number of the keys that a query of an axis sees; TRANSPOSED: of the queries that see a key."""
    size, window, stride = axis
    if TRANSPOSED:
        first = _seeing(position - window, size, window, stride)
        count = _seeing(position, size, window, stride) - first
    else:
        first = _first(position, size, window, stride)
        count = position * 0 + window
    return first, count


@triton.jit
def _windows(axis_y, axis_x, y, x, TRANSPOSED: tl.constexpr):
    """`_interval` of each row y, and then of each column x."""
    first_y, count_y = _interval(axis_y, y, TRANSPOSED)
    first_x, count_x = _interval(axis_x, x, TRANSPOSED)
    return first_y, count_y, first_x, count_x


@triton.jit
def _positions(axis_y, axis_x, start_y, start_x, tile_width, BLOCK: tl.constexpr):
    """Rows and columns of a tile, and whether they are of the grid: [BLOCK] each. Those that are not are the last ones."""
    n = tl.arange(0, BLOCK)
    y, x = start_y + n // tile_width, start_x + n % tile_width
    inside = (y < axis_y[0]) & (x < axis_x[0])
    return tl.minimum(y, axis_y[0] - 1), tl.minimum(x, axis_x[0] - 1), inside


@triton.jit
def _walks_of_tile(
    axis_y,
    axis_x,
    start_y,
    start_x,
    tile_height,
    tile_width,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`_two_walks` over what a tile of queries sees; TRANSPOSED: over what sees a tile of keys."""
    top, rows = _interval(axis_y, start_y, TRANSPOSED)
    left, columns = _interval(axis_x, start_x, TRANSPOSED)
    last_top, last_rows = _interval(axis_y, tl.minimum(start_y + tile_height, axis_y[0]) - 1, TRANSPOSED)
    last_left, last_columns = _interval(axis_x, tl.minimum(start_x + tile_width, axis_x[0]) - 1, TRANSPOSED)
    return _two_walks(
        top,
        last_top + last_rows,
        last_top,
        top + rows,
        left,
        last_left + last_columns,
        last_left,
        left + columns,
        BLOCK,
        COLUMNS,
    )


@triton.jit
def _load(base, offset, valid, WIDTH: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr):
    """Channels START and on, BLOCK of them, of the rows at these offsets: 0 where not valid, and beyond WIDTH.

    valid: None where all are.
    """
    d = START + tl.arange(0, BLOCK)
    pointers = base + offset[:, None] + d[None, :]
    if START + BLOCK > WIDTH:
        inside = d[None, :] < WIDTH
        x = tl.load(pointers, mask=inside if valid is None else valid[:, None] & inside, other=0.0)
    elif valid is None:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=valid[:, None], other=0.0)
    return x


@triton.jit
def _store(base, offset, valid, x, WIDTH: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr):
    d = START + tl.arange(0, BLOCK)
    tl.store(
        base + offset[:, None] + d[None, :],
        x.to(base.dtype.element_ty),
        mask=valid[:, None] & (d[None, :] < WIDTH),
    )


@triton.jit
def _load_both(
    base, offset, valid, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_2: tl.constexpr, DOT: tl.constexpr
):
    """All channels, in blocks of BLOCK_D and BLOCK_2; the second is the first once more where BLOCK_2 is 0."""
    x = _load(base, offset, valid, WIDTH, 0, BLOCK_D).to(DOT)
    x_2 = x
    if BLOCK_2:
        x_2 = _load(base, offset, valid, WIDTH, BLOCK_D, BLOCK_2).to(DOT)
    return x, x_2


@triton.jit
def _products(a, b, BLOCK_2: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T in float32; a and b as `_load_both` gives them."""
    total = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if BLOCK_2:
        total = tl.dot(a[1], tl.trans(b[1]), total, input_precision=PRECISION)
    return total


@triton.jit
def _walk(step, walk, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """The positions of a block of a walk: whether they are within it, and their row and column, [BLOCK] each.

    walk: (number of blocks, from which one on some are left out, and how many; blocks side by side; the first row and
    column, and the last ones + 1). A block is COLUMNS wide.
    """
    _, skip_at, skipped, across, top, left, bottom, right = walk
    step = tl.where(step >= skip_at, step + skipped, step)
    n = tl.arange(0, BLOCK)
    row = top + step // across * (BLOCK // COLUMNS) + n // COLUMNS
    column = left + step % across * COLUMNS + n % COLUMNS
    return (row < bottom) & (column < right), row, column


@triton.jit
def _two_walks(
    top, bottom, free_top, free_bottom, left, right, free_left, free_right, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    """The walks over rows [top, bottom) and columns [left, right): over the blocks that need a mask, and the free ones.

    What lies between the free rows and columns needs no mask; blocks are free if their rows are, and all columns.
    """
    rows: tl.constexpr = BLOCK // COLUMNS
    across = tl.cdiv(right - left, COLUMNS)
    blocks = tl.cdiv(bottom - top, rows)
    skip_at = tl.cdiv(tl.maximum(free_top - top, 0), rows)
    free = tl.maximum(tl.maximum(free_bottom - top, 0) // rows - skip_at, 0)
    whole = (free_left <= left) & (free_right >= right) & ((right - left) % COLUMNS == 0)
    free, skip_at = tl.where(whole, free, 0) * across, skip_at * across
    masked = blocks * across - free, skip_at, free, across, top, left, bottom, right
    return masked, (free, 0, skip_at, across, top, left, bottom, right)


@triton.jit
def _between(index, first, count):
    """Whether index is one of `count` from `first` on: one comparison, as a negative difference is huge unsigned."""
    return (index - first).to(tl.uint32) < count.to(tl.uint32)


@triton.jit
def _seen(valid, row, column, windows, text_mask, KIND: tl.constexpr, HAS_TEXT_MASK: tl.constexpr):
    """Which of a walk's positions are seen, [tile, positions], or [1, positions] of text. "free" ones all are."""
    if KIND == "text":
        if HAS_TEXT_MASK:
            valid = valid & (tl.load(text_mask + column, mask=valid, other=0) != 0)
        seen = valid[None, :]
    else:
        first_y, count_y, first_x, count_x = windows
        in_rows = _between(row[None, :], first_y[:, None], count_y[:, None])
        seen = in_rows & _between(column[None, :], first_x[:, None], count_x[:, None])
    return seen


@triton.jit
def _attend(
    q,
    windows,
    walk,
    keys,
    values,
    text_mask,
    scale,
    sums,
    KIND: tl.constexpr,
    HAS_TEXT_MASK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Go on with a softmax over the keys of a walk; scale: in units of log 2.

    keys, values: (pointer, row stride, column stride). windows: (first row and column of each query's, rows, columns).
    sums: weighted values in two blocks of channels, highest score, and sum of weights, both [queries].
    KIND: "free", all is seen; "window"; or "text", whose columns are its tokens.
    """
    total, total_2, highest, weight = sums
    key, k_row, k_column = keys
    value, v_row, v_column = values
    for step in range(walk[0]):
        valid, row, column = _walk(step, walk, BLOCK_N, COLUMNS)
        if KIND == "free":
            valid = None
        k = _load_both(key, row * k_row + column * k_column, valid, WIDTH, BLOCK_D, BLOCK_2, DOT)
        scores = _products(q, k, BLOCK_2, PRECISION) * scale
        if KIND != "free":
            seen = _seen(valid, row, column, windows, text_mask, KIND, HAS_TEXT_MASK)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        factor = tl.exp2(highest - higher)
        highest = higher
        weight = weight * factor + tl.sum(weights, axis=1)
        v = _load_both(value, row * v_row + column * v_column, valid, WIDTH, BLOCK_D, BLOCK_2, DOT)
        total = tl.dot(weights.to(DOT), v[0], total * factor[:, None], input_precision=PRECISION)
        if BLOCK_2:
            total_2 = tl.dot(weights.to(DOT), v[1], total_2 * factor[:, None], input_precision=PRECISION)
    return total, total_2, highest, weight


@triton.jit
def _attend_to_all(
    q,
    windows,
    walks,
    keys,
    values,
    text,
    scale,
    place,
    UNIT: tl.constexpr,
    TEXT: tl.constexpr,
    HAS_TEXT_MASK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The softmax of a tile of queries over all that they see, in `_attend`'s sums.

    text: (pointer to keys and their strides, the same of values, mask, number of tokens).
    """
    masked, free = walks
    text_key, key_strides, text_value, value_strides, text_mask, text_length = text
    total_2 = 0.0
    if BLOCK_2:
        total_2 = tl.zeros((BLOCK_M, BLOCK_2), dtype=tl.float32)
    sums = (
        tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32),
        total_2,
        tl.full((BLOCK_M,), LOWEST, dtype=tl.float32),
        tl.zeros((BLOCK_M,), dtype=tl.float32),
    )
    scale = scale * LOG2_E
    sums = _attend(
        q, windows, free, keys, values, text_mask, scale, sums,
        "free", HAS_TEXT_MASK, WIDTH, BLOCK_D, BLOCK_2, BLOCK_N, COLUMNS, DOT, PRECISION,
    )  # fmt: skip
    sums = _attend(
        q, windows, masked, keys, values, text_mask, scale, sums,
        "window", HAS_TEXT_MASK, WIDTH, BLOCK_D, BLOCK_2, BLOCK_N, COLUMNS, DOT, PRECISION,
    )  # fmt: skip
    if TEXT is not None:
        keys = _text_base(text_key, place, key_strides, UNIT)
        values = _text_base(text_value, place, value_strides, UNIT)
        if HAS_TEXT_MASK:
            text_mask += place[0] * text_length
        sums = _attend(
            q, windows, _text_walk(text_length, BLOCK_N), keys, values, text_mask, scale, sums,
            TEXT, HAS_TEXT_MASK, WIDTH, BLOCK_D, BLOCK_2, BLOCK_N, BLOCK_N, DOT, PRECISION,
        )  # fmt: skip
    return sums


@triton.jit
def _far_channels(
    rows,
    offset,
    inside,
    projection,
    MAP: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The rows at these offsets times the projection [WIDTH, CHANNELS], as `phi.channels`: [tile, BLOCK_C] in float32."""
    c = tl.arange(0, BLOCK_C)[None, :]
    matrix = phi.load_matrix(projection, tl.arange(0, BLOCK_D)[:, None], c, WIDTH, CHANNELS).to(DOT)
    x = phi.channels(_load(rows, offset, inside, WIDTH, 0, BLOCK_D), matrix, MAP, True, DOT, PRECISION)
    if BLOCK_2:
        d = BLOCK_D + tl.arange(0, BLOCK_2)[:, None]
        matrix = phi.load_matrix(projection, d, c, WIDTH, CHANNELS).to(DOT)
        x += phi.channels(_load(rows, offset, inside, WIDTH, BLOCK_D, BLOCK_2), matrix, MAP, True, DOT, PRECISION)
    return x


@triton.jit
def _far_features(
    channels,
    rows,
    offset,
    inside,
    f,
    HALF: tl.constexpr,
    MAP: tl.constexpr,
    PROJECTED: tl.constexpr,
    CHANNELS: tl.constexpr,
    SELECT: tl.constexpr,
):
    """phi's features f, of the channels, or where there is no projection of the rows at these offsets."""
    if not PROJECTED:  # elu's: each is of one channel
        pointers = rows + offset[:, None] + f[None, :]
        channels = tl.load(pointers, mask=inside[:, None] & (f < CHANNELS)[None, :], other=0.0).to(tl.float32)
    return phi.features(channels, f, HALF, MAP, CHANNELS, SELECT)


@triton.jit
def _join(
    sums,
    rows,
    offset,
    inside,
    projection,
    state,
    mean,
    gate,
    count,
    eps,
    MAP: tl.constexpr,
    PROJECTED: tl.constexpr,
    JOINT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SELECT: tl.constexpr,
):
    """near + share (far - near), in two blocks of channels; near is what `_attend`'s sums come to.

    far = phi(q') state / (phi(q') . mean + eps), with q' the rows at these offsets. The share is the gate, [tile], or
    where JOINT that of the gate beside near. Features are formed twice: once for their sum of weights, which says by how
    much they are multiplied as they are added to near's sums, so that one accumulator is enough.
    """
    total, total_2, highest, weight = sums
    halves: tl.constexpr = 2 if MAP == "hedgehog" else 1
    half: tl.constexpr = FEATURES // halves
    f_blocks: tl.constexpr = (half + BLOCK_F - 1) // BLOCK_F
    channels = None
    if PROJECTED:
        channels = _far_channels(
            rows, offset, inside, projection, MAP, WIDTH, CHANNELS, BLOCK_D, BLOCK_2, BLOCK_C, DOT, PRECISION
        )
    denominator = tl.zeros((BLOCK_M, 16), dtype=tl.float32)
    for i in tl.static_range(halves):
        for block in tl.range(f_blocks, num_stages=STAGES):
            f = block * BLOCK_F + tl.arange(0, BLOCK_F)
            features = _far_features(channels, rows, offset, inside, f, i, MAP, PROJECTED, CHANNELS, SELECT)
            # beyond the last feature means and states are zero, so phi's values there do not count
            means = phi.columns(tl.load(mean + i * half + f, mask=f < half, other=0.0), DOT)
            denominator = tl.dot(features.to(DOT), means, denominator, input_precision=PRECISION)
    denominator = tl.sum(denominator, axis=1) + eps
    share = gate
    if JOINT:
        share = phi.joint_share(phi.beside_softmax(gate, (highest + tl.log2(weight)) / LOG2_E), denominator, count)
    near_factor, far_factor = ((1 - share) / weight)[:, None], (share / denominator)[:, None]
    total *= near_factor
    if BLOCK_2:
        total_2 *= near_factor
    for i in tl.static_range(halves):
        for block in tl.range(f_blocks, num_stages=STAGES):
            f = block * BLOCK_F + tl.arange(0, BLOCK_F)
            features = _far_features(channels, rows, offset, inside, f, i, MAP, PROJECTED, CHANNELS, SELECT)
            features = (features * far_factor).to(DOT)
            part = state + i * half * WIDTH
            values = phi.load_matrix(part, f[:, None], tl.arange(0, BLOCK_D)[None, :], half, WIDTH).to(DOT)
            total = tl.dot(features, values, total, input_precision=PRECISION)
            if BLOCK_2:
                d = BLOCK_D + tl.arange(0, BLOCK_2)
                values = phi.load_matrix(part, f[:, None], d[None, :], half, WIDTH).to(DOT)
                total_2 = tl.dot(features, values, total_2, input_precision=PRECISION)
    return total, total_2


@triton.jit
def _query_gradient(
    q,
    grad,
    lse,
    delta,
    windows,
    walk,
    keys,
    values,
    text_mask,
    scale,
    sums,
    KIND: tl.constexpr,
    HAS_TEXT_MASK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the scores' gradients times the keys of a walk to sums, in two blocks of channels; else as `_attend`.

    grad: the output's. lse: in units of log 2. delta: what is taken from the weights' gradients.
    """
    total, total_2 = sums
    key, k_row, k_column = keys
    value, v_row, v_column = values
    for step in range(walk[0]):
        valid, row, column = _walk(step, walk, BLOCK_N, COLUMNS)
        if KIND == "free":
            valid = None
        k = _load_both(key, row * k_row + column * k_column, valid, WIDTH, BLOCK_D, BLOCK_2, DOT)
        v = _load_both(value, row * v_row + column * v_column, valid, WIDTH, BLOCK_D, BLOCK_2, DOT)
        weights = tl.exp2(_products(q, k, BLOCK_2, PRECISION) * scale - lse[:, None])
        if KIND != "free":
            seen = _seen(valid, row, column, windows, text_mask, KIND, HAS_TEXT_MASK)
            weights = tl.where(seen, weights, 0.0)
        slope = (weights * (_products(grad, v, BLOCK_2, PRECISION) - delta[:, None])).to(DOT)
        total = tl.dot(slope, k[0], total, input_precision=PRECISION)
        if BLOCK_2:
            total_2 = tl.dot(slope, k[1], total_2, input_precision=PRECISION)
    return total, total_2


@triton.jit
def _key_gradient(
    k,
    v,
    windows,
    places,
    walk,
    queries,
    grads,
    rows,
    scale,
    sums,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the gradients of keys and values by the queries of a walk to sums, each in two blocks of channels.

    windows: which queries see each key. places: (first token, tokens from a row and from a column to the next).
    queries, grads: (pointer, row stride, column stride) of the queries and the output's gradients. rows: pointers to
    the log-sum-exp and delta of each token. KIND: "free", "window", or "text": all keys are seen.
    """
    k_total, k_total_2, v_total, v_total_2 = sums
    query, q_row, q_column = queries
    grad, g_row, g_column = grads
    lse, delta = rows
    origin, token_row, token_column = places
    for step in range(walk[0]):
        valid, row, column = _walk(step, walk, BLOCK_M, COLUMNS)
        token = origin + row * token_row + column * token_column
        # beyond the walk queries and gradients are 0, and so is what they add
        if KIND == "free":
            valid = None
            highest, taken = tl.load(lse + token), tl.load(delta + token)
        else:
            highest, taken = tl.load(lse + token, mask=valid, other=0.0), tl.load(delta + token, mask=valid, other=0.0)
        q = _load_both(query, row * q_row + column * q_column, valid, WIDTH, BLOCK_D, BLOCK_2, DOT)
        g = _load_both(grad, row * g_row + column * g_column, valid, WIDTH, BLOCK_D, BLOCK_2, DOT)
        weights = tl.exp2(_products(k, q, BLOCK_2, PRECISION) * scale - (highest * LOG2_E)[None, :])
        if KIND == "window":
            weights = tl.where(_seen(valid, row, column, windows, None, KIND, False), weights, 0.0)
        v_total = tl.dot(weights.to(DOT), g[0], v_total, input_precision=PRECISION)
        if BLOCK_2:
            v_total_2 = tl.dot(weights.to(DOT), g[1], v_total_2, input_precision=PRECISION)
        slope = (weights * (_products(v, g, BLOCK_2, PRECISION) - taken[None, :])).to(DOT)
        k_total = tl.dot(slope, q[0], k_total, input_precision=PRECISION)
        if BLOCK_2:
            k_total_2 = tl.dot(slope, q[1], k_total_2, input_precision=PRECISION)
    return k_total, k_total_2, v_total, v_total_2


def _kernel(function):
    """A kernel that is not compiled anew for some values of its numbers: neither for sizes, nor for strides in memory."""
    names = function.__code__.co_varnames
    return triton.jit(function, do_not_specialize=names[names.index("heads") : names.index("UNIT")])


@_kernel
def _forward_kernel(
    query,
    key,
    value,
    text_key,
    text_value,
    text_mask,
    out,
    lse,
    heads,
    height,
    width,
    window_y,
    window_x,
    stride_y,
    stride_x,
    dilation_y,
    dilation_x,
    text_length,
    residues_y,
    residues_x,
    tiles_y,
    tiles_x,
    tile_height,
    tile_width,
    scale,
    q_batch,
    q_row,
    q_column,
    q_head,
    k_batch,
    k_row,
    k_column,
    k_head,
    v_batch,
    v_row,
    v_column,
    v_head,
    tk_batch,
    tk_row,
    tk_head,
    tv_batch,
    tv_row,
    tv_head,
    UNIT: tl.constexpr,
    TEXT: tl.constexpr,
    HAS_TEXT_MASK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [B, H, W, heads, D] and lse [B, heads, H, W], contiguous."""
    dilation = dilation_y, dilation_x
    place, axis_y, axis_x, start_y, start_x = _tile_of_program(
        heads, (height, width), (window_y, window_x), (stride_y, stride_x), dilation,
        (residues_y, residues_x), (tiles_y, tiles_x), (tile_height, tile_width),
    )  # fmt: skip
    batch, head, residue_y, residue_x = place
    if start_y >= axis_y[0] or start_x >= axis_x[0]:
        return
    y, x, inside = _positions(axis_y, axis_x, start_y, start_x, tile_width, BLOCK_M)
    windows = _windows(axis_y, axis_x, y, x, False)
    queries = _base(query, place, (q_batch, q_row, q_column, q_head), dilation, UNIT)
    q = _load_both(queries[0], y * queries[1] + x * queries[2], inside, WIDTH, BLOCK_D, BLOCK_2, DOT)
    keys = _base(key, place, (k_batch, k_row, k_column, k_head), dilation, UNIT)
    values = _base(value, place, (v_batch, v_row, v_column, v_head), dilation, UNIT)
    text = text_key, (tk_batch, tk_row, tk_head), text_value, (tv_batch, tv_row, tv_head), text_mask, text_length
    walks = _walks_of_tile(axis_y, axis_x, start_y, start_x, tile_height, tile_width, False, BLOCK_N, COLUMNS)
    sums = _attend_to_all(
        q, windows, walks, keys, values, text, scale, place,
        UNIT, TEXT, HAS_TEXT_MASK, WIDTH, BLOCK_D, BLOCK_2, BLOCK_M, BLOCK_N, COLUMNS, DOT, PRECISION,
    )  # fmt: skip
    total, total_2, highest, weight = sums
    token = (residue_y + y * dilation_y) * width + residue_x + x * dilation_x
    inverse = (1 / weight)[:, None]
    offset = token.to(tl.int64) * heads * WIDTH
    out += batch * height * width * heads * WIDTH + head * WIDTH
    _store(out, offset, inside, total * inverse, WIDTH, 0, BLOCK_D)
    if BLOCK_2:
        _store(out, offset, inside, total_2 * inverse, WIDTH, BLOCK_D, BLOCK_2)
    tl.store(lse + (batch * heads + head) * height * width + token, (highest + tl.log2(weight)) / LOG2_E, mask=inside)


@_kernel
def _joined_kernel(
    query,
    key,
    value,
    text_key,
    text_value,
    text_mask,
    far_query,
    projection,
    state,
    mean,
    gate,
    out,
    heads,
    height,
    width,
    window_y,
    window_x,
    stride_y,
    stride_x,
    dilation_y,
    dilation_x,
    text_length,
    residues_y,
    residues_x,
    tiles_y,
    tiles_x,
    tile_height,
    tile_width,
    scale,
    count,
    eps,
    q_batch,
    q_row,
    q_column,
    q_head,
    k_batch,
    k_row,
    k_column,
    k_head,
    v_batch,
    v_row,
    v_column,
    v_head,
    tk_batch,
    tk_row,
    tk_head,
    tv_batch,
    tv_row,
    tv_head,
    far_batch,
    far_row,
    far_column,
    far_head,
    gate_batch,
    gate_row,
    gate_column,
    gate_head,
    out_batch,
    out_first,
    UNIT: tl.constexpr,
    TEXT: tl.constexpr,
    HAS_TEXT_MASK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    MAP: tl.constexpr,
    PROJECTED: tl.constexpr,
    JOINT: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    FAR_STAGES: tl.constexpr,
    FAR_DOT: tl.constexpr,
    FAR_PRECISION: tl.constexpr,
    SELECT: tl.constexpr,
):
    """Window attention joined with linear attention over the whole image, see `_join`; out [B, H, W, heads, D].

    state, mean [B, heads, F, D or 1] and projection [heads, D, m]: contiguous. gate [B, H, W, heads]: its strides are in
    elements. The first image of out begins after out_first heads, each other one out_batch heads after the one before; all
    are contiguous.
    """
    dilation = dilation_y, dilation_x
    place, axis_y, axis_x, start_y, start_x = _tile_of_program(
        heads, (height, width), (window_y, window_x), (stride_y, stride_x), dilation,
        (residues_y, residues_x), (tiles_y, tiles_x), (tile_height, tile_width),
    )  # fmt: skip
    batch, head, residue_y, residue_x = place
    if start_y >= axis_y[0] or start_x >= axis_x[0]:
        return
    y, x, inside = _positions(axis_y, axis_x, start_y, start_x, tile_width, BLOCK_M)
    windows = _windows(axis_y, axis_x, y, x, False)
    queries = _base(query, place, (q_batch, q_row, q_column, q_head), dilation, UNIT)
    q = _load_both(queries[0], y * queries[1] + x * queries[2], inside, WIDTH, BLOCK_D, BLOCK_2, DOT)
    keys = _base(key, place, (k_batch, k_row, k_column, k_head), dilation, UNIT)
    values = _base(value, place, (v_batch, v_row, v_column, v_head), dilation, UNIT)
    text = text_key, (tk_batch, tk_row, tk_head), text_value, (tv_batch, tv_row, tv_head), text_mask, text_length
    walks = _walks_of_tile(axis_y, axis_x, start_y, start_x, tile_height, tile_width, False, BLOCK_N, COLUMNS)
    sums = _attend_to_all(
        q, windows, walks, keys, values, text, scale, place,
        UNIT, TEXT, HAS_TEXT_MASK, WIDTH, BLOCK_D, BLOCK_2, BLOCK_M, BLOCK_N, COLUMNS, DOT, PRECISION,
    )  # fmt: skip
    rows, far_row, far_column = _base(far_query, place, (far_batch, far_row, far_column, far_head), dilation, UNIT)
    gates, gate_row, gate_column = _base(gate, place, (gate_batch, gate_row, gate_column, gate_head), dilation, 1)
    pair = batch * heads + head
    total, total_2 = _join(
        sums, rows, y * far_row + x * far_column, inside,
        projection + head * WIDTH * CHANNELS, state + pair * FEATURES * WIDTH, mean + pair * FEATURES,
        tl.load(gates + y * gate_row + x * gate_column, mask=inside, other=0.0).to(tl.float32), count, eps,
        MAP, PROJECTED, JOINT, WIDTH, CHANNELS, FEATURES, BLOCK_D, BLOCK_2, BLOCK_M, BLOCK_C, BLOCK_F, FAR_STAGES,
        FAR_DOT, FAR_PRECISION, SELECT,
    )  # fmt: skip
    token = (residue_y + y * dilation_y) * width + residue_x + x * dilation_x
    offset = token.to(tl.int64) * heads * WIDTH
    out += (batch * out_batch + out_first + head) * WIDTH
    _store(out, offset, inside, total, WIDTH, 0, BLOCK_D)
    if BLOCK_2:
        _store(out, offset, inside, total_2, WIDTH, BLOCK_D, BLOCK_2)


@_kernel
def _query_gradient_kernel(
    query,
    key,
    value,
    text_key,
    text_value,
    text_mask,
    out,
    lse,
    grad_out,
    grad_lse,
    grad_query,
    delta,
    heads,
    height,
    width,
    window_y,
    window_x,
    stride_y,
    stride_x,
    dilation_y,
    dilation_x,
    text_length,
    residues_y,
    residues_x,
    tiles_y,
    tiles_x,
    tile_height,
    tile_width,
    scale,
    q_batch,
    q_row,
    q_column,
    q_head,
    k_batch,
    k_row,
    k_column,
    k_head,
    v_batch,
    v_row,
    v_column,
    v_head,
    g_batch,
    g_row,
    g_column,
    g_head,
    tk_batch,
    tk_row,
    tk_head,
    tv_batch,
    tv_row,
    tv_head,
    UNIT: tl.constexpr,
    TEXT: tl.constexpr,
    HAS_TEXT_MASK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_query, like out, and delta [B, heads, H, W]: the sum of out * grad_out over the channels, less grad_lse."""
    dilation = dilation_y, dilation_x
    place, axis_y, axis_x, start_y, start_x = _tile_of_program(
        heads, (height, width), (window_y, window_x), (stride_y, stride_x), dilation,
        (residues_y, residues_x), (tiles_y, tiles_x), (tile_height, tile_width),
    )  # fmt: skip
    batch, head, residue_y, residue_x = place
    if start_y >= axis_y[0] or start_x >= axis_x[0]:
        return
    y, x, inside = _positions(axis_y, axis_x, start_y, start_x, tile_width, BLOCK_M)
    windows = _windows(axis_y, axis_x, y, x, False)
    queries = _base(query, place, (q_batch, q_row, q_column, q_head), dilation, UNIT)
    q = _load_both(queries[0], y * queries[1] + x * queries[2], inside, WIDTH, BLOCK_D, BLOCK_2, DOT)
    grads = _base(grad_out, place, (g_batch, g_row, g_column, g_head), dilation, UNIT)
    grad = _load_both(grads[0], y * grads[1] + x * grads[2], inside, WIDTH, BLOCK_D, BLOCK_2, DOT)
    token = (residue_y + y * dilation_y) * width + residue_x + x * dilation_x
    offset = token.to(tl.int64) * heads * WIDTH
    first = batch * height * width * heads * WIDTH + head * WIDTH
    pair = (batch * heads + head) * height * width
    result = _load_both(out + first, offset, inside, WIDTH, BLOCK_D, BLOCK_2, tl.float32)
    taken = tl.sum(result[0] * grad[0].to(tl.float32), axis=1)
    if BLOCK_2:
        taken += tl.sum(result[1] * grad[1].to(tl.float32), axis=1)
    taken -= tl.load(grad_lse + pair + token, mask=inside, other=0.0)
    tl.store(delta + pair + token, taken, mask=inside)
    highest = tl.load(lse + pair + token, mask=inside, other=0.0) * LOG2_E
    keys = _base(key, place, (k_batch, k_row, k_column, k_head), dilation, UNIT)
    values = _base(value, place, (v_batch, v_row, v_column, v_head), dilation, UNIT)
    masked, free = _walks_of_tile(axis_y, axis_x, start_y, start_x, tile_height, tile_width, False, BLOCK_N, COLUMNS)
    total_2 = 0.0
    if BLOCK_2:
        total_2 = tl.zeros((BLOCK_M, BLOCK_2), dtype=tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32), total_2
    sums = _query_gradient(
        q, grad, highest, taken, windows, free, keys, values, text_mask, scale * LOG2_E, sums,
        "free", HAS_TEXT_MASK, WIDTH, BLOCK_D, BLOCK_2, BLOCK_N, COLUMNS, DOT, PRECISION,
    )  # fmt: skip
    sums = _query_gradient(
        q, grad, highest, taken, windows, masked, keys, values, text_mask, scale * LOG2_E, sums,
        "window", HAS_TEXT_MASK, WIDTH, BLOCK_D, BLOCK_2, BLOCK_N, COLUMNS, DOT, PRECISION,
    )  # fmt: skip
    if TEXT is not None:
        keys = _text_base(text_key, place, (tk_batch, tk_row, tk_head), UNIT)
        values = _text_base(text_value, place, (tv_batch, tv_row, tv_head), UNIT)
        if HAS_TEXT_MASK:
            text_mask += batch * text_length
        text = _text_walk(text_length, BLOCK_N)
        sums = _query_gradient(
            q, grad, highest, taken, windows, text, keys, values, text_mask, scale * LOG2_E, sums,
            TEXT, HAS_TEXT_MASK, WIDTH, BLOCK_D, BLOCK_2, BLOCK_N, BLOCK_N, DOT, PRECISION,
        )  # fmt: skip
    _store(grad_query + first, offset, inside, sums[0] * scale, WIDTH, 0, BLOCK_D)
    if BLOCK_2:
        _store(grad_query + first, offset, inside, sums[1] * scale, WIDTH, BLOCK_D, BLOCK_2)


@_kernel
def _key_gradient_kernel(
    query,
    key,
    value,
    lse,
    delta,
    grad_out,
    grad_key,
    grad_value,
    heads,
    height,
    width,
    window_y,
    window_x,
    stride_y,
    stride_x,
    dilation_y,
    dilation_x,
    residues_y,
    residues_x,
    tiles_y,
    tiles_x,
    tile_height,
    tile_width,
    scale,
    q_batch,
    q_row,
    q_column,
    q_head,
    k_batch,
    k_row,
    k_column,
    k_head,
    v_batch,
    v_row,
    v_column,
    v_head,
    g_batch,
    g_row,
    g_column,
    g_head,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_key and grad_value [B, H, W, heads, D], contiguous."""
    dilation = dilation_y, dilation_x
    place, axis_y, axis_x, start_y, start_x = _tile_of_program(
        heads, (height, width), (window_y, window_x), (stride_y, stride_x), dilation,
        (residues_y, residues_x), (tiles_y, tiles_x), (tile_height, tile_width),
    )  # fmt: skip
    batch, head, residue_y, residue_x = place
    if start_y >= axis_y[0] or start_x >= axis_x[0]:
        return
    y, x, inside = _positions(axis_y, axis_x, start_y, start_x, tile_width, BLOCK_N)
    windows = _windows(axis_y, axis_x, y, x, True)
    keys = _base(key, place, (k_batch, k_row, k_column, k_head), dilation, UNIT)
    values = _base(value, place, (v_batch, v_row, v_column, v_head), dilation, UNIT)
    k = _load_both(keys[0], y * keys[1] + x * keys[2], inside, WIDTH, BLOCK_D, BLOCK_2, DOT)
    v = _load_both(values[0], y * values[1] + x * values[2], inside, WIDTH, BLOCK_D, BLOCK_2, DOT)
    masked, free = _walks_of_tile(axis_y, axis_x, start_y, start_x, tile_height, tile_width, True, BLOCK_M, COLUMNS)
    queries = _base(query, place, (q_batch, q_row, q_column, q_head), dilation, UNIT)
    grads = _base(grad_out, place, (g_batch, g_row, g_column, g_head), dilation, UNIT)
    tokens = height.to(tl.int64) * width
    rows = lse + (batch * heads + head) * tokens, delta + (batch * heads + head) * tokens
    places = residue_y * width + residue_x, dilation_y * width, dilation_x
    k_total_2, v_total_2 = 0.0, 0.0
    if BLOCK_2:
        k_total_2, v_total_2 = tl.zeros((BLOCK_N, BLOCK_2), tl.float32), tl.zeros((BLOCK_N, BLOCK_2), tl.float32)
    sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), k_total_2, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), v_total_2
    sums = _key_gradient(
        k, v, windows, places, free, queries, grads, rows, scale * LOG2_E, sums,
        "free", WIDTH, BLOCK_D, BLOCK_2, BLOCK_M, COLUMNS, DOT, PRECISION,
    )  # fmt: skip
    sums = _key_gradient(
        k, v, windows, places, masked, queries, grads, rows, scale * LOG2_E, sums,
        "window", WIDTH, BLOCK_D, BLOCK_2, BLOCK_M, COLUMNS, DOT, PRECISION,
    )  # fmt: skip
    first = batch * tokens * heads * WIDTH + head * WIDTH
    offset = (places[0] + y * places[1] + x * places[2]).to(tl.int64) * heads * WIDTH
    _store(grad_key + first, offset, inside, sums[0] * scale, WIDTH, 0, BLOCK_D)
    _store(grad_value + first, offset, inside, sums[2], WIDTH, 0, BLOCK_D)
    if BLOCK_2:
        _store(grad_key + first, offset, inside, sums[1] * scale, WIDTH, BLOCK_D, BLOCK_2)
        _store(grad_value + first, offset, inside, sums[3], WIDTH, BLOCK_D, BLOCK_2)


@_kernel
def _text_gradient_kernel(
    query,
    text_key,
    text_value,
    text_mask,
    lse,
    delta,
    grad_out,
    shares,
    heads,
    height,
    width,
    text_length,
    blocks_per_split,
    scale,
    q_batch,
    q_row,
    q_column,
    q_head,
    tk_batch,
    tk_row,
    tk_head,
    tv_batch,
    tv_row,
    tv_head,
    g_batch,
    g_row,
    g_column,
    g_head,
    UNIT: tl.constexpr,
    HAS_TEXT_MASK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A split's share of the gradients of text: shares [2, splits, B, S, heads, D] in float32, keys' and values'."""
    blocks = tl.cdiv(text_length, BLOCK_N)
    split, pair = tl.program_id(1).to(tl.int64), (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = pair // heads, pair % heads
    place = batch, head, 0, 0
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < text_length
    keys = _text_base(text_key, place, (tk_batch, tk_row, tk_head), UNIT)
    values = _text_base(text_value, place, (tv_batch, tv_row, tv_head), UNIT)
    k = _load_both(keys[0], n * keys[2], inside, WIDTH, BLOCK_D, BLOCK_2, DOT)
    v = _load_both(values[0], n * values[2], inside, WIDTH, BLOCK_D, BLOCK_2, DOT)
    tokens = height.to(tl.int64) * width
    across = tl.cdiv(width, COLUMNS)
    query_blocks = tl.cdiv(height, BLOCK_M // COLUMNS) * across
    first_block = tl.program_id(1) * blocks_per_split
    walk = tl.minimum(blocks_per_split, query_blocks - first_block), 0, first_block, across, 0, 0, height, width
    queries = _base(query, place, (q_batch, q_row, q_column, q_head), (1, 1), UNIT)
    grads = _base(grad_out, place, (g_batch, g_row, g_column, g_head), (1, 1), UNIT)
    rows = lse + pair * tokens, delta + pair * tokens
    k_total_2, v_total_2 = 0.0, 0.0
    if BLOCK_2:
        k_total_2, v_total_2 = tl.zeros((BLOCK_N, BLOCK_2), tl.float32), tl.zeros((BLOCK_N, BLOCK_2), tl.float32)
    sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), k_total_2, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), v_total_2
    sums = _key_gradient(
        k, v, None, (0, width, 1), walk, queries, grads, rows, scale * LOG2_E, sums,
        "text", WIDTH, BLOCK_D, BLOCK_2, BLOCK_M, COLUMNS, DOT, PRECISION,
    )  # fmt: skip
    k_total, k_total_2, v_total, v_total_2 = sums
    if HAS_TEXT_MASK:
        seen = (tl.load(text_mask + batch * text_length + n, mask=inside, other=0) != 0)[:, None]
        k_total, v_total = tl.where(seen, k_total, 0.0), tl.where(seen, v_total, 0.0)
        if BLOCK_2:
            k_total_2, v_total_2 = tl.where(seen, k_total_2, 0.0), tl.where(seen, v_total_2, 0.0)
    pairs = tl.num_programs(0) // blocks
    size = pairs.to(tl.int64) * text_length * WIDTH
    grad_key = shares + split * size + (batch * text_length * heads + head) * WIDTH
    grad_value = grad_key + tl.num_programs(1) * size
    offset = n.to(tl.int64) * heads * WIDTH
    _store(grad_key, offset, inside, k_total * scale, WIDTH, 0, BLOCK_D)
    _store(grad_value, offset, inside, v_total, WIDTH, 0, BLOCK_D)
    if BLOCK_2:
        _store(grad_key, offset, inside, k_total_2 * scale, WIDTH, BLOCK_D, BLOCK_2)
        _store(grad_value, offset, inside, v_total_2, WIDTH, BLOCK_D, BLOCK_2)


INTERPRETED = isinstance(_forward_kernel, InterpretedFunction)


def launch_options(kernel: str, dtype: torch.dtype, width: int, target: int | str) -> dict:
    """Block sizes, precision and compiler options of a kernel, by name, for head widths up to 256.

    Of width 72, 64 channels are one block and 8, padded to 16, the other. target: 10 * major + minor of a CUDA compute
    capability, "hip", or "interpreter". What was measured on that chip (`attention.tuned`) replaces the options, and
    OVERRIDES both.
    """
    block_d = max(16, power_of_2(width))
    block_2 = 0
    if block_d > 16 and width <= block_d // 2 + block_d // 4:
        block_d //= 2
        block_2 = max(16, power_of_2(width - block_d))
    options = {"BLOCK_D": block_d, "BLOCK_2": block_2}
    precise, wide = dtype == torch.float32, width > 128
    # Large blocks, as neighbours share most of what they see, but none that spills on a chip or for a kind of text
    # (tests/attention/window/test_window_compile.py). 90 and 100 read operands of products from shared memory, and 100
    # keeps sums out of registers too.
    forward, hopper, blackwell = kernel in ("forward", "joined"), target == 90, target in (100, 103)
    if precise:  # for tests and small models: that it runs is enough
        queries, keys = (16, 16) if wide else (32, 16) if kernel in ("key_gradient", "text_gradient") else (32, 32)
    elif wide:
        queries, keys = (64, 16) if forward else (32, 32)
    elif forward and (hopper or blackwell or target == "hip"):
        queries, keys = 128, 32 if target == "hip" else 64
    elif forward:  # 16 keys are too few to load 16 channels of them by more than one a thread
        queries, keys = (64, 32) if block_2 else (128, 32 if width <= 64 else 16)
    elif kernel == "query_gradient":
        queries, keys = 128 if hopper or blackwell else 64, 64 if hopper or target == "hip" else 32
    else:
        queries, keys = (64, 128) if blackwell and kernel == "key_gradient" else (32, 64)
    options |= {"BLOCK_M": queries, "BLOCK_N": keys}
    if target == "interpreter":  # the interpreter's bfloat16 products are wrong
        return options | {"DOT": tl.float32, "PRECISION": "ieee"} | OVERRIDES.get(kernel, {})
    if precise:
        options |= {"DOT": tl.float32, "PRECISION": "ieee" if target == "hip" else "tf32x3"}
    else:
        options |= {"DOT": tl.bfloat16 if dtype == torch.bfloat16 else tl.float16, "PRECISION": "ieee"}
    warps = 4 if target == "hip" else 8
    if precise or (wide and target == "hip"):
        stages = 1
    elif forward and not wide and target != "hip":
        stages = 3  # registers and shared memory leave room to load one more block ahead
    else:
        stages = 2
    options |= {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return options | tuned_options("window", kernel, dtype, width, target) | OVERRIDES.get(kernel, {})


def far_options(dtype: torch.dtype, width: int, target: int | str, feature_map: str, channels: int | None) -> dict:
    """What `_joined_kernel` is told of the far branch; channels: of the projection, if there is one.

    Its products are as in linear attention's own kernel. Features are formed by blocks that leave room for near's sums.
    """
    output = linear.launch_options("output", dtype, width, width, target, feature_map, channels)
    options = linear.constants(feature_map, width, width, channels)
    block_c = max(16, power_of_2(options["CHANNELS"]))
    if channels is not None and feature_map != "polynomial":
        block_f = block_c
    elif target in (90, 100, 103, "hip"):
        block_f = 32
    else:
        block_f = 64 if channels is not None and dtype == torch.bfloat16 else 16
    far = {"FAR_DOT": output["DOT"], "FAR_PRECISION": output["PRECISION"], "SELECT": output["SELECT"]}
    known = {name: options[name] for name in ("MAP", "PROJECTED", "CHANNELS", "FEATURES")}
    # without a projection each block reads the queries again, and had better read ahead; else that takes registers alone
    stages = 3 if channels is None and target != "hip" else 1
    return known | far | {"BLOCK_C": block_c, "BLOCK_F": block_f, "FAR_STAGES": stages}


@lru_cache(maxsize=256)
def tile_shape(
    grid: tuple[int, int],
    window: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    tokens: int,
    block: int,
) -> tuple[tuple[int, int], int]:
    """The (rows, columns) of a tile of this many tokens, and the columns of a block of `block` tokens that it walks.

    They are those with which all programs together walk the fewest blocks; both numbers of tokens are powers of two.
    """

    def blocks(shape):
        tile, columns = shape
        programs, walked = 1, 1
        for n, w, s, d, t, side in zip(grid, window, stride, dilation, tile, (block // columns, columns), strict=True):
            size = -(-n // d)
            # windows move on by `s` at a time
            seen = min(size, w + s * (-(-min(t, size) // s) - 1))
            programs, walked = programs * -(-size // t), walked * -(-seen // side)
        return programs * walked

    widths = [2**i for i in range(tokens.bit_length() - 1, -1, -1)]
    columns = [2**i for i in range(block.bit_length() - 1, 2, -1)]
    return min((((tokens // width, width), side) for width in widths for side in columns), key=blocks)


class _Launch(NamedTuple):
    """How a kernel is launched on a grid: the programs, the numbers from `heads` to `scale`, and the constants."""

    programs: int
    numbers: tuple[int, ...]
    constants: dict
    splits: int = 1


@lru_cache(maxsize=512)
def _launch(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    window: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    text_length: int,
    masks_text: bool,
    overrides: tuple,
) -> _Launch:
    """For images of this shape, [B, H, W, heads, D]; overrides: those in force, for which no other launch may be kept."""
    batch, height, width, heads, head_dim = shape
    options = launch_options(kernel, dtype, head_dim, target_of(device, INTERPRETED))
    tokens, walked = options["BLOCK_M"], options["BLOCK_N"]
    constants = {"WIDTH": head_dim, **options}
    if kernel in ("forward", "joined", "query_gradient"):
        free = not masks_text and text_length % walked == 0  # each block of text is seen whole
        constants |= {"TEXT": ("free" if free else "text") if text_length else None, "HAS_TEXT_MASK": masks_text}
    else:
        tokens, walked = walked, tokens
    if kernel == "text_gradient":
        # queries are walked like the keys of one tile that sees the whole grid
        _, columns = tile_shape((height, width), (height, width), (1, 1), (1, 1), 1, walked)
        blocks = over(height, walked // columns) * over(width, columns)
        programs = batch * heads * over(text_length, tokens)
        per_split = over(blocks, max(1, PROGRAMS_PER_SM * multiprocessors(device, INTERPRETED) // programs))
        numbers = heads, height, width, text_length, per_split
        constants |= {"COLUMNS": columns, "HAS_TEXT_MASK": masks_text}
        return _Launch(programs, numbers, constants, over(blocks, per_split))
    tile, constants["COLUMNS"] = tile_shape((height, width), window, stride, dilation, tokens, walked)
    residues = [min(d, n) for d, n in zip(dilation, (height, width), strict=True)]
    tiles = [over(over(n, d), t) for n, d, t in zip((height, width), dilation, tile, strict=True)]
    text = () if kernel == "key_gradient" else (text_length,)
    numbers = heads, height, width, *window, *stride, *dilation, *text, *residues, *tiles, *tile
    return _Launch(batch * heads * math.prod(residues) * math.prod(tiles), numbers, constants)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor | None,
    text_value: Tensor | None,
    text_mask: Tensor | None,
    window: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Window attention [B, H, W, heads, D], and its log-sum-exp [B, heads, H, W] in float32."""
    shape = query.shape
    tensors, unit, strides = laid_out(query, key, value, text_key, text_value)
    query, key, value, text_key, text_value = tensors
    text_length, masks_text = 0 if text_key is None else text_key.shape[1], text_mask is not None
    case = query.device, query.dtype, shape, window, stride, dilation, text_length, masks_text
    launch = _launch("forward", *case, in_force(OVERRIDES, "forward"))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((shape[0], shape[3], shape[1], shape[2]), dtype=torch.float32)
    if text_key is None:
        text_key, text_value = key, value
    with on_device(query):
        _forward_kernel[(launch.programs,)](
            query,
            key,
            value,
            text_key,
            text_value,
            text_mask.contiguous().view(torch.uint8) if masks_text else key,
            out,
            lse,
            *launch.numbers,
            scale,
            *itertools.chain(*strides),
            UNIT=unit,
            **launch.constants,
        )
    return out, lse


def joined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor | None,
    text_value: Tensor | None,
    text_mask: Tensor | None,
    far_query: Tensor,
    state: Tensor,
    mean: Tensor,
    projection: Tensor | None,
    gate: Tensor,
    window: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    feature_map: str,
    eps: float,
    joint: bool,
    text_rows: tuple[int, int],
) -> Tensor:
    """Window attention joined with linear attention; see `window.triton`'s operator."""
    shape = query.shape
    tensors, unit, strides = laid_out(query, key, value, text_key, text_value, far_query)
    query, key, value, text_key, text_value, far_query = tensors
    text_length, masks_text = 0 if text_key is None else text_key.shape[1], text_mask is not None
    case = query.device, query.dtype, shape, window, stride, dilation, text_length, masks_text
    launch = _launch("joined", *case, in_force(OVERRIDES, "joined"))
    channels = None if projection is None else projection.shape[2]
    far = _kept_far_options(query.device, query.dtype, shape[4], feature_map, channels)
    heads, head_dim = shape[3:]
    out = room_for(query, text_rows)
    if text_key is None:
        text_key, text_value = key, value
    with on_device(query):
        _joined_kernel[(launch.programs,)](
            query,
            key,
            value,
            text_key,
            text_value,
            text_mask.contiguous().view(torch.uint8) if masks_text else key,
            far_query,
            query if projection is None else projection.contiguous(),
            state.contiguous(),
            mean.contiguous(),
            gate,
            out,
            *launch.numbers,
            scale,
            float(shape[1] * shape[2]),
            eps,
            *itertools.chain(*strides),
            *gate.stride(),
            out.stride(0) // head_dim,
            text_rows[0] * heads,
            UNIT=unit,
            JOINT=joint,
            **launch.constants,
            **far,
        )
    return out


@lru_cache(maxsize=64)
def _kept_far_options(device: torch.device, dtype: torch.dtype, width: int, feature_map: str, channels: int | None):
    return far_options(dtype, width, target_of(device, INTERPRETED), feature_map, channels)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor | None,
    text_value: Tensor | None,
    text_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of query, key, value and text, contiguous."""
    shape = query.shape
    tensors, unit, strides = laid_out(query, key, value, grad_out, text_key, text_value)
    query, key, value, grad_out, text_key, text_value = tensors
    text_length, masks_text = 0 if text_key is None else text_key.shape[1], text_mask is not None
    case = query.device, query.dtype, shape, window, stride, dilation, text_length, masks_text
    delta = torch.empty_like(lse)
    grad_query, grad_key, grad_value = (query.new_empty(shape) for _ in range(3))
    mask = text_mask.contiguous().view(torch.uint8) if masks_text else key
    texts = (key, value) if text_key is None else (text_key, text_value)
    image_strides, text_strides = [*itertools.chain(*strides[:4])], [*itertools.chain(*strides[4:])]
    with on_device(query):
        launch = _launch("query_gradient", *case, in_force(OVERRIDES, "query_gradient"))
        _query_gradient_kernel[(launch.programs,)](
            query,
            key,
            value,
            *texts,
            mask,
            out,
            lse,
            grad_out,
            grad_lse.contiguous(),
            grad_query,
            delta,
            *launch.numbers,
            scale,
            *image_strides,
            *text_strides,
            UNIT=unit,
            **launch.constants,
        )
        launch = _launch("key_gradient", *case, in_force(OVERRIDES, "key_gradient"))
        _key_gradient_kernel[(launch.programs,)](
            query,
            key,
            value,
            lse,
            delta,
            grad_out,
            grad_key,
            grad_value,
            *launch.numbers,
            scale,
            *image_strides,
            UNIT=unit,
            **launch.constants,
        )
        if text_key is None:
            return grad_query, grad_key, grad_value, None, None
        launch = _launch("text_gradient", *case, in_force(OVERRIDES, "text_gradient"))
        shares = query.new_empty((2, launch.splits, *text_key.shape), dtype=torch.float32)
        _text_gradient_kernel[launch.programs, launch.splits](
            query,
            text_key,
            text_value,
            mask,
            lse,
            delta,
            grad_out,
            shares,
            *launch.numbers,
            scale,
            *strides[0],
            *text_strides,
            *strides[3],
            UNIT=unit,
            **launch.constants,
        )
    return grad_query, grad_key, grad_value, *(share.sum(0).to(query.dtype) for share in shares)
