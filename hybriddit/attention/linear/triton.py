"""Triton kernels of generalized linear attention: `formula.py`'s sums, with projection, phi and the join fused in.

Each program sums its share of the rows in float32 and writes that to a place of its own; the shares are then added in a
fixed order, so that results are reproducible bit for bit. Token offsets are 64-bit. Tensors may have any strides (the
last dimension is made contiguous if it is not).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ..launch import in_force, laid_out, multiprocessors, on_device, over, power_of_2, target_of
from ..tuned import tuned_options
from . import features as maps
from . import phi

# Programs per multiprocessor: while one waits for memory, another computes. Kernels with a larger number of their own
# have more only as far as each still takes this many blocks of rows: every program reads the whole state.
PROGRAMS_PER_SM = 2
BLOCKS_OF_MORE = 8
# Token strides from here on could overflow 32-bit offsets within a block.
LARGEST_ROW = 2**24
# Kernel -> options that replace those of `launch_options`, for sweeps on a GPU.
OVERRIDES: dict[str, dict] = {}


@triton.jit
def _load(pointers, valid, mask_width: tl.constexpr, width_mask):
    # no width_mask where the width is a whole block: it costs registers and prevents wide loads
    if mask_width:
        return tl.load(pointers, mask=valid & width_mask, other=0.0)
    return tl.load(pointers, mask=valid, other=0.0)


@triton.jit
def _times_state(
    rows,
    valid,
    state,
    f,
    whole,
    KEPT: tl.constexpr,
    FEATURES: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The rows [n, E] at these pointers, times the transposed rows f of state: whole where KEPT, else loaded."""
    total = tl.zeros((rows.shape[0], f.shape[0]), dtype=tl.float32)
    for block in range((OUT_WIDTH + BLOCK_E - 1) // BLOCK_E):
        column = block * BLOCK_E + tl.arange(0, BLOCK_E)
        sums = whole if KEPT else phi.load_matrix(state, f[None, :], column[:, None], FEATURES, OUT_WIDTH).to(DOT)
        x = _load(rows + column[None, :], valid, OUT_WIDTH % BLOCK_E != 0, column[None, :] < OUT_WIDTH)
        total = tl.dot(x.to(DOT), sums, total, input_precision=PRECISION)
    return total


@triton.jit
def _sum_kernel(
    x,
    y,
    projection,
    row_scale,
    row_weight,
    state,
    mean,
    length,
    heads,
    rows_per_split,
    factor,
    x_batch,
    x_row,
    x_head,
    y_batch,
    y_row,
    y_head,
    MAP: tl.constexpr,
    PROJECTED: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    SCALED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SELECT: tl.constexpr,
):
    """A split's share of state = sum_n f_n y_n^T and mean = sum_n row_weight_n f_n, times factor; f = row_scale phi(x).

    row_scale and row_weight are [B, heads, N] where SCALED, else 1; state is [splits, B, heads, F, E] and mean
    [splits, B, heads, F]. Each program sums a block of E and, of the polynomial, a block of F.
    """
    halves: tl.constexpr = 2 if MAP == "hedgehog" else 1
    half: tl.constexpr = FEATURES // halves
    e_blocks: tl.constexpr = (OUT_WIDTH + BLOCK_E - 1) // BLOCK_E
    blocks: tl.constexpr = (half + BLOCK_F - 1) // BLOCK_F * e_blocks
    pair, split = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) % blocks
    batch, head = pair // heads, pair % heads
    pairs = (tl.num_programs(0) // blocks).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    f = block // e_blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    e = block % e_blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    x += (batch * x_batch + head * x_head) * UNIT
    y += (batch * y_batch + head * y_head) * UNIT
    matrix = None
    if PROJECTED:
        projection += head * WIDTH * CHANNELS
        matrix = phi.load_matrix(projection, d[:, None], tl.arange(0, BLOCK_M)[None, :], WIDTH, CHANNELS).to(DOT)
    total = tl.zeros((BLOCK_F, BLOCK_E), dtype=tl.float32)
    weight = tl.zeros((BLOCK_F, 16), dtype=tl.float32)
    if halves == 2:
        total_2 = tl.zeros((BLOCK_F, BLOCK_E), dtype=tl.float32)
        weight_2 = tl.zeros((BLOCK_F, 16), dtype=tl.float32)
    weights = tl.full((BLOCK_N, 16), 1 / 16, dtype=DOT)
    n = tl.arange(0, BLOCK_N)  # 32 bits are enough within a block
    first = split * rows_per_split
    for step in range(tl.cdiv(tl.minimum(rows_per_split, length - first), BLOCK_N)):
        start = first + step * BLOCK_N
        valid = n[:, None] < length - start
        x_rows = _load(
            x + start * x_row * UNIT + n[:, None] * (x_row * UNIT) + d[None, :],
            valid,
            WIDTH != BLOCK_D,
            d[None, :] < WIDTH,
        )
        y_rows = _load(
            y + start * y_row * UNIT + n[:, None] * (y_row * UNIT) + e[None, :],
            valid,
            OUT_WIDTH % BLOCK_E != 0,
            e[None, :] < OUT_WIDTH,
        )
        channels = phi.channels(x_rows, matrix, MAP, PROJECTED, DOT, PRECISION)
        features = phi.features(channels, f, 0, MAP, CHANNELS, SELECT)
        if halves == 2:
            features_2 = phi.features(channels, f, 1, MAP, CHANNELS, SELECT)
        if SCALED:
            scale = tl.load(row_scale + pair * length + start + n, mask=n < length - start, other=0.0)[:, None]
            weights = tl.load(row_weight + pair * length + start + n, mask=n < length - start, other=0.0)
            weights = phi.columns(weights, DOT)
            features *= scale
            if halves == 2:
                features_2 *= scale
        else:
            features = tl.where(valid, features, 0.0)  # masked after phi, because phi(0) is not 0
            if halves == 2:
                features_2 = tl.where(valid, features_2, 0.0)
        features = tl.trans(features.to(DOT))
        weight = tl.dot(features, weights, weight, input_precision=PRECISION)
        total = tl.dot(features, y_rows.to(DOT), total, input_precision=PRECISION)
        if halves == 2:
            features_2 = tl.trans(features_2.to(DOT))
            weight_2 = tl.dot(features_2, weights, weight_2, input_precision=PRECISION)
            total_2 = tl.dot(features_2, y_rows.to(DOT), total_2, input_precision=PRECISION)
    out = (split * pairs + pair) * FEATURES
    inside = (f[:, None] < half) & (e[None, :] < OUT_WIDTH)
    state += (out + f[:, None]) * OUT_WIDTH + e[None, :]
    tl.store(state, total * factor, mask=inside)
    if halves == 2:
        tl.store(state + half * OUT_WIDTH, total_2 * factor, mask=inside)
    if block % e_blocks == 0:
        tl.store(mean + out + f, tl.sum(weight, axis=1) * factor, mask=f < half)
        if halves == 2:
            tl.store(mean + out + half + f, tl.sum(weight_2, axis=1) * factor, mask=f < half)


@triton.jit
def _output_kernel(
    query,
    projection,
    state,
    mean,
    near,
    gate,
    lse,
    out,
    length,
    heads,
    rows_per_split,
    eps,
    count,
    q_batch,
    q_row,
    q_head,
    near_batch,
    near_row,
    near_head,
    gate_batch,
    gate_row,
    gate_head,
    gate_column,
    lse_batch,
    lse_row,
    lse_head,
    MAP: tl.constexpr,
    PROJECTED: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    JOIN: tl.constexpr,
    JOINT: tl.constexpr,
    HAS_LSE: tl.constexpr,
    GATE_PER_ROW: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SELECT: tl.constexpr,
):
    """out = phi(q) state / (phi(q) . mean + eps), joined to near where JOIN; out [B, N, heads, E] is contiguous.

    gate is what near and the result are joined by; where JOINT, the share is x / (1 + |x|), with x = gate * count
    (phi(q) . mean + eps); where HAS_LSE, gate is `formula.joint_gate` of gate and lse.
    """
    halves: tl.constexpr = 2 if MAP == "hedgehog" else 1
    half: tl.constexpr = FEATURES // halves
    f_blocks: tl.constexpr = (half + BLOCK_F - 1) // BLOCK_F
    blocks: tl.constexpr = (OUT_WIDTH + BLOCK_E - 1) // BLOCK_E
    pair, split = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    d, f = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    e = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e[None, :] < OUT_WIDTH
    query += (batch * q_batch + head * q_head) * UNIT
    out += batch * length * heads * OUT_WIDTH + head * OUT_WIDTH
    state += pair * FEATURES * OUT_WIDTH
    mean += pair * FEATURES
    if JOIN:
        near += (batch * near_batch + head * near_head) * UNIT
        gate += batch * gate_batch + head * gate_head
        if HAS_LSE:
            lse += batch * lse_batch + head * lse_head
    matrix = None
    if PROJECTED:
        projection += head * WIDTH * CHANNELS
        matrix = phi.load_matrix(projection, d[:, None], tl.arange(0, BLOCK_M)[None, :], WIDTH, CHANNELS).to(DOT)
    # features beyond the last are zero in both sums, so phi's values there do not count
    if f_blocks == 1:
        sums = phi.load_matrix(state, f[:, None], e[None, :], half, OUT_WIDTH).to(DOT)
        means = phi.columns(tl.load(mean + f, mask=f < half, other=0.0), DOT)
    if halves == 2:
        sums_2 = phi.load_matrix(state + half * OUT_WIDTH, f[:, None], e[None, :], half, OUT_WIDTH).to(DOT)
        means_2 = phi.columns(tl.load(mean + half + f, mask=f < half, other=0.0), DOT)
    n = tl.arange(0, BLOCK_N)  # 32 bits are enough within a block
    first = split * rows_per_split
    for step in range(tl.cdiv(tl.minimum(rows_per_split, length - first), BLOCK_N)):
        start = first + step * BLOCK_N
        valid = n[:, None] < length - start
        q = _load(
            query + start * q_row * UNIT + n[:, None] * (q_row * UNIT) + d[None, :],
            valid,
            WIDTH != BLOCK_D,
            d[None, :] < WIDTH,
        )
        channels = phi.channels(q, matrix, MAP, PROJECTED, DOT, PRECISION)
        if MAP == "polynomial":
            total = tl.zeros((BLOCK_N, 16), dtype=tl.float32)
            result = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float32)
            for block in range(f_blocks):
                row = block * BLOCK_F + f
                if f_blocks > 1:
                    sums = phi.load_matrix(state, row[:, None], e[None, :], half, OUT_WIDTH).to(DOT)
                    means = phi.columns(tl.load(mean + row, mask=row < half, other=0.0), DOT)
                features = phi.features(channels, row, 0, MAP, CHANNELS, SELECT).to(DOT)
                total = tl.dot(features, means, total, input_precision=PRECISION)
                result = tl.dot(features, sums, result, input_precision=PRECISION)
        else:
            features = phi.features(channels, f, 0, MAP, CHANNELS, SELECT).to(DOT)
            total = tl.dot(features, means, input_precision=PRECISION)
            result = tl.dot(features, sums, input_precision=PRECISION)
            if halves == 2:
                features = phi.features(channels, f, 1, MAP, CHANNELS, SELECT).to(DOT)
                total = tl.dot(features, means_2, total, input_precision=PRECISION)
                result = tl.dot(features, sums_2, result, input_precision=PRECISION)
        denominator = (tl.sum(total, axis=1) + eps)[:, None]
        result = result / denominator
        if JOIN:
            beside = tl.load(
                near + start * near_row * UNIT + n[:, None] * (near_row * UNIT) + e[None, :],
                mask=valid & inside,
                other=0.0,
            ).to(tl.float32)
            opening = gate + start * gate_row + n[:, None] * gate_row
            if GATE_PER_ROW:
                opening = tl.load(opening, mask=valid, other=0.0).to(tl.float32)
            else:
                opening = tl.load(opening + e[None, :] * gate_column, mask=valid & inside, other=0.0).to(tl.float32)
            if HAS_LSE:
                logarithm = tl.load(lse + start * lse_row + n * lse_row, mask=n < length - start, other=0.0)
                opening = phi.beside_softmax(opening, logarithm[:, None])
            if JOINT:
                opening = phi.joint_share(opening, denominator, count)
            result = beside + opening * (result - beside)
        tl.store(
            out + start * heads * OUT_WIDTH + n[:, None] * (heads * OUT_WIDTH) + e[None, :],
            result.to(out.dtype.element_ty),
            mask=valid & inside,
        )


