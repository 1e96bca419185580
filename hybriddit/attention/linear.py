"""Generalized linear attention (LinFusion, arXiv 2409.02097): non-causal, normalised, phi = elu + 1."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# One work item is up to 2048 rows of as many heads as keep it near 2 MB: it stays in cache between the passes over it.
CPU_ROWS, CPU_ELEMENTS = 2048, 2**19
# Elsewhere kernel launches cost more than cache misses; the bound only keeps temporaries small at very high resolution.
GPU_ROWS, GPU_ELEMENTS = 2**16, 2**28


def linear_attention(query: Tensor, key: Tensor, value: Tensor, *, eps: float = 1e-4, backend: str = "auto") -> Tensor:
    """phi(q) (phi(k)^T v / N) / (phi(q) . mean(phi(k)) + eps) per head, with phi = elu + 1 applied here.

    Time and memory are linear in the number of tokens. Sums over tokens are kept in float32 (float64 for float64).

    Args:
        query: [B, M, heads, D], raw projection. key: [B, N, heads, D], likewise. value: [B, N, heads, E].
        eps: added to the denominator.
        backend: "torch"; "auto" takes the fastest available; "triton" is not available yet.

    Returns [B, M, heads, E] in the value's dtype. Raises ValueError for inputs that do not fit together or an unknown
    backend, NotImplementedError for "triton".
    """
    if backend == "triton":
        raise NotImplementedError('backend "triton" is not available yet: use "auto" or "torch"')
    if backend not in ("auto", "torch"):
        raise ValueError(f'unknown linear attention backend {backend!r}: use "auto", "torch" or "triton"')
    _check(query, key, value)
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        query, key, value = (x.to(torch.get_autocast_dtype(device_type)) for x in (query, key, value))
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(
            f"attention takes floating-point tensors of one dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    return _linear_attention(query, key, value, eps)[0]


def _check(query, key, value):
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"linear attention takes [B, N, heads, D] tensors, got {_shapes(query, key, value)}")
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(f"query and key must agree in batch, heads and width, got {_shapes(query, key)}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key and value must agree in batch, tokens and heads, got {_shapes(key, value)}")
    if not query.device == key.device == value.device:
        raise ValueError(f"query, key and value are on {query.device}, {key.device} and {value.device}: use one device")


def _shapes(*tensors) -> str:
    # only for messages: torch.compile cannot print sizes it keeps symbolic
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def _phi(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x.clamp(max=0).exp_().add_(x.clamp(min=0))


def _phi_backward_(grad: Tensor, phi: Tensor) -> Tensor:
    return grad.mul_(phi.clamp_(max=1))  # phi' is 1 above zero and exp(x) = phi below; overwrites phi


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(x: Tensor):
    """The (batch, heads) index pairs of x [B, N, heads, D], and the row slices within each, sized for the cache."""
    batch, length, heads, width = x.shape
    rows, elements = (CPU_ROWS, CPU_ELEMENTS) if x.device.type == "cpu" else (GPU_ROWS, GPU_ELEMENTS)
    group = max(1, elements // (min(rows, max(length, 1)) * max(width, 1)))
    pairs = [(b, slice(h, h + group)) for b in range(batch) for h in range(0, heads, group)]
    return pairs, [slice(n, n + rows) for n in range(0, length, rows)]


def _rows(x: Tensor, b: int, heads: slice, rows: slice) -> Tensor:
    """A view [group, rows, D] of x [B, N, heads, D]."""
    return x[b, rows, heads].transpose(0, 1)


# Opaque operators: torch.compile sees one node each instead of unrolling the loops.
@torch.library.custom_op("hybriddit::linear_attention", mutates_args=())
def _linear_attention(query: Tensor, key: Tensor, value: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and what the backward needs: state [B, heads, D, E] = phi(k)^T v / N, mean [B, heads, D, 1]."""
    (batch, length, heads, width), dtype = key.shape, _state_dtype(key.dtype)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    state = query.new_zeros(batch, heads, width, value.shape[3], dtype=dtype)
    mean = query.new_zeros(batch, heads, width, 1, dtype=dtype)
    with torch.autocast(query.device.type, enabled=False):
        pairs, blocks = _blocks(key)
        for b, h in pairs:
            for rows in blocks:
                k = _phi(_rows(key, b, h, rows), dtype)
                state[b, h].baddbmm_(k.transpose(1, 2), _rows(value, b, h, rows).to(dtype), alpha=1 / length)
                mean[b, h].add_(k.sum(1).unsqueeze(-1), alpha=1 / length)
        pairs, blocks = _blocks(query)
        for b, h in pairs:
            for rows in blocks:
                q = _phi(_rows(query, b, h, rows), dtype)
                denominator = torch.bmm(q, mean[b, h]).add_(eps)
                torch.div(torch.bmm(q, state[b, h]), denominator, out=_rows(out, b, h, rows))
    return out, state, mean


