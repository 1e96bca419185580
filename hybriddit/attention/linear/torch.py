"""The passes of linear attention in plain torch: for CPUs, and for float64 on any device.

They compute the sums of `formula.py` in blocks of rows that stay in cache; sums over tokens are in at least float32.
Gradients are written by hand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs import sum_dtype

# A work item has up to 2048 rows, of as many heads as fit in about 2 MB: it stays in cache between the passes over it.
CPU_ROWS, CPU_ELEMENTS = 2048, 2**19
# Elsewhere kernel launches cost more than cache misses; the bound only keeps temporaries small at very high resolution.
GPU_ROWS, GPU_ELEMENTS = 2**16, 2**28
# CPU instruction sets that multiply bfloat16 several times faster than float32.
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def state(
    key: Tensor, value: Tensor, projection: Tensor | None, key_mask: Tensor | None, feature_map: str
) -> tuple[Tensor, Tensor]:
    """The sums over the keys: see `dispatch`'s operators of these names."""
    (batch, length, heads, width), dtype = key.shape, sum_dtype(key.dtype)
    sums = key.new_zeros(batch, heads, width, value.shape[3], dtype=dtype)
    mean = key.new_zeros(batch, heads, width, 1, dtype=dtype)
    pairs, blocks = _blocks(key)
    with torch.autocast(key.device.type, enabled=False):
        for b, h in pairs:
            for rows in blocks:
                k = _features(_rows(key, b, h, rows), dtype)
                if key_mask is not None:
                    k *= key_mask[b, rows, None]
                sums[b, h].baddbmm_(k.transpose(1, 2), _rows(value, b, h, rows).to(dtype), alpha=1 / length)
                mean[b, h].add_(k.sum(1).unsqueeze(-1), alpha=1 / length)
    return sums, mean


def state_backward(
    grad_state: Tensor,
    grad_mean: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor | None,
    key_mask: Tensor | None,
    feature_map: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    length, dtype = max(key.shape[1], 1), grad_state.dtype
    grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
    grad_state, grad_mean = grad_state / length, grad_mean / length
    read_state = grad_state.to(_product_dtype(value))
    pairs, blocks = _blocks(key)
    with torch.autocast(key.device.type, enabled=False):
        for b, h in pairs:
            for rows in blocks:
                k, v = _features(_rows(key, b, h, rows), dtype), _rows(value, b, h, rows).to(dtype)
                if key_mask is not None:
                    k *= key_mask[b, rows, None]
                _product(k, read_state[b, h], _rows(grad_value, b, h, rows))
                grad_k = torch.baddbmm(grad_mean[b, h].transpose(1, 2), v, grad_state[b, h].transpose(1, 2))
                _times_slope(grad_k, k, _rows(grad_key, b, h, rows))
    return grad_key, grad_value, None


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
    dtype = state.dtype
    out = query.new_empty(*query.shape[:3], state.shape[3])
    gate = None if gate is None else gate.expand(out.shape)
    read_state = state.to(_product_dtype(query))
    pairs, blocks = _blocks(query)
    with torch.autocast(query.device.type, enabled=False):
        for b, h in pairs:
            for rows in blocks:
                q = _features(_rows(query, b, h, rows), dtype)
                q.div_(_dot(q, mean[b, h]).add_(eps))
                o = _rows(out, b, h, rows)
                if near is None:
                    _product(q, read_state[b, h], o)
                else:
                    far = torch.bmm(q.to(read_state.dtype), read_state[b, h])
                    beside, opening = _rows(near, b, h, rows), _rows(gate, b, h, rows)
                    o.copy_(torch.lerp(*(x.to(dtype) for x in (beside, far, opening))))
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
    dtype = state.dtype
    grad_query = query.new_empty(query.shape)
    grad_state, grad_mean = torch.zeros_like(state), torch.zeros_like(mean)
    pairs, blocks = _blocks(query)
    with torch.autocast(query.device.type, enabled=False):
        for b, h in pairs:
            for rows in blocks:
                q, g = _features(_rows(query, b, h, rows), dtype), _rows(grad_out, b, h, rows).to(dtype)
                denominator = _dot(q, mean[b, h]).add_(eps)
                g = g / denominator
                grad_q = torch.bmm(g, state[b, h].transpose(1, 2))
                # the output is not needed: grad_out . out = phi(q) . (state grad_out) / denominator
                grad_denominator = (grad_q * q).sum(-1, keepdim=True).div_(denominator).neg_()
                grad_state[b, h].baddbmm_(q.transpose(1, 2), g)
                grad_mean[b, h].transpose(1, 2).baddbmm_(grad_denominator.transpose(1, 2), q)
                grad_q.addcmul_(grad_denominator, mean[b, h].transpose(1, 2))
                _times_slope(grad_q, q, _rows(grad_query, b, h, rows))
    return grad_query, grad_state, grad_mean, None


def _features(x: Tensor, dtype: torch.dtype) -> Tensor:
    """phi(x) = elu(x) + 1, in this dtype."""
    x = x.to(dtype)
    # exp(min(x, 0)) in one pass: on a CPU it takes a third of the time of clamp and exp
    slope = torch.ops.aten.elu_backward(x.new_ones(()).expand_as(x), 1, 1, 1, False, x)
    return slope.add_(x.clamp(min=0))


def _times_slope(grad: Tensor, phi: Tensor, out: Tensor) -> None:
    """Write grad * phi'(x) to `out`, given phi(x), which is overwritten.

    phi' is 1 above zero and exp(x) = phi(x) below; at zero both are 1.
    """
    torch.mul(grad, phi.clamp_(max=1), out=out)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products that sum over channels, for tensors like x."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        if any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS):
            return torch.bfloat16
    return sum_dtype(x.dtype)


def _product(x: Tensor, y: Tensor, out: Tensor) -> None:
    if out.dtype == y.dtype:
        torch.bmm(x.to(y.dtype), y, out=out)
    else:
        out.copy_(torch.bmm(x.to(y.dtype), y))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """x y, [group, rows, D] and [group, D, 1] -> [group, rows, 1], as (yᵀ xᵀ)ᵀ: three times as fast on a CPU."""
    return torch.bmm(y.transpose(1, 2), x.transpose(1, 2)).transpose(1, 2)


def _blocks(x: Tensor):
    """Cut x [B, N, heads, D] to fit the cache: a list of (batch index, head slice), and the row slices of each."""
    batch, length, heads, width = x.shape
    rows, elements = (CPU_ROWS, CPU_ELEMENTS) if x.device.type == "cpu" else (GPU_ROWS, GPU_ELEMENTS)
    group = max(1, elements // (min(rows, max(length, 1)) * max(width, 1)))
    pairs = [(b, slice(h, h + group)) for b in range(batch) for h in range(0, heads, group)]
    return pairs, [slice(n, n + rows) for n in range(0, length, rows)]


def _rows(x: Tensor, b: int, heads: slice, rows: slice) -> Tensor:
    """A view [group, rows, D] of x [B, N, heads, D]."""
    return x[b, rows, heads].transpose(0, 1)