@triton.jit
def _output_backward_kernel(
    grad_out,
    query,
    projection,
    state,
    mean,
    grad_query,
    grad_projection,
    row_scale,
    row_weight,
    length,
    heads,
    rows_per_split,
    eps,
    g_batch,
    g_row,
    g_head,
    q_batch,
    q_row,
    q_head,
    MAP: tl.constexpr,
    PROJECTED: tl.constexpr,
    RELOAD_PROJECTION: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SELECT: tl.constexpr,
):
    """The query's gradient; a split's share of the projection's, [splits, B, heads, D, m]; and each row's scale and
    weight, from which `_sum_kernel` makes the state's gradient."""
    halves: tl.constexpr = 2 if MAP == "hedgehog" else 1
    half: tl.constexpr = FEATURES // halves
    f_blocks: tl.constexpr = (half + BLOCK_F - 1) // BLOCK_F
    e_blocks: tl.constexpr = (OUT_WIDTH + BLOCK_E - 1) // BLOCK_E
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    d, m, f, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_E)
    grad_out += (batch * g_batch + head * g_head) * UNIT
    query += (batch * q_batch + head * q_head) * UNIT
    grad_query += batch * length * heads * WIDTH + head * WIDTH
    state += pair * FEATURES * OUT_WIDTH
    mean += pair * FEATURES
    matrix = None
    if PROJECTED:
        projection += head * WIDTH * CHANNELS
        if not RELOAD_PROJECTION:
            matrix = phi.load_matrix(projection, d[:, None], m[None, :], WIDTH, CHANNELS).to(DOT)
        projection_total = tl.zeros((BLOCK_D, BLOCK_M), dtype=tl.float32)
    kept: tl.constexpr = f_blocks == 1 and e_blocks == 1
    whole = None
    if f_blocks == 1:
        means = phi.columns(tl.load(mean + f, mask=f < half, other=0.0), DOT)
        if kept:
            whole = phi.load_matrix(state, f[None, :], e[:, None], half, OUT_WIDTH).to(DOT)
    if halves == 2:
        means_2 = phi.columns(tl.load(mean + half + f, mask=f < half, other=0.0), DOT)
        if e_blocks == 1:
            sums_2 = phi.load_matrix(state + half * OUT_WIDTH, f[None, :], e[:, None], half, OUT_WIDTH).to(DOT)
    n = tl.arange(0, BLOCK_N)  # 32 bits are enough within a block
    first = split * rows_per_split
    for step in range(tl.cdiv(tl.minimum(rows_per_split, length - first), BLOCK_N)):
        start = first + step * BLOCK_N
        valid = n[:, None] < length - start
        q = _load(
            query + start * q_row * UNIT + n[:, None] * (q_row * UNIT) + d[None, :],
            valid,
            WIDTH != BLOCK_D,
            d[None, :] < WIDTH,
        )
        g_rows = grad_out + start * g_row * UNIT + n[:, None] * (g_row * UNIT)
        if RELOAD_PROJECTION:
            loaded = phi.load_matrix(projection, d[:, None], m[None, :], WIDTH, CHANNELS).to(DOT)
        else:
            loaded = matrix
        channels = phi.channels(q, loaded, MAP, PROJECTED, DOT, PRECISION)
        # grad_out . out = phi(q) . (state grad_out) / denominator: the output itself is not needed
        if MAP == "polynomial":
            scaled = phi.scaled(channels, CHANNELS)
            total = tl.zeros((BLOCK_N, 16), dtype=tl.float32)
            along = tl.zeros((BLOCK_N,), dtype=tl.float32)
            grad_features = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
            left, right = grad_features, grad_features
            for block in range(f_blocks):
                row = block * BLOCK_F + f
                if f_blocks > 1:
                    means = phi.columns(tl.load(mean + row, mask=row < half, other=0.0), DOT)
                grad_features = _times_state(
                    g_rows, valid, state, row, whole, kept, FEATURES, OUT_WIDTH, BLOCK_E, DOT, PRECISION
                )
                left, right = phi.factors(scaled, row, CHANNELS, SELECT)
                features = left * right
                total = tl.dot(features.to(DOT), means, total, input_precision=PRECISION)
                along += tl.sum(features * grad_features, axis=1)
            scale = 1 / (tl.sum(total, axis=1) + eps)
            weight = -along * scale
            weights = tl.broadcast_to(weight[:, None], (BLOCK_N, 16)).to(DOT)
            grad = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for block in range(f_blocks):
                row = block * BLOCK_F + f
                if f_blocks > 1:  # too much to keep
                    means = phi.columns(tl.load(mean + row, mask=row < half, other=0.0), DOT)
                    grad_features = _times_state(
                        g_rows, valid, state, row, whole, kept, FEATURES, OUT_WIDTH, BLOCK_E, DOT, PRECISION
                    )
                    left, right = phi.factors(scaled, row, CHANNELS, SELECT)
                grad_features = tl.dot(weights, tl.trans(means), grad_features, input_precision=PRECISION)
                grad_features *= scale[:, None]
                grad = phi.products_backward(grad_features, left, right, row, grad, CHANNELS, DOT, PRECISION)
            grad = phi.scaled_backward(grad, channels, CHANNELS)
        else:
            grad_features = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
            if halves == 2:
                grad_2 = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
            for block in range(e_blocks):
                column = block * BLOCK_E + e
                sums = whole if kept else phi.load_matrix(state, f[None, :], column[:, None], half, OUT_WIDTH).to(DOT)
                g = _load(g_rows + column[None, :], valid, OUT_WIDTH % BLOCK_E != 0, column[None, :] < OUT_WIDTH)
                grad_features = tl.dot(g.to(DOT), sums, grad_features, input_precision=PRECISION)
                if halves == 2:
                    if e_blocks > 1:
                        sums_2 = phi.load_matrix(
                            state + half * OUT_WIDTH, f[None, :], column[:, None], half, OUT_WIDTH
                        ).to(DOT)
                    grad_2 = tl.dot(g.to(DOT), sums_2, grad_2, input_precision=PRECISION)
            if MAP == "hedgehog":
                features, features_2 = phi.softmax(channels, CHANNELS), phi.softmax(-channels, CHANNELS)
            else:
                features = phi.elu(channels)
            total = tl.dot(features.to(DOT), means, input_precision=PRECISION)
            along = tl.sum(features * grad_features, axis=1)
            if halves == 2:
                total = tl.dot(features_2.to(DOT), means_2, total, input_precision=PRECISION)
                along += tl.sum(features_2 * grad_2, axis=1)
            scale = 1 / (tl.sum(total, axis=1) + eps)
            weight = -along * scale
            weights = tl.broadcast_to(weight[:, None], (BLOCK_N, 16)).to(DOT)
            grad = tl.dot(weights, tl.trans(means), grad_features, input_precision=PRECISION) * scale[:, None]
            if halves == 2:
                grad_2 = tl.dot(weights, tl.trans(means_2), grad_2, input_precision=PRECISION) * scale[:, None]
                grad = phi.softmax_backward(grad, features) - phi.softmax_backward(grad_2, features_2)
            else:
                grad = phi.elu_backward(grad, channels, features, PROJECTED)
        if PROJECTED:  # rows beyond the last are zeros, and add nothing
            rows = tl.trans(phi.clamp(q.to(tl.float32), phi.LARGEST).to(DOT))
            projection_total = tl.dot(rows, grad.to(DOT), projection_total, input_precision=PRECISION)
        grad = phi.rows_backward(grad, q, loaded, PROJECTED, DOT, PRECISION)
        tl.store(
            grad_query + start * heads * WIDTH + n[:, None] * (heads * WIDTH) + d[None, :],
            grad.to(grad_query.dtype.element_ty),
            mask=valid & (d[None, :] < WIDTH),
        )
        tl.store(row_scale + pair * length + start + n, scale, mask=n < length - start)
        tl.store(row_weight + pair * length + start + n, weight, mask=n < length - start)
    if PROJECTED:
        grad_projection += (split * tl.num_programs(0) + pair) * WIDTH * CHANNELS
        tl.store(
            grad_projection + d[:, None] * CHANNELS + m[None, :],
            projection_total,
            mask=(d[:, None] < WIDTH) & (m[None, :] < CHANNELS),
        )


