"""Generalized linear attention (LinFusion, arXiv 2409.02097): non-causal, normalised, phi = elu + 1.

Two passes, each an operator of its own: `linear_state` sums over the keys, `linear_output` reads the sums for every
query, and can join the result to another branch on the way out.
"""

from __future__ import annotations

import operator
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .trial import triton_requirements, trouble, warn_once

# One work item is up to 2048 rows of as many heads as keep it near 2 MB: it stays in cache between the passes over it.
CPU_ROWS, CPU_ELEMENTS = 2048, 2**19
# Elsewhere kernel launches cost more than cache misses; the bound only keeps temporaries small at very high resolution.
GPU_ROWS, GPU_ELEMENTS = 2**16, 2**28
# Any of these multiplies bfloat16 several times faster than float32.
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
# The feature maps, and a raw key whose features are zero.
FEATURE_MAPS = {"elu": float("-inf")}
# What the Triton kernels are written for.
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON_MAX_WIDTH = 256


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    near: Tensor | None = None,
    gate: Tensor | None = None,
    key_mask: Tensor | None = None,
    feature_map: str = "elu",
    eps: float = 1e-4,
    backend: str = "auto",
) -> Tensor:
    """phi(q) (phi(k)^T v / N) / (phi(q) . mean(phi(k)) + eps) per head, with phi = elu + 1 applied here.

    Time and memory are linear in the number of tokens. Sums over tokens are kept in float32 (float64 for float64).

    Args:
        query: [B, M, heads, D], raw projection. key: [B, N, heads, D], likewise. value: [B, N, heads, E].
        near, gate: join the result to another branch: near + gate * (result - near), without a pass of its own. near
            [B, M, heads, E], gate of any dtype and broadcastable to that; both or neither.
        key_mask: bool [B, N], False for keys that are left out, as if they were not among the N.
        feature_map: phi, a name of FEATURE_MAPS.
        eps: added to the denominator.
        backend: "triton" (a GPU, or Triton's interpreter; bfloat16, float16 or float32, widths up to 256) or "torch";
            "auto" takes Triton's kernels on a GPU. Their first use there tries a small case; if that fails, it warns and
            takes torch.

    Returns [B, M, heads, E] in the value's dtype. Raises ValueError for inputs that do not fit together, and for a
    backend that is unknown or cannot do the case.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f'unknown linear attention backend {backend!r}: use "auto", "torch" or "triton"')
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"unknown feature map {feature_map!r}: use one of {', '.join(FEATURE_MAPS)}")
    _check(query, key, value, near, gate, key_mask)
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
        near = None if near is None else near.to(dtype)
    tensors = (query, key, value) if near is None else (query, key, value, near)
    if any(x.dtype != query.dtype for x in tensors) or not query.is_floating_point():
        raise ValueError(
            "attention takes floating-point tensors of one dtype, got " + ", ".join(str(x.dtype) for x in tensors)
        )
    tensors = [x for x in (query, key, value, near, gate) if x is not None]
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    triton = False
    if backend == "triton" or (backend == "auto" and device_type == "cuda"):
        # plain ints: torch.compile may hold sizes as symbols
        widths = operator.index(query.shape[3]), operator.index(value.shape[3])
        case = (backend, query.device, query.dtype, *widths, gradients)
        if torch.compiler.is_compiling():
            from .tracing import constant

            triton = constant(_takes_triton, *case)
        else:
            triton = _takes_triton(*case)
    if key_mask is not None:
        key = key.masked_fill(~key_mask[:, :, None, None], FEATURE_MAPS[feature_map])
    state, mean = _linear_state(key, value, triton)
    if key_mask is not None:  # means over the keys that are left
        share = key.shape[1] / key_mask.sum(1, dtype=state.dtype)[:, None, None, None]
        state, mean = state * share, mean * share
    if near is not None and gradients and not triton:
        # kept for the backward: computing it again there, as on a GPU, costs a CPU a fifth of the time
        far = _linear_output(query, state, mean, None, None, eps, triton)
        return near + gate.to(near.dtype) * (far - near)
    return _linear_output(query, state, mean, near, gate, eps, triton)


def _takes_triton(*case) -> bool:
    """Whether the Triton kernels run. ValueError where they are named and cannot."""
    return _kept_takes_triton(*case)


@lru_cache(maxsize=64)
def _kept_takes_triton(
    backend: str, device: torch.device, dtype: torch.dtype, width: int, value_width: int, gradients: bool
) -> bool:
    reason = triton_refusal(device.type, dtype, max(width, value_width))
    if reason is None and device.type == "cuda":
        shapes = [(1, 70, 2, width), (1, 90, 2, width), (1, 90, 2, value_width)]
        reason = trouble(_in_triton, _in_torch, shapes, device, dtype, gradients)
        if reason and backend == "auto":
            warn_once(f"linear attention does not use triton: {reason}")
    if reason and backend == "triton":
        raise ValueError(f'backend "triton" cannot run this: {reason}; use backend "auto"')
    return reason is None


def _in_triton(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _linear_output(query, *_linear_state(key, value, True), None, None, 1e-4, True)


def _in_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _linear_output(query, *_linear_state(key, value, False), None, None, 1e-4, False)


def triton_refusal(device_type: str, dtype: torch.dtype, width: int) -> str | None:
    """Why the Triton kernels cannot take tensors of this head width, or None."""
    if dtype not in TRITON_DTYPES:
        return f"its kernels take bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    if width > TRITON_MAX_WIDTH:
        return f"its kernels take head widths up to {TRITON_MAX_WIDTH}, not {width}"
    try:
        from . import linear_triton
    except ImportError:
        return "it is not installed"
    if linear_triton.INTERPRETED:
        return None
    if device_type != "cuda":
        return f"it needs a GPU (or TRITON_INTERPRET=1, to try it), and the tensors are on {device_type}"
    missing = triton_requirements()
    return f"it needs {' and '.join(missing)}" if missing else None


def _check(query, key, value, near, gate, key_mask):
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"linear attention takes [B, N, heads, D] tensors, got {_shapes(query, key, value)}")
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(f"query and key must agree in batch, heads and width, got {_shapes(query, key)}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key and value must agree in batch, tokens and heads, got {_shapes(key, value)}")
    if (near is None) != (gate is None):
        raise ValueError("near and gate come together: pass both or neither")
    if near is not None and near.shape != (*query.shape[:3], value.shape[3]):
        raise ValueError(f"near must have the result's shape, one of {_shapes(query, value)}, got {_shapes(near)}")
    if near is not None and not _broadcasts(gate.shape, near.shape):
        raise ValueError(f"gate must broadcast to near, got {_shapes(gate, near)}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != key.shape[:2]):
        raise ValueError(f"key_mask must be bool {tuple(key.shape[:2])}, got {key_mask.dtype} {_shapes(key_mask)}")
    devices = [x.device for x in (query, key, value, near, gate, key_mask) if x is not None]
    if any(device != devices[0] for device in devices):
        raise ValueError(f"attention inputs are on several devices ({', '.join(map(str, devices))}): use one device")


def _broadcasts(shape, target) -> bool:
    return len(shape) <= len(target) and all(
        size in (1, full) for size, full in zip(reversed(shape), reversed(target), strict=False)
    )


def _shapes(*tensors) -> str:
    # only for messages: torch.compile cannot print sizes it keeps symbolic
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# Opaque operators: torch.compile sees one node each instead of unrolling the loops, and the state may be summed over
# several devices between them.
@torch.library.custom_op("hybriddit::linear_state", mutates_args=())
def _linear_state(key: Tensor, value: Tensor, triton: bool) -> tuple[Tensor, Tensor]:
    """state [B, heads, D, E] = phi(k)^T v / N and mean [B, heads, D, 1] of phi(k), in at least float32."""
    return (_triton().state if triton else _state)(key, value)


@torch.library.custom_op("hybriddit::linear_state_backward", mutates_args=())
def _linear_state_backward(
    grad_state: Tensor, grad_mean: Tensor, key: Tensor, value: Tensor, triton: bool
) -> tuple[Tensor, Tensor]:
    return (_triton().state_backward if triton else _state_backward)(grad_state, grad_mean, key, value)


@torch.library.custom_op("hybriddit::linear_output", mutates_args=())
def _linear_output(
    query: Tensor,
    state: Tensor,
    mean: Tensor,
    near: Tensor | None,
    gate: Tensor | None,
    eps: float,
    triton: bool,
) -> Tensor:
    return (_triton().output if triton else _output)(query, state, mean, near, gate, eps)


@torch.library.custom_op("hybriddit::linear_output_backward", mutates_args=())
def _linear_output_backward(
    grad_out: Tensor, query: Tensor, state: Tensor, mean: Tensor, eps: float, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (_triton().output_backward if triton else _output_backward)(grad_out, query, state, mean, eps)


def _triton():
    from . import linear_triton

    return linear_triton


@_linear_state.register_fake
def _(key, value, triton):
    (batch, _, heads, width), dtype = key.shape, _state_dtype(key.dtype)
    return (
        key.new_empty(batch, heads, width, value.shape[3], dtype=dtype),
        key.new_empty(batch, heads, width, 1, dtype=dtype),
    )


@_linear_state_backward.register_fake
def _(grad_state, grad_mean, key, value, triton):
    return key.new_empty(key.shape), value.new_empty(value.shape)


@_linear_output.register_fake
def _(query, state, mean, near, gate, eps, triton):
    return query.new_empty(*query.shape[:3], state.shape[3])


@_linear_output_backward.register_fake
def _(grad_out, query, state, mean, eps, triton):
    return query.new_empty(query.shape), state.new_empty(state.shape), mean.new_empty(mean.shape)


def _save_state(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.triton = inputs[2]


def _state_autograd(ctx, grad_state, grad_mean):
    return *_linear_state_backward(grad_state, grad_mean, *ctx.saved_tensors, ctx.triton), None


def _save_output(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.eps, ctx.triton = inputs[5:]


def _output_autograd(ctx, grad_out):
    query, state, mean, near, gate = ctx.saved_tensors
    grad_near = grad_gate = None
    if near is not None:
        # computed again rather than kept: the join's own memory is then nothing
        far = _linear_output(query, state, mean, None, None, ctx.eps, ctx.triton)
        dtype = torch.promote_types(gate.dtype, far.dtype)
        grad_gate = (grad_out.to(dtype) * (far.to(dtype) - near)).sum_to_size(gate.shape).to(gate.dtype)
        grad_far = (gate * grad_out).to(far.dtype)
        grad_near, grad_out = grad_out - grad_far, grad_far
    grads = _linear_output_backward(grad_out, query, state, mean, ctx.eps, ctx.triton)
    return *grads, grad_near, grad_gate, None, None


_linear_state.register_autograd(_state_autograd, setup_context=_save_state)
_linear_output.register_autograd(_output_autograd, setup_context=_save_output)


# The passes in plain torch: the reference of the kernels, and the path of the CPU and of float64.


def _phi(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    # exp(min(x, 0)) in one pass: on a CPU a third of what clamp and exp take
    slope = torch.ops.aten.elu_backward(x.new_ones(()).expand_as(x), 1, 1, 1, False, x)
    return slope.add_(x.clamp(min=0))


def _phi_backward(grad: Tensor, phi: Tensor, out: Tensor) -> None:
    torch.mul(grad, phi.clamp_(max=1), out=out)  # phi' is 1 above zero and exp(x) = phi below; overwrites phi


def _product_dtype(x: Tensor) -> torch.dtype:
    """Of products that sum over channels, for tensors like x; sums over tokens are never in less than float32."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        if any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS):
            return torch.bfloat16
    return _state_dtype(x.dtype)