@_linear_attention.register_fake
def _(query, key, value, eps):
    dtype = _state_dtype(key.dtype)
    batch, heads, width = key.shape[0], *key.shape[2:]
    return (
        query.new_empty(*query.shape[:3], value.shape[3]),
        query.new_empty(batch, heads, width, value.shape[3], dtype=dtype),
        query.new_empty(batch, heads, width, 1, dtype=dtype),
    )


@torch.library.custom_op("hybriddit::linear_attention_backward", mutates_args=())
def _linear_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    state: Tensor,
    mean: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    length, dtype = key.shape[1], state.dtype
    grads = [x.new_empty(x.shape) for x in (query, key, value)]
    grad_query, grad_key, grad_value = grads
    grad_state, grad_mean = torch.zeros_like(state), torch.zeros_like(mean)
    with torch.autocast(query.device.type, enabled=False):
        pairs, blocks = _blocks(query)
        for b, h in pairs:
            for rows in blocks:
                q, g, o = (_rows(x, b, h, rows) for x in (query, grad_out, out))
                q, g = _phi(q, dtype), g.to(dtype)
                denominator = torch.bmm(q, mean[b, h]).add_(eps)
                grad_denominator = (g * o).sum(-1, keepdim=True).div_(denominator).neg_()
                g = g / denominator
                grad_state[b, h].baddbmm_(q.transpose(1, 2), g)
                grad_mean[b, h].baddbmm_(q.transpose(1, 2), grad_denominator)
                grad_q = torch.bmm(g, state[b, h].transpose(1, 2)).addcmul_(
                    grad_denominator, mean[b, h].transpose(1, 2)
                )
                _rows(grad_query, b, h, rows).copy_(_phi_backward_(grad_q, q))
        grad_state.div_(max(length, 1))
        grad_mean.div_(max(length, 1))
        pairs, blocks = _blocks(key)
        for b, h in pairs:
            for rows in blocks:
                k, v = _phi(_rows(key, b, h, rows), dtype), _rows(value, b, h, rows).to(dtype)
                _rows(grad_value, b, h, rows).copy_(torch.bmm(k, grad_state[b, h]))
                grad_k = torch.baddbmm(grad_mean[b, h].transpose(1, 2), v, grad_state[b, h].transpose(1, 2))
                _rows(grad_key, b, h, rows).copy_(_phi_backward_(grad_k, k))
    return grad_query, grad_key, grad_value


@_linear_attention_backward.register_fake
def _(grad_out, query, key, value, out, state, mean, eps):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.eps = inputs[3]


def _backward(ctx, grad_out, grad_state, grad_mean):
    # grad_state and grad_mean are zero: `linear_attention` returns the output alone
    return *_linear_attention_backward(grad_out, *ctx.saved_tensors, ctx.eps), None


_linear_attention.register_autograd(_backward, setup_context=_setup_context)


# The counter cannot look into custom operators.
@register_flop_formula(torch.ops.hybriddit.linear_attention)
def _forward_flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs):
    batch, length, heads, width = key_shape
    out_width = value_shape[3]
    return 2 * batch * heads * width * (length * out_width + query_shape[1] * (out_width + 1))


@register_flop_formula(torch.ops.hybriddit.linear_attention_backward)
def _backward_flops(grad_shape, query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs):
    batch, length, heads, width = key_shape
    out_width = value_shape[3]
    return 2 * batch * heads * width * (2 * length * out_width + query_shape[1] * (2 * out_width + 2))