@triton.jit
def _state_backward_kernel(
    grad_state,
    grad_mean,
    key,
    value,
    projection,
    key_mask,
    grad_key,
    grad_value,
    grad_projection,
    length,
    heads,
    rows_per_split,
    factor,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    MAP: tl.constexpr,
    PROJECTED: tl.constexpr,
    RELOAD_PROJECTION: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    MASKED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SELECT: tl.constexpr,
):
    """grad_value = phi(k) grad_state, grad_key = phi'(k) (v grad_state^T + grad_mean), both times factor; and a split's
    share of the projection's gradient, [splits, B, heads, D, m].

    key_mask [B, N], where MASKED, is 0 for keys that are left out: their gradients are zero.
    """
    halves: tl.constexpr = 2 if MAP == "hedgehog" else 1
    half: tl.constexpr = FEATURES // halves
    f_blocks: tl.constexpr = (half + BLOCK_F - 1) // BLOCK_F
    e_blocks: tl.constexpr = (OUT_WIDTH + BLOCK_E - 1) // BLOCK_E
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    d, m, f, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_E)
    key += (batch * k_batch + head * k_head) * UNIT
    value += (batch * v_batch + head * v_head) * UNIT
    grad_key += batch * length * heads * WIDTH + head * WIDTH
    grad_value += batch * length * heads * OUT_WIDTH + head * OUT_WIDTH
    grad_state += pair * FEATURES * OUT_WIDTH
    grad_mean += pair * FEATURES
    matrix = None
    if PROJECTED:
        projection += head * WIDTH * CHANNELS
        if not RELOAD_PROJECTION:
            matrix = phi.load_matrix(projection, d[:, None], m[None, :], WIDTH, CHANNELS).to(DOT)
        projection_total = tl.zeros((BLOCK_D, BLOCK_M), dtype=tl.float32)
    if f_blocks == 1:
        means = tl.load(grad_mean + f, mask=f < half, other=0.0) * factor
        if e_blocks == 1:
            sums = (phi.load_matrix(grad_state, f[:, None], e[None, :], half, OUT_WIDTH) * factor).to(DOT)
    if halves == 2:
        means_2 = tl.load(grad_mean + half + f, mask=f < half, other=0.0) * factor
        if e_blocks == 1:
            sums_2 = phi.load_matrix(grad_state + half * OUT_WIDTH, f[:, None], e[None, :], half, OUT_WIDTH)
            sums_2 = (sums_2 * factor).to(DOT)
    n = tl.arange(0, BLOCK_N)  # 32 bits are enough within a block
    first = split * rows_per_split
    for step in range(tl.cdiv(tl.minimum(rows_per_split, length - first), BLOCK_N)):
        start = first + step * BLOCK_N
        valid = n[:, None] < length - start
        if MASKED:
            seen = tl.load(key_mask + batch * length + start + n, mask=n < length - start, other=0)[:, None] != 0
        k = _load(
            key + start * k_row * UNIT + n[:, None] * (k_row * UNIT) + d[None, :],
            valid,
            WIDTH != BLOCK_D,
            d[None, :] < WIDTH,
        )
        v_rows = value + start * v_row * UNIT + n[:, None] * (v_row * UNIT)
        out = grad_value + start * heads * OUT_WIDTH + n[:, None] * (heads * OUT_WIDTH)
        if RELOAD_PROJECTION:
            loaded = phi.load_matrix(projection, d[:, None], m[None, :], WIDTH, CHANNELS).to(DOT)
        else:
            loaded = matrix
        channels = phi.channels(k, loaded, MAP, PROJECTED, DOT, PRECISION)
        if MAP == "polynomial":
            scaled = phi.scaled(channels, CHANNELS)
            grad = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        else:
            grad = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32) + means[None, :]
            if MAP == "hedgehog":
                features, features_2 = phi.softmax(channels, CHANNELS).to(DOT), phi.softmax(-channels, CHANNELS).to(DOT)
                grad_2 = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32) + means_2[None, :]
            else:
                features = phi.elu(channels).to(DOT)
        for block in range(e_blocks):
            column = block * BLOCK_E + e[None, :]
            v = _load(v_rows + column, valid, OUT_WIDTH % BLOCK_E != 0, column < OUT_WIDTH)
            if MAP == "polynomial":
                result = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float32)
                for f_block in range(f_blocks):
                    row = f_block * BLOCK_F + f
                    if f_blocks > 1:
                        means = tl.load(grad_mean + row, mask=row < half, other=0.0) * factor
                    if f_blocks > 1 or e_blocks > 1:
                        sums = (phi.load_matrix(grad_state, row[:, None], column, half, OUT_WIDTH) * factor).to(DOT)
                    left, right = phi.factors(scaled, row, CHANNELS, SELECT)
                    result = tl.dot((left * right).to(DOT), sums, result, input_precision=PRECISION)
                    grad_features = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
                    grad_features += tl.where(block == 0, means, 0.0)[None, :]
                    grad_features = tl.dot(v.to(DOT), tl.trans(sums), grad_features, input_precision=PRECISION)
                    grad = phi.products_backward(grad_features, left, right, row, grad, CHANNELS, DOT, PRECISION)
            else:
                if e_blocks > 1:
                    sums = (phi.load_matrix(grad_state, f[:, None], column, half, OUT_WIDTH) * factor).to(DOT)
                result = tl.dot(features, sums, input_precision=PRECISION)
                grad = tl.dot(v.to(DOT), tl.trans(sums), grad, input_precision=PRECISION)
                if halves == 2:
                    if e_blocks > 1:
                        sums_2 = phi.load_matrix(grad_state + half * OUT_WIDTH, f[:, None], column, half, OUT_WIDTH)
                        sums_2 = (sums_2 * factor).to(DOT)
                    result = tl.dot(features_2, sums_2, result, input_precision=PRECISION)
                    grad_2 = tl.dot(v.to(DOT), tl.trans(sums_2), grad_2, input_precision=PRECISION)
            if MASKED:
                result = tl.where(seen, result, 0.0)
            tl.store(out + column, result.to(grad_value.dtype.element_ty), mask=valid & (column < OUT_WIDTH))
        if MAP == "polynomial":
            grad = phi.scaled_backward(grad, channels, CHANNELS)
        elif MAP == "hedgehog":
            grad = phi.softmax_backward(grad, features.to(tl.float32))
            grad -= phi.softmax_backward(grad_2, features_2.to(tl.float32))
        else:
            grad = phi.elu_backward(grad, channels, features.to(tl.float32), PROJECTED)
        if MASKED:
            grad = tl.where(seen, grad, 0.0)
        if PROJECTED:  # rows beyond the last are zeros, and add nothing
            rows = tl.trans(phi.clamp(k.to(tl.float32), phi.LARGEST).to(DOT))
            projection_total = tl.dot(rows, grad.to(DOT), projection_total, input_precision=PRECISION)
        grad = phi.rows_backward(grad, k, loaded, PROJECTED, DOT, PRECISION)
        tl.store(
            grad_key + start * heads * WIDTH + n[:, None] * (heads * WIDTH) + d[None, :],
            grad.to(grad_key.dtype.element_ty),
            mask=valid & (d[None, :] < WIDTH),
        )
    if PROJECTED:
        grad_projection += (split * tl.num_programs(0) + pair) * WIDTH * CHANNELS
        tl.store(
            grad_projection + d[:, None] * CHANNELS + m[None, :],
            projection_total,
            mask=(d[:, None] < WIDTH) & (m[None, :] < CHANNELS),
        )


