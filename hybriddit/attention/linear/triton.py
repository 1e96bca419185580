"""Triton kernels of generalized linear attention: `formula.py`'s sums, with phi and the join fused in.

Each program sums its share of the rows in float32 and writes that to a place of its own; the shares are then added in a
fixed order, so that results are reproducible bit for bit. Token offsets are 64-bit. Tensors may have any strides (the
last dimension is made contiguous if it is not).
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

# Programs per multiprocessor: while one waits for memory, another computes.
PROGRAMS_PER_SM = 2
# The interpreter has no chip to fill: just enough programs to have several shares to add.
INTERPRETED_PROGRAMS = 6


@triton.jit
def _phi(x):
    return tl.where(x > 0, x + 1, tl.exp(x))  # NaN takes the second branch, and stays NaN


@triton.jit
def _load(pointers, valid, mask_width: tl.constexpr, width_mask):
    # no width_mask where the width is a whole block: it costs registers and prevents wide loads
    if mask_width:
        return tl.load(pointers, mask=valid & width_mask, other=0.0)
    return tl.load(pointers, mask=valid, other=0.0)


@triton.jit
def _columns(x, DOT: tl.constexpr):
    """Lay out x [n] as [n, 16] for a dot: column 0 is x rounded to DOT, column 1 the rounding error, the rest zero.

    The tensor cores then compute sums over rows or channels with the products, without a reduction across warps.
    """
    column = tl.arange(0, 16)[None, :]
    rounded = x.to(DOT).to(tl.float32)
    return tl.where(column == 0, rounded[:, None], tl.where(column == 1, (x - rounded)[:, None], 0.0)).to(DOT)


@triton.jit
def _sum_kernel(
    x,
    y,
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
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    SCALED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A split's share of state = sum_n f_n y_n^T and mean = sum_n row_weight_n f_n, times factor; f = row_scale phi(x).

    row_scale and row_weight are [B, heads, N] where SCALED, else 1; state is [splits, B, heads, D, E] and mean
    [splits, B, heads, D].
    """
    blocks: tl.constexpr = (OUT_WIDTH + BLOCK_E - 1) // BLOCK_E
    pair, split = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    pairs = (tl.num_programs(0) // blocks).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    e = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    x += (batch * x_batch + head * x_head) * UNIT
    y += (batch * y_batch + head * y_head) * UNIT
    total = tl.zeros((BLOCK_D, BLOCK_E), dtype=tl.float32)
    weight = tl.zeros((BLOCK_D, 16), dtype=tl.float32)
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
        features = _phi(x_rows.to(tl.float32))
        if SCALED:
            features *= tl.load(row_scale + pair * length + start + n, mask=n < length - start, other=0.0)[:, None]
            weights = tl.load(row_weight + pair * length + start + n, mask=n < length - start, other=0.0)
            weights = _columns(weights, DOT)
        else:
            features = tl.where(valid, features, 0.0)  # masked after phi, because phi(0) is 1
        features = tl.trans(features.to(DOT))
        weight = tl.dot(features, weights, weight, input_precision=PRECISION)
        total = tl.dot(features, y_rows.to(DOT), total, input_precision=PRECISION)
    out = split * pairs + pair
    state += (out * WIDTH + d[:, None]) * OUT_WIDTH + e[None, :]
    tl.store(state, total * factor, mask=(d[:, None] < WIDTH) & (e[None, :] < OUT_WIDTH))
    if tl.program_id(0) % blocks == 0:
        tl.store(mean + out * WIDTH + d, tl.sum(weight, axis=1) * factor, mask=d < WIDTH)


@triton.jit
def _output_kernel(
    query,
    state,
    mean,
    near,
    gate,
    out,
    length,
    heads,
    rows_per_split,
    eps,
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
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    JOIN: tl.constexpr,
    GATE_PER_ROW: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = phi(q) state / (phi(q) . mean + eps), joined to near where JOIN; out [B, N, heads, E] is contiguous."""
    blocks: tl.constexpr = (OUT_WIDTH + BLOCK_E - 1) // BLOCK_E
    pair, split = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    d = tl.arange(0, BLOCK_D)
    e = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e[None, :] < OUT_WIDTH
    query += (batch * q_batch + head * q_head) * UNIT
    out += batch * length * heads * OUT_WIDTH + head * OUT_WIDTH
    if JOIN:
        near += (batch * near_batch + head * near_head) * UNIT
        gate += batch * gate_batch + head * gate_head
    # channels beyond the width are zero in both sums, so phi's values there do not count
    sums = tl.load(
        state + (pair * WIDTH + d[:, None]) * OUT_WIDTH + e[None, :], mask=(d[:, None] < WIDTH) & inside, other=0.0
    ).to(DOT)
    means = _columns(tl.load(mean + pair * WIDTH + d, mask=d < WIDTH, other=0.0), DOT)
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
        features = _phi(q.to(tl.float32)).to(DOT)
        denominator = tl.sum(tl.dot(features, means, input_precision=PRECISION), axis=1) + eps
        result = tl.dot(features, sums, input_precision=PRECISION) / denominator[:, None]
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
    state,
    mean,
    grad_query,
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
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The query's gradient; and each row's scale and weight, from which `_sum_kernel` makes the state's gradient."""
    blocks: tl.constexpr = (OUT_WIDTH + BLOCK_E - 1) // BLOCK_E
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    grad_out += (batch * g_batch + head * g_head) * UNIT
    query += (batch * q_batch + head * q_head) * UNIT
    grad_query += batch * length * heads * WIDTH + head * WIDTH
    state += (pair * WIDTH + d[None, :]) * OUT_WIDTH + e[:, None]  # transposed
    means = _columns(tl.load(mean + pair * WIDTH + d, mask=d < WIDTH, other=0.0), DOT)
    if blocks == 1:
        sums = tl.load(state, mask=(d[None, :] < WIDTH) & (e[:, None] < OUT_WIDTH), other=0.0).to(DOT)
    n = tl.arange(0, BLOCK_N)  # 32 bits are enough within a block
    first = split * rows_per_split
    for step in range(tl.cdiv(tl.minimum(rows_per_split, length - first), BLOCK_N)):
        start = first + step * BLOCK_N
        valid = n[:, None] < length - start
        grad_features = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        for block in range(blocks):
            if blocks > 1:
                sums = tl.load(
                    state + block * BLOCK_E,
                    mask=(d[None, :] < WIDTH) & (block * BLOCK_E + e[:, None] < OUT_WIDTH),
                    other=0.0,
                ).to(DOT)
            g = _load(
                grad_out + start * g_row * UNIT + n[:, None] * (g_row * UNIT) + block * BLOCK_E + e[None, :],
                valid,
                OUT_WIDTH % BLOCK_E != 0,
                block * BLOCK_E + e[None, :] < OUT_WIDTH,
            )
            grad_features = tl.dot(g.to(DOT), sums, grad_features, input_precision=PRECISION)
        q = _load(
            query + start * q_row * UNIT + n[:, None] * (q_row * UNIT) + d[None, :],
            valid,
            WIDTH != BLOCK_D,
            d[None, :] < WIDTH,
        )
        q = q.to(tl.float32)
        features = _phi(q)
        scale = 1 / (tl.sum(tl.dot(features.to(DOT), means, input_precision=PRECISION), axis=1) + eps)
        # grad_out . out = phi(q) . (state grad_out) / denominator: the output itself is not needed
        weight = -tl.sum(features * grad_features, axis=1) * scale
        weights = tl.broadcast_to(weight[:, None], (BLOCK_N, 16)).to(DOT)
        grad = tl.dot(weights, tl.trans(means), grad_features, input_precision=PRECISION) * scale[:, None]
        grad = tl.where(q > 0, grad, grad * features)
        tl.store(
            grad_query + start * heads * WIDTH + n[:, None] * (heads * WIDTH) + d[None, :],
            grad.to(grad_query.dtype.element_ty),
            mask=valid & (d[None, :] < WIDTH),
        )
        tl.store(row_scale + pair * length + start + n, scale, mask=n < length - start)
        tl.store(row_weight + pair * length + start + n, weight, mask=n < length - start)


@triton.jit
def _state_backward_kernel(
    grad_state,
    grad_mean,
    key,
    value,
    grad_key,
    grad_value,
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
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_value = phi(k) grad_state, grad_key = phi'(k) (v grad_state^T + grad_mean), both times factor."""
    blocks: tl.constexpr = (OUT_WIDTH + BLOCK_E - 1) // BLOCK_E
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    key += (batch * k_batch + head * k_head) * UNIT
    value += (batch * v_batch + head * v_head) * UNIT
    grad_key += batch * length * heads * WIDTH + head * WIDTH
    grad_value += batch * length * heads * OUT_WIDTH + head * OUT_WIDTH
    grad_state += (pair * WIDTH + d[:, None]) * OUT_WIDTH + e[None, :]
    means = tl.load(grad_mean + pair * WIDTH + d, mask=d < WIDTH, other=0.0) * factor
    if blocks == 1:
        sums = tl.load(grad_state, mask=(d[:, None] < WIDTH) & (e[None, :] < OUT_WIDTH), other=0.0)
        sums = (sums * factor).to(DOT)
    n = tl.arange(0, BLOCK_N)  # 32 bits are enough within a block
    first = split * rows_per_split
    for step in range(tl.cdiv(tl.minimum(rows_per_split, length - first), BLOCK_N)):
        start = first + step * BLOCK_N
        valid = n[:, None] < length - start
        k = _load(
            key + start * k_row * UNIT + n[:, None] * (k_row * UNIT) + d[None, :],
            valid,
            WIDTH != BLOCK_D,
            d[None, :] < WIDTH,
        )
        features = _phi(k.to(tl.float32)).to(DOT)
        grad = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32) + means[None, :]
        for block in range(blocks):
            columns = block * BLOCK_E + e[None, :]
            if blocks > 1:
                sums = tl.load(
                    grad_state + block * BLOCK_E, mask=(d[:, None] < WIDTH) & (columns < OUT_WIDTH), other=0.0
                )
                sums = (sums * factor).to(DOT)
            tl.store(
                grad_value + start * heads * OUT_WIDTH + n[:, None] * (heads * OUT_WIDTH) + columns,
                tl.dot(features, sums, input_precision=PRECISION).to(grad_value.dtype.element_ty),
                mask=valid & (columns < OUT_WIDTH),
            )
            v = _load(
                value + start * v_row * UNIT + n[:, None] * (v_row * UNIT) + columns,
                valid,
                OUT_WIDTH % BLOCK_E != 0,
                columns < OUT_WIDTH,
            )
            grad = tl.dot(v.to(DOT), tl.trans(sums), grad, input_precision=PRECISION)
        # phi' is 1 above zero and phi below; at zero both are 1
        grad = tl.where(k.to(tl.float32) > 0, grad, grad * features.to(tl.float32))
        tl.store(
            grad_key + start * heads * WIDTH + n[:, None] * (heads * WIDTH) + d[None, :],
            grad.to(grad_key.dtype.element_ty),
            mask=valid & (d[None, :] < WIDTH),
        )


INTERPRETED = isinstance(_sum_kernel, InterpretedFunction)


def launch_options(kernel: str, dtype: torch.dtype, width: int, out_width: int, target: int | str) -> dict:
    """Block sizes, precision and compiler options of a kernel, by name, for head widths up to 256.

    target: 10 * major + minor of a CUDA compute capability, "hip", or "interpreter". The sizes are those that the
    compiler fits into registers and shared memory on every chip (tests/attention/linear/test_compile.py).
    """
    block_d, precise = max(16, triton.next_power_of_2(width)), dtype != torch.bfloat16
    block_e = min(max(16, triton.next_power_of_2(out_width)), 128)
    # wgmma takes 64 rows at a time; on other chips, and in backward kernels, 64 rows do not fit beside the state
    rows = 64 if target in (90, 100, 103) and not precise and kernel in ("sum", "output") else 32
    if block_d > 128:
        rows, block_e = 16, 16
    elif block_d == 128:
        if dtype == torch.float32 or (target == "hip" and (precise or kernel == "output_backward")):
            rows, block_e = 16, min(block_e, 64)
        elif precise and kernel.endswith("backward"):
            rows = 16
    options = {"BLOCK_D": block_d, "BLOCK_E": block_e, "BLOCK_N": rows}
    if target == "interpreter":  # the interpreter's bfloat16 products are wrong
        return options | {"DOT": tl.float32, "PRECISION": "ieee"}
    if precise:
        # float16 runs as tf32, which has the same 10 bits and float32's range: sums of products overflow float16
        precision = "tf32" if dtype == torch.float16 else "tf32x3"
        options |= {"DOT": tl.float32, "PRECISION": "ieee" if target == "hip" else precision}
    else:
        options |= {"DOT": tl.bfloat16, "PRECISION": "ieee"}
    warps = 4 if target == "hip" else 8
    # a state that is reloaded for every block of rows is too large to prefetch
    stages = 1 if block_e < out_width else 3 if rows == 64 and kernel == "sum" else 2
    if kernel == "sum" and target in (100, 103) and triton.__version__.startswith(("3.6", "3.7", "3.8")):
        stages = 1  # Triton 3.6 fails to overlap loads with two products there, 3.9 does not
    return options | {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def state(
    key: Tensor, value: Tensor, projection: Tensor | None, key_mask: Tensor | None, feature_map: str
) -> tuple[Tensor, Tensor]:
    """The sums over the keys: see `dispatch`'s operators of these names."""
    weight = None
    if key_mask is not None:
        weight = key_mask[:, None].float().expand(-1, key.shape[2], -1).contiguous()  # [B, heads, N]
    return _sums(key, value, weight, weight, 1 / max(key.shape[1], 1))


def output(
    query: Tensor,
    state: Tensor,
    mean: Tensor,
    near: Tensor | None,
    gate: Tensor | None,
    projection: Tensor | None,
    eps: float,
    feature_map: str,
) -> Tensor:
    batch, length, heads, width = query.shape
    out = query.new_empty(batch, length, heads, state.shape[3])
    if out.numel() == 0:
        return out
    (query, near), unit = _with_unit(query, near)
    gate = None if gate is None else gate.expand(out.shape)
    options = _options("output", query, state.shape[3])
    blocks = triton.cdiv(state.shape[3], options["BLOCK_E"])
    splits, rows_per_split = _splits(query, batch * heads * blocks, options["BLOCK_N"])
    with _device(query):
        _output_kernel[batch * heads * blocks, splits](
            query,
            state.contiguous(),
            mean.contiguous(),
            out if near is None else near,
            out if near is None else gate,
            out,
            length,
            heads,
            rows_per_split,
            eps,
            *_strides(query, unit),
            *((0, 0, 0) if near is None else _strides(near, unit)),
            *((0, 0, 0, 0) if near is None else gate.stride()),
            WIDTH=width,
            OUT_WIDTH=state.shape[3],
            UNIT=unit,
            JOIN=near is not None,
            GATE_PER_ROW=near is not None and gate.stride(3) == 0,
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
    batch, length, heads, width = query.shape
    grad_query = query.new_empty(query.shape)
    if grad_out.numel() == 0:
        return grad_query.zero_(), torch.zeros_like(state), torch.zeros_like(mean), None
    row_scale, row_weight = query.new_empty(2, batch, heads, length, dtype=torch.float32)
    (grad_out, query), unit = _with_unit(grad_out, query)
    options = _options("output_backward", query, state.shape[3])
    splits, rows_per_split = _splits(query, batch * heads, options["BLOCK_N"])
    with _device(query):
        _output_backward_kernel[batch * heads, splits](
            grad_out,
            query,
            state.contiguous(),
            mean.contiguous(),
            grad_query,
            row_scale,
            row_weight,
            length,
            heads,
            rows_per_split,
            eps,
            *_strides(grad_out, unit),
            *_strides(query, unit),
            WIDTH=width,
            OUT_WIDTH=state.shape[3],
            UNIT=unit,
            **options,
        )
    return grad_query, *_sums(query, grad_out, row_scale, row_weight, 1.0), None


def state_backward(
    grad_state: Tensor,
    grad_mean: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor | None,
    key_mask: Tensor | None,
    feature_map: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    batch, length, heads, width = key.shape
    grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
    if key.numel() == 0 or value.numel() == 0:
        return grad_key.zero_(), grad_value.zero_(), None
    (key, value), unit = _with_unit(key, value)
    options = _options("state_backward", key, value.shape[3])
    splits, rows_per_split = _splits(key, batch * heads, options["BLOCK_N"])
    with _device(key):
        _state_backward_kernel[batch * heads, splits](
            grad_state.contiguous(),
            grad_mean.contiguous(),
            key,
            value,
            grad_key,
            grad_value,
            length,
            heads,
            rows_per_split,
            1 / length,
            *_strides(key, unit),
            *_strides(value, unit),
            WIDTH=width,
            OUT_WIDTH=value.shape[3],
            UNIT=unit,
            **options,
        )
    if key_mask is not None:
        for grad in (grad_key, grad_value):
            grad.masked_fill_(~key_mask[:, :, None, None], 0)
    return grad_key, grad_value, None


def _sums(
    x: Tensor, y: Tensor, row_scale: Tensor | None, row_weight: Tensor | None, factor: float
) -> tuple[Tensor, Tensor]:
    """Run `_sum_kernel` and add up its shares: [B, heads, D, E] and [B, heads, D, 1] in float32."""
    (batch, length, heads, width), out_width = x.shape, y.shape[3]
    if x.numel() == 0 or y.numel() == 0:
        return x.new_zeros(batch, heads, width, out_width, dtype=torch.float32), x.new_zeros(
            batch, heads, width, 1, dtype=torch.float32
        )
    (x, y), unit = _with_unit(x, y)
    options = _options("sum", x, out_width)
    blocks = triton.cdiv(out_width, options["BLOCK_E"])
    splits, rows_per_split = _splits(x, batch * heads * blocks, options["BLOCK_N"])
    state = x.new_empty(splits, batch, heads, width, out_width, dtype=torch.float32)
    mean = x.new_empty(splits, batch, heads, width, 1, dtype=torch.float32)
    with _device(x):
        _sum_kernel[batch * heads * blocks, splits](
            x,
            y,
            mean if row_scale is None else row_scale,
            mean if row_weight is None else row_weight,
            state,
            mean,
            length,
            heads,
            rows_per_split,
            factor,
            *_strides(x, unit),
            *_strides(y, unit),
            WIDTH=width,
            OUT_WIDTH=out_width,
            UNIT=unit,
            SCALED=row_scale is not None,
            **options,
        )
    return (state.squeeze(0), mean.squeeze(0)) if splits == 1 else (state.sum(0), mean.sum(0))


def _options(kernel: str, x: Tensor, out_width: int) -> dict:
    if INTERPRETED:
        target = "interpreter"
    elif torch.version.hip:
        target = "hip"
    else:
        major, minor = torch.cuda.get_device_capability(x.device)
        target = 10 * major + minor
    return launch_options(kernel, x.dtype, x.shape[3], out_width, target)


def _splits(x: Tensor, programs: int, block_rows: int) -> tuple[int, int]:
    """Split the tokens of x [B, N, heads, D] to fill the chip: number of splits, and rows (whole blocks) of each."""
    if INTERPRETED:
        wanted = INTERPRETED_PROGRAMS
    else:
        wanted = PROGRAMS_PER_SM * torch.cuda.get_device_properties(x.device).multi_processor_count
    blocks = triton.cdiv(x.shape[1], block_rows)
    blocks_per_split = triton.cdiv(blocks, max(1, wanted // programs))
    return triton.cdiv(blocks, blocks_per_split), blocks_per_split * block_rows


def _with_unit(*tensors: Tensor | None) -> tuple[list[Tensor | None], int]:
    """The tensors with a contiguous last dimension, and the unit of their strides: 8 if it divides all others, else 1.

    Kernels are given strides in that unit: the compiler detects divisibility by 16 only, and would give up wide loads
    where the head width is 72.
    """
    tensors = [x if x is None or (x.stride(3) == 1 and x.stride(1) < 2**24) else x.contiguous() for x in tensors]
    aligned = all(
        x is None or (x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3])) for x in tensors
    )
    return tensors, 8 if aligned else 1


def _strides(x: Tensor, unit: int) -> list[int]:
    """Strides of batch, token and head, in this unit."""
    return [stride // unit for stride in x.stride()[:3]]


def _device(x: Tensor):
    # Triton launches on the current device, wherever the tensors are
    return contextlib.nullcontext() if x.device.type == "cpu" else torch.cuda.device(x.device)