def _product(x: Tensor, y: Tensor, out: Tensor) -> None:
    if out.dtype == y.dtype:
        torch.bmm(x.to(y.dtype), y, out=out)
    else:
        out.copy_(torch.bmm(x.to(y.dtype), y))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """[group, rows, D] and [group, D, 1] -> [group, rows, 1]; the other way round a CPU takes three times as long."""
    return torch.bmm(y.transpose(1, 2), x.transpose(1, 2)).transpose(1, 2)


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


def _state(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    (batch, length, heads, width), dtype = key.shape, _state_dtype(key.dtype)
    state = key.new_zeros(batch, heads, width, value.shape[3], dtype=dtype)
    mean = key.new_zeros(batch, heads, width, 1, dtype=dtype)
    pairs, blocks = _blocks(key)
    with torch.autocast(key.device.type, enabled=False):
        for b, h in pairs:
            for rows in blocks:
                k = _phi(_rows(key, b, h, rows), dtype)
                state[b, h].baddbmm_(k.transpose(1, 2), _rows(value, b, h, rows).to(dtype), alpha=1 / length)
                mean[b, h].add_(k.sum(1).unsqueeze(-1), alpha=1 / length)
    return state, mean


def _state_backward(grad_state: Tensor, grad_mean: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    length, dtype = max(key.shape[1], 1), grad_state.dtype
    grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
    grad_state, grad_mean = grad_state / length, grad_mean / length
    read_state = grad_state.to(_product_dtype(value))
    pairs, blocks = _blocks(key)
    with torch.autocast(key.device.type, enabled=False):
        for b, h in pairs:
            for rows in blocks:
                k, v = _phi(_rows(key, b, h, rows), dtype), _rows(value, b, h, rows).to(dtype)
                _product(k, read_state[b, h], _rows(grad_value, b, h, rows))
                grad_k = torch.baddbmm(grad_mean[b, h].transpose(1, 2), v, grad_state[b, h].transpose(1, 2))
                _phi_backward(grad_k, k, _rows(grad_key, b, h, rows))
    return grad_key, grad_value


def _output(query: Tensor, state: Tensor, mean: Tensor, near: Tensor | None, gate: Tensor | None, eps: float) -> Tensor:
    dtype = state.dtype
    out = query.new_empty(*query.shape[:3], state.shape[3])
    gate = None if gate is None else gate.expand(out.shape)
    read_state = state.to(_product_dtype(query))
    pairs, blocks = _blocks(query)
    with torch.autocast(query.device.type, enabled=False):
        for b, h in pairs:
            for rows in blocks:
                q = _phi(_rows(query, b, h, rows), dtype)
                q.div_(_dot(q, mean[b, h]).add_(eps))
                o = _rows(out, b, h, rows)
                if near is None:
                    _product(q, read_state[b, h], o)
                else:
                    far = torch.bmm(q.to(read_state.dtype), read_state[b, h])
                    beside, opening = _rows(near, b, h, rows), _rows(gate, b, h, rows)
                    o.copy_(torch.lerp(*(x.to(dtype) for x in (beside, far, opening))))
    return out


def _output_backward(
    grad_out: Tensor, query: Tensor, state: Tensor, mean: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state.dtype
    grad_query = query.new_empty(query.shape)
    grad_state, grad_mean = torch.zeros_like(state), torch.zeros_like(mean)
    pairs, blocks = _blocks(query)
    with torch.autocast(query.device.type, enabled=False):
        for b, h in pairs:
            for rows in blocks:
                q, g = _phi(_rows(query, b, h, rows), dtype), _rows(grad_out, b, h, rows).to(dtype)
                denominator = _dot(q, mean[b, h]).add_(eps)
                g = g / denominator
                grad_q = torch.bmm(g, state[b, h].transpose(1, 2))
                # the output is not needed: grad_out . out = phi(q) . (state grad_out) / denominator
                grad_denominator = (grad_q * q).sum(-1, keepdim=True).div_(denominator).neg_()
                grad_state[b, h].baddbmm_(q.transpose(1, 2), g)
                grad_mean[b, h].transpose(1, 2).baddbmm_(grad_denominator.transpose(1, 2), q)
                grad_q.addcmul_(grad_denominator, mean[b, h].transpose(1, 2))
                _phi_backward(grad_q, q, _rows(grad_query, b, h, rows))
    return grad_query, grad_state, grad_mean


# The counter cannot look into custom operators; products alone are counted.
@register_flop_formula(torch.ops.hybriddit.linear_state)
def _state_flops(key_shape, value_shape, *args, out_shape=None, **kwargs):
    batch, length, heads, width = key_shape
    return 2 * batch * heads * length * width * value_shape[3]


@register_flop_formula(torch.ops.hybriddit.linear_state_backward)
def _state_backward_flops(grad_state_shape, grad_mean_shape, key_shape, value_shape, *args, **kwargs):
    return 2 * _state_flops(key_shape, value_shape)


@register_flop_formula(torch.ops.hybriddit.linear_output)
def _output_flops(query_shape, state_shape, *args, out_shape=None, **kwargs):
    batch, length, heads, width = query_shape
    return 2 * batch * heads * length * width * (state_shape[3] + 1)


@register_flop_formula(torch.ops.hybriddit.linear_output_backward)
def _output_backward_flops(grad_out_shape, query_shape, state_shape, *args, out_shape=None, **kwargs):
    return 2 * _output_flops(query_shape, state_shape)