INTERPRETED = isinstance(_sum_kernel, InterpretedFunction)


def launch_options(
    kernel: str,
    dtype: torch.dtype,
    width: int,
    out_width: int,
    target: int | str,
    feature_map: str = "elu",
    channels: int | None = None,
    per_channel: bool = False,
) -> dict:
    """Block sizes, precision, programs and compiler options of a kernel, by name, for head widths up to 256.

    channels: of the projection, if there is one; then, and for other maps than elu, widths are up to 128. per_channel:
    the output is joined by a gate of its own for each channel. target: 10 * major + minor of a CUDA compute capability,
    "hip", or "interpreter". The sizes are those that the compiler fits into registers and shared memory on every chip
    (tests/attention/linear/test_compile.py), replaced by what was measured on this one (`attention.tuned`), and by
    OVERRIDES.
    """
    block_d, precise = max(16, power_of_2(width)), dtype != torch.bfloat16
    block_e = min(max(16, power_of_2(out_width)), 128)
    # wgmma takes 64 rows at a time; on other chips, and in backward kernels, 64 rows do not fit beside the state
    rows = 64 if target in (90, 100, 103) and not precise and kernel in ("sum", "output") else 32
    if block_d > 128:
        rows, block_e = 16, 16
    elif block_d == 128:
        if dtype == torch.float32 or (target == "hip" and (precise or kernel == "output_backward")):
            rows, block_e = 16, min(block_e, 32 if dtype == torch.float32 and kernel.endswith("backward") else 64)
        elif precise and kernel.endswith("backward"):
            rows = 16
    block_m = block_f = block_d if channels is None else max(16, power_of_2(channels))
    reload = False
    if channels is not None or feature_map != "elu":
        # the projection and its gradient, the second half of hedgehog and the polynomial's factors need room too
        if feature_map == "polynomial":
            features = maps.FEATURE_MAPS[feature_map].features(width if channels is None else channels)
            block_f = min(max(16, power_of_2(features)), 64 if kernel == "sum" else 128)
        backward, wide = kernel.endswith("backward"), max(block_d, block_m, block_f) > 64
        if (backward and (wide or target == "hip")) or block_m > 64 or (block_f > 64 and block_m < block_f):
            rows = 16
        if block_m > 64 or (wide and target == "hip" and backward):
            block_e = min(block_e, 64)
        if block_m > 64 and feature_map == "hedgehog" and kernel == "sum":
            block_e = min(block_e, 32)
        if precise and wide:
            rows, block_e = 16, min(block_e, 32)
            if feature_map == "polynomial" and kernel == "output":
                block_e, block_f = 64, 64
            elif feature_map == "polynomial" and kernel == "state_backward":
                block_e, block_f = 128, 32
            elif kernel == "output" and dtype == torch.float32:
                block_e = 16
        large = min(block_d, block_m) > 64 or (precise and wide)
        reload = channels is not None and backward and large and target in (86, 89, 120, "hip")
    options = {"BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_F": block_f, "BLOCK_E": block_e, "BLOCK_N": rows}
    options["PROGRAMS_PER_SM"] = PROGRAMS_PER_SM
    if kernel.endswith("backward"):
        options["RELOAD_PROJECTION"] = reload
    if target == "interpreter":  # the interpreter's bfloat16 products are wrong
        return options | {"DOT": tl.float32, "PRECISION": "ieee", "SELECT": "ieee"} | OVERRIDES.get(kernel, {})
    # float16 runs as tf32, which has the same 10 bits and float32's range: sums of products overflow float16
    precision = "ieee" if target == "hip" else "tf32x3" if dtype == torch.float32 else "tf32"
    options["SELECT"] = precision
    if precise:
        options |= {"DOT": tl.float32, "PRECISION": precision}
    else:
        options |= {"DOT": tl.bfloat16, "PRECISION": "ieee"}
    warps = 4 if target == "hip" else 8
    # a state that is reloaded for every block of rows is too large to prefetch
    stages = 1 if block_e < out_width or reload else 3 if rows == 64 and kernel == "sum" else 2
    if kernel == "sum" and target in (100, 103) and triton.__version__.startswith(("3.6", "3.7", "3.8")):
        stages = 1  # Triton 3.6 fails to overlap loads with two products there, 3.9 does not
    options |= {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    # gates per channel, projections and the other maps were not measured, and take more registers
    if feature_map == "elu" and channels is None and width == out_width and not per_channel:
        options |= tuned_options("linear", kernel, dtype, width, target)
    return options | OVERRIDES.get(kernel, {})


def state(
    key: Tensor, value: Tensor, projection: Tensor | None, key_mask: Tensor | None, feature_map: str
) -> tuple[Tensor, Tensor]:
    """The sums over the keys: see `dispatch`'s operators of these names."""
    weight = None
    if key_mask is not None:
        weight = key_mask[:, None].float().expand(-1, key.shape[2], -1).contiguous()  # [B, heads, N]
    return _sums(key, value, projection, feature_map, weight, weight, 1 / max(key.shape[1], 1))


def output(
    query: Tensor,
    state: Tensor,
    mean: Tensor,
    near: Tensor | None,
    gate: Tensor | None,
    projection: Tensor | None,
    eps: float,
    feature_map: str,
    joint: bool = False,
    wide: bool = False,
    lse: Tensor | None = None,
    count: float = 1.0,
) -> Tensor:
    batch, length, heads, _ = query.shape
    out = query.new_empty(batch, length, heads, state.shape[3], dtype=state.dtype if wide else query.dtype)
    if out.numel() == 0:
        return out
    (query, near), unit, strides = laid_out(query, near, largest=LARGEST_ROW)
    gate = None if gate is None else gate.expand(out.shape)
    per_channel = near is not None and gate.stride(3) != 0
    options, per_sm = _options("output", query, state.shape[3], projection, feature_map, per_channel)
    blocks = over(state.shape[3], options["BLOCK_E"])
    splits, rows_per_split = _splits(query, batch * heads * blocks, options["BLOCK_N"], per_sm)
    with on_device(query):
        _output_kernel[batch * heads * blocks, splits](
            query,
            query if projection is None else projection.contiguous(),
            state.contiguous(),
            mean.contiguous(),
            out if near is None else near,
            out if near is None else gate,
            mean if lse is None else lse,
            out,
            length,
            heads,
            rows_per_split,
            eps,
            count,
            *strides[0],
            *strides[1],
            *((0, 0, 0, 0) if near is None else gate.stride()),
            *((0, 0, 0) if lse is None else lse.stride()),
            UNIT=unit,
            JOIN=near is not None,
            JOINT=joint,
            HAS_LSE=lse is not None,
            GATE_PER_ROW=near is not None and not per_channel,
            **options,
        )
    return out


def output_backward(
    grad_out: Tensor,
    query: Tensor,
    state: Tensor,
    mean: Tensor,
    projection: Tensor | None,
    eps: float,
    feature_map: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    batch, length, heads, _ = query.shape
    grad_query = query.new_empty(query.shape)
    if grad_out.numel() == 0:
        grad_projection = None if projection is None else torch.zeros_like(projection)
        return grad_query.zero_(), torch.zeros_like(state), torch.zeros_like(mean), grad_projection
    row_scale, row_weight = query.new_empty(2, batch, heads, length, dtype=torch.float32)
    (grad_out, query), unit, strides = laid_out(grad_out, query, largest=LARGEST_ROW)
    options, per_sm = _options("output_backward", query, state.shape[3], projection, feature_map)
    splits, rows_per_split = _splits(query, batch * heads, options["BLOCK_N"], per_sm)
    shares = _projection_shares(projection, splits, batch)
    with on_device(query):
        _output_backward_kernel[batch * heads, splits](
            grad_out,
            query,
            query if projection is None else projection.contiguous(),
            state.contiguous(),
            mean.contiguous(),
            grad_query,
            row_scale if shares is None else shares,
            row_scale,
            row_weight,
            length,
            heads,
            rows_per_split,
            eps,
            *strides[0],
            *strides[1],
            UNIT=unit,
            **options,
        )
    sums = _sums(query, grad_out, projection, feature_map, row_scale, row_weight, 1.0)
    return grad_query, *sums, None if shares is None else shares.sum((0, 1)).to(projection.dtype)


def state_backward(
    grad_state: Tensor,
    grad_mean: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor | None,
    key_mask: Tensor | None,
    feature_map: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    batch, length, heads, _ = key.shape
    grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
    if key.numel() == 0 or value.numel() == 0:
        return grad_key.zero_(), grad_value.zero_(), None if projection is None else torch.zeros_like(projection)
    (key, value), unit, strides = laid_out(key, value, largest=LARGEST_ROW)
    options, per_sm = _options("state_backward", key, value.shape[3], projection, feature_map)
    splits, rows_per_split = _splits(key, batch * heads, options["BLOCK_N"], per_sm)
    shares = _projection_shares(projection, splits, batch)
    with on_device(key):
        _state_backward_kernel[batch * heads, splits](
            grad_state.contiguous(),
            grad_mean.contiguous(),
            key,
            value,
            key if projection is None else projection.contiguous(),
            key if key_mask is None else key_mask.contiguous().view(torch.uint8),
            grad_key,
            grad_value,
            grad_state if shares is None else shares,
            length,
            heads,
            rows_per_split,
            1 / length,
            *strides[0],
            *strides[1],
            UNIT=unit,
            MASKED=key_mask is not None,
            **options,
        )
    return grad_key, grad_value, None if shares is None else shares.sum((0, 1)).to(projection.dtype)


def _sums(
    x: Tensor,
    y: Tensor,
    projection: Tensor | None,
    feature_map: str,
    row_scale: Tensor | None,
    row_weight: Tensor | None,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Run `_sum_kernel` and add up its shares: [B, heads, F, E] and [B, heads, F, 1] in float32."""
    (batch, length, heads, _), out_width = x.shape, y.shape[3]
    options, per_sm = _options("sum", x, out_width, projection, feature_map)
    features = options["FEATURES"]
    if x.numel() == 0 or y.numel() == 0:
        return x.new_zeros(batch, heads, features, out_width, dtype=torch.float32), x.new_zeros(
            batch, heads, features, 1, dtype=torch.float32
        )
    (x, y), unit, strides = laid_out(x, y, largest=LARGEST_ROW)
    blocks = over(out_width, options["BLOCK_E"])
    if feature_map == "polynomial":
        blocks *= over(features, options["BLOCK_F"])
    splits, rows_per_split = _splits(x, batch * heads * blocks, options["BLOCK_N"], per_sm)
    state = x.new_empty(splits, batch, heads, features, out_width, dtype=torch.float32)
    mean = x.new_empty(splits, batch, heads, features, 1, dtype=torch.float32)
    with on_device(x):
        _sum_kernel[batch * heads * blocks, splits](
            x,
            y,
            x if projection is None else projection.contiguous(),
            mean if row_scale is None else row_scale,
            mean if row_weight is None else row_weight,
            state,
            mean,
            length,
            heads,
            rows_per_split,
            factor,
            *strides[0],
            *strides[1],
            UNIT=unit,
            SCALED=row_scale is not None,
            **options,
        )
    return (state.squeeze(0), mean.squeeze(0)) if splits == 1 else (state.sum(0), mean.sum(0))


def _projection_shares(projection: Tensor | None, splits: int, batch: int) -> Tensor | None:
    """Where the programs write their shares of the projection's gradient, [splits, B, heads, D, m], if there is one."""
    if projection is None:
        return None
    return projection.new_empty(splits, batch, *projection.shape, dtype=torch.float32)


def _options(
    kernel: str, x: Tensor, out_width: int, projection: Tensor | None, feature_map: str, per_channel: bool = False
) -> tuple[dict, int]:
    """`launch_options` on this device with the constants that the kernels share, and the programs per multiprocessor."""
    channels = None if projection is None else projection.shape[2]
    case = x.device, x.dtype, x.shape[3], out_width, feature_map, channels, per_channel
    return _kept_options(kernel, *case, in_force(OVERRIDES, kernel))


@lru_cache(maxsize=256)
def _kept_options(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    out_width: int,
    feature_map: str,
    channels: int | None,
    per_channel: bool,
    overrides: tuple,
) -> tuple[dict, int]:
    """overrides: those in force, for which no others may be kept."""
    target = target_of(device, INTERPRETED)
    options = launch_options(kernel, dtype, width, out_width, target, feature_map, channels, per_channel)
    per_sm = options.pop("PROGRAMS_PER_SM")
    return constants(feature_map, width, out_width, channels) | options, per_sm


def constants(feature_map: str, width: int, out_width: int, channels: int | None) -> dict:
    """What every kernel is told of the case; channels: of the projection, if there is one."""
    m = width if channels is None else channels
    return {
        "MAP": feature_map,
        "PROJECTED": channels is not None,
        "WIDTH": width,
        "CHANNELS": m,
        "FEATURES": maps.FEATURE_MAPS[feature_map].features(m),
        "OUT_WIDTH": out_width,
    }


def _splits(x: Tensor, programs: int, block_rows: int, per_sm: int) -> tuple[int, int]:
    """Split the tokens of x [B, N, heads, D] to fill the chip: number of splits, and rows (whole blocks) of each.

    programs: those of one split. per_sm: programs that a multiprocessor should get.
    """
    sms = multiprocessors(x.device, INTERPRETED)
    blocks = over(x.shape[1], block_rows)
    # without and with more programs than the usual number
    usual, least = (over(blocks, max(1, count * sms // programs)) for count in (PROGRAMS_PER_SM, per_sm))
    blocks_per_split = max(least, min(usual, BLOCKS_OF_MORE))
    return over(blocks, blocks_per_split), blocks_per_split * block_rows
