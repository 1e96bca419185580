"""Generalized linear attention: checks, choice of backend, and the operators that torch.compile and autograd see.

There are two passes, each a custom operator: `linear_state` sums over the keys; `linear_output` applies the sums to
every query, and can join the result with another branch as it writes it. `formula.py` has the formula; `torch.py` and
`triton.py` implement the passes.
"""

from __future__ import annotations

import operator
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..inputs import autocast, check_device, check_dtype, check_mask, shapes, sum_dtype
from ..trial import failure_reason, triton_requirements, warn_once
from . import torch as torch_passes
from .features import FEATURE_MAPS
from .formula import linear_attention_formula

# The dtypes that the Triton kernels support.
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
    """Generalized linear attention (LinFusion, arXiv 2409.02097; not causal).

    Per head it is phi(q) (phi(k)^T v / N) / (phi(q) . mean(phi(k)) + eps); phi, by default elu + 1, is applied here.
    Time and memory are linear in the number of tokens. Sums over tokens are kept in float32 (float64 for float64).
    `formula.linear_attention_formula` is the same in a few lines.

    Args:
        query: [B, M, heads, D], raw projection. key: [B, N, heads, D], likewise. value: [B, N, heads, E].
        near, gate: return near + gate * (result - near) instead, computed in the same pass. near [B, M, heads, E],
            gate of any dtype and broadcastable to that; both or neither.
        key_mask: bool [B, N], False for keys that are left out and not counted in N.
        feature_map: phi, a key of `features.FEATURE_MAPS`. One that the backends lack is computed by the formula.
        eps: added to the denominator.
        backend: "triton" (a GPU, or Triton's interpreter; bfloat16, float16 or float32, widths up to 256) or "torch";
            "auto" takes Triton's kernels on a GPU. Their first use there tries a small case; if that fails, it warns
            and takes torch.

    Returns [B, M, heads, E] in the value's dtype. Raises ValueError for inputs that do not fit together, and for a
    backend that is unknown or cannot do the case.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f'unknown linear attention backend {backend!r}: use "auto", "torch" or "triton"')
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"unknown feature map {feature_map!r}: use one of {', '.join(FEATURE_MAPS)}")
    _check(query, key, value, near, gate, key_mask)
    query, key, value, *beside = autocast((query, key, value) if near is None else (query, key, value, near))
    check_dtype((query, key, value, *beside))
    (near,) = beside or (None,)
    phi = FEATURE_MAPS[feature_map]
    if not phi.fused:
        if backend != "auto":
            raise ValueError(f'backend "{backend}" does not have feature map {feature_map!r}: use backend "auto"')
        tensors = (x.to(sum_dtype(x.dtype)) for x in (query, key, value))
        out = linear_attention_formula(*tensors, eps=eps, feature_map=feature_map, key_mask=key_mask).to(value.dtype)
        return out if near is None else near + gate.to(near.dtype) * (out - near)
    tensors = [x for x in (query, key, value, near, gate) if x is not None]
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    triton = False
    if backend == "triton" or (backend == "auto" and query.device.type == "cuda"):
        # plain ints, because torch.compile may keep sizes symbolic
        widths = operator.index(query.shape[3]), operator.index(value.shape[3])
        case = (backend, query.device, query.dtype, *widths, gradients)
        if torch.compiler.is_compiling():
            from ..tracing import constant

            triton = constant(_takes_triton, *case)
        else:
            triton = _takes_triton(*case)
    if key_mask is not None:
        key = key.masked_fill(~key_mask[:, :, None, None], phi.vanishes_at)
    state, mean = _linear_state(key, value, triton)
    if key_mask is not None:  # take the means over the unmasked keys only
        share = key.shape[1] / key_mask.sum(1, dtype=state.dtype)[:, None, None, None]
        state, mean = state * share, mean * share
    if near is not None and gradients and not triton:
        # keep `far` for the backward: recomputing it there, as on a GPU, would cost a CPU a fifth of the time
        far = _linear_output(query, state, mean, None, None, eps, triton)
        return near + gate.to(near.dtype) * (far - near)
    return _linear_output(query, state, mean, near, gate, eps, triton)


def _takes_triton(*case) -> bool:
    """Whether the Triton kernels run. Raises ValueError where they are asked for by name and cannot."""
    return _kept_takes_triton(*case)


@lru_cache(maxsize=64)
def _kept_takes_triton(
    backend: str, device: torch.device, dtype: torch.dtype, width: int, value_width: int, gradients: bool
) -> bool:
    reason = triton_refusal(device.type, dtype, max(width, value_width))
    if reason is None and device.type == "cuda":
        sizes = [(1, 70, 2, width), (1, 90, 2, width), (1, 90, 2, value_width)]
        reason = failure_reason(_in_triton, _in_torch, sizes, device, dtype, gradients)
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
    """Why the Triton kernels cannot take such tensors, or None if they can. width: of a head."""
    if dtype not in TRITON_DTYPES:
        return f"its kernels take bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    if width > TRITON_MAX_WIDTH:
        return f"its kernels take head widths up to {TRITON_MAX_WIDTH}, not {width}"
    try:
        interpreted = _triton_passes().INTERPRETED
    except ImportError:
        return "it is not installed"
    if interpreted:
        return None
    if device_type != "cuda":
        return f"it needs a GPU (or TRITON_INTERPRET=1, to try it), and the tensors are on {device_type}"
    missing = triton_requirements()
    return f"it needs {' and '.join(missing)}" if missing else None


def _check(query, key, value, near, gate, key_mask):
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"linear attention takes [B, N, heads, D] tensors, got {shapes(query, key, value)}")
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(f"query and key must agree in batch, heads and width, got {shapes(query, key)}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key and value must agree in batch, tokens and heads, got {shapes(key, value)}")
    if (near is None) != (gate is None):
        raise ValueError("near and gate come together: pass both or neither")
    if near is not None and near.shape != (*query.shape[:3], value.shape[3]):
        raise ValueError(f"near must have the result's shape, one of {shapes(query, value)}, got {shapes(near)}")
    if near is not None and not _broadcasts(gate.shape, near.shape):
        raise ValueError(f"gate must broadcast to near, got {shapes(gate, near)}")
    if key_mask is not None:
        check_mask("key_mask", key_mask, key)
    check_device([x for x in (query, key, value, near, gate, key_mask) if x is not None])


def _broadcasts(shape, target) -> bool:
    return len(shape) <= len(target) and all(
        size in (1, full) for size, full in zip(reversed(shape), reversed(target), strict=False)
    )


# Opaque operators: torch.compile sees one node each instead of unrolling the loops, and the state may be summed over
# several devices between them.
@torch.library.custom_op("hybriddit::linear_state", mutates_args=())
def _linear_state(key: Tensor, value: Tensor, triton: bool) -> tuple[Tensor, Tensor]:
    """state [B, heads, D, E] = phi(k)^T v / N and mean [B, heads, D, 1] of phi(k), in at least float32."""
    return _passes(triton).state(key, value)


@torch.library.custom_op("hybriddit::linear_state_backward", mutates_args=())
def _linear_state_backward(
    grad_state: Tensor, grad_mean: Tensor, key: Tensor, value: Tensor, triton: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of key and value."""
    return _passes(triton).state_backward(grad_state, grad_mean, key, value)


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
    """[B, M, heads, E]: phi(q) state / (phi(q) . mean + eps), joined to near by the gate where there is one."""
    return _passes(triton).output(query, state, mean, near, gate, eps)


@torch.library.custom_op("hybriddit::linear_output_backward", mutates_args=())
def _linear_output_backward(
    grad_out: Tensor, query: Tensor, state: Tensor, mean: Tensor, eps: float, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, state and mean, for an output without the join."""
    return _passes(triton).output_backward(grad_out, query, state, mean, eps)


def _triton_passes():
    from . import triton  # imported here, because Triton may not be installed

    return triton


def _passes(triton: bool):
    return _triton_passes() if triton else torch_passes


@_linear_state.register_fake
def _(key, value, triton):
    (batch, _, heads, width), dtype = key.shape, sum_dtype(key.dtype)
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
        # recomputed rather than kept, so that the join needs no memory of its own
        far = _linear_output(query, state, mean, None, None, ctx.eps, ctx.triton)
        dtype = torch.promote_types(gate.dtype, far.dtype)
        grad_gate = (grad_out.to(dtype) * (far.to(dtype) - near)).sum_to_size(gate.shape).to(gate.dtype)
        grad_far = (gate * grad_out).to(far.dtype)
        grad_near, grad_out = grad_out - grad_far, grad_far
    grads = _linear_output_backward(grad_out, query, state, mean, ctx.eps, ctx.triton)
    return *grads, grad_near, grad_gate, None, None


_linear_state.register_autograd(_state_autograd, setup_context=_save_state)
_linear_output.register_autograd(_output_autograd, setup_context=_save_output)


# torch's FLOP counter cannot look into custom operators. Only matrix products are counted.
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
