"""Generalized linear attention: checks, choice of backend, and the operators that torch.compile and autograd see.

There are two passes, each a custom operator: `linear_state` sums over the keys; `linear_output` applies the sums to
every query, and can join the result with another branch as it writes it. `formula.py` has the formula; `torch.py` and
`triton.py` implement the passes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..inputs import autocast, check_device, check_dtype, check_mask, shapes, sum_dtype
from ..operators import as_operator
from ..rows import RowShard
from ..trial import KERNEL_MAX_WIDTH, failure_reason, kernel_refusal, warn_once
from . import torch as torch_passes
from .features import FEATURE_MAPS
from .formula import joint_gate, joint_share, linear_attention_formula

# What the Triton kernels support. The width is of the queries, keys and channels where the state may have more features
# than these: with a projection, or another map than elu.
TRITON_MAPS = ("elu", "hedgehog", "polynomial")
TRITON_MAX_MAPPED_WIDTH = 128


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    near: Tensor | None = None,
    gate: Tensor | None = None,
    key_mask: Tensor | None = None,
    feature_map: str = "elu",
    query_projection: Tensor | None = None,
    key_projection: Tensor | None = None,
    eps: float | None = None,
    joint: bool = False,
    lse: Tensor | None = None,
    rows: RowShard | None = None,
    backend: str = "auto",
) -> Tensor:
    """Generalized linear attention (LinFusion, arXiv 2409.02097; not causal).

    Per head it is phi(q) (phi(k)^T v / N) / (phi(q) . mean(phi(k)) + eps); phi, by default elu + 1, is applied here,
    after the projections where there are any. Time and memory are linear in the number of tokens. Sums over tokens are
    kept in float32 (float64 for float64). `formula.linear_attention_formula` is the same in a few lines.

    Args:
        query: [B, M, heads, D], raw projection. key: [B, N, heads, D], likewise. value: [B, N, heads, E].
        near, gate: return near + gate * (result - near) instead, computed in the same pass. near [B, M, heads, E],
            gate of any dtype and broadcastable to that; both or neither.
        key_mask: bool [B, N], False for keys that are left out and not counted in N.
        feature_map: phi, a key of `features.FEATURE_MAPS`. One that the backends lack is computed by the formula.
        query_projection, key_projection: [heads, D, m], m up to 256: phi is of q query_projection, and of
            k key_projection; both or neither.
        eps: added to the denominator; None is the feature map's own (1e-4 for elu).
        joint: the share of the result depends on its weights: with x = gate * the sum over the keys of
            phi(q) . phi(k) + eps, return near + x / (1 + |x|) * (result - near). Where near is a softmax and gate is g
            over the sum of its exponentials, that is one average over both, with weights exp(.) and g phi(q) . phi(k).
        lse: [B, M, heads], with joint: the logarithm of that sum; the gate is then sinh(gate) / 10 * exp(-lse), with both
            bounded by 40.
        rows: of an image that is spread over processes, which rows the keys are: the sums are over those of all
            processes. With keys that all processes hold alike, key_mask hides these from all processes but one.
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
    _check(query, key, value, near, gate, lse, key_mask, query_projection, key_projection)
    if joint and near is None:
        raise ValueError("joint is how the result and near are joined: pass near and gate")
    if lse is not None and not (joint and lse.shape == query.shape[:3]):
        raise ValueError(f"lse goes with joint, and must be {list(query.shape[:3])} here, got {shapes(lse)}")
    query, key, value, *beside = autocast((query, key, value) if near is None else (query, key, value, near))
    check_dtype((query, key, value, *beside))
    (near,) = beside or (None,)
    phi = FEATURE_MAPS[feature_map]
    eps = phi.eps if eps is None else eps
    if query_projection is not None:
        query_projection, key_projection = _as(query.dtype, query_projection), _as(query.dtype, key_projection)
    if not phi.fused:
        if backend != "auto":
            raise ValueError(f'backend "{backend}" does not have feature map {feature_map!r}: use backend "auto"')
        if rows is not None:
            raise ValueError(f"feature map {feature_map!r} does not run on an image that is spread over processes")
        with torch.autocast(query.device.type, enabled=False):
            return linear_attention_formula(
                *(x.to(sum_dtype(x.dtype)) for x in (query, key, value)),
                near=near,
                gate=gate,
                joint=joint,
                lse=lse,
                eps=eps,
                feature_map=feature_map,
                query_projection=query_projection,
                key_projection=key_projection,
                key_mask=key_mask,
            ).to(value.dtype)
    tensors = [x for x in (query, key, value, near, gate, lse, query_projection, key_projection) if x is not None]
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    triton = _choose_triton(backend, query, value, query_projection, feature_map, gradients)
    state, mean, count = _begin_sums(key, value, key_projection, key_mask, feature_map, triton, rows)()
    settings = query_projection, eps, feature_map, triton
    return _apply_sums(query, state, mean, near, gate, settings, joint, lse, count, gradients)


def _begin_sums(key, value, projection, key_mask, feature_map, triton, rows) -> Callable[[], tuple]:
    """Begin to form the sums: the function gives state and mean, over the unmasked keys, and how many these are."""
    state, mean = _linear_state(key, value, projection, key_mask, feature_map, triton)
    length, count = key.shape[1], None
    if key_mask is not None:
        count = key_mask.sum(1, dtype=state.dtype)[:, None, None, None]
    if rows is None:
        if count is None:
            return lambda: (state, mean, length)
        share = length / count.clamp(min=1)
        return lambda: (state * share, mean * share, count)
    begun = rows.total(state * length, mean * length, *([] if count is None else [count]))

    def finish():
        state, mean, *counted = begun()
        total = counted[0] if counted else length * rows.height // rows.count
        return state / total, mean / total, total

    return finish


def _apply_sums(query, state, mean, near, gate, settings, joint, lse, count, gradients) -> Tensor:
    """The second pass: the sums applied to each query, and joined. count: number of keys, or a tensor of it."""
    projection, eps, feature_map, triton = settings
    if joint and triton and not gradients and not isinstance(count, Tensor):
        return _linear_output(query, state, mean, near, gate, *settings, joint=True, lse=lse, count=float(count))
    if joint:
        gate = gate if lse is None else joint_gate(gate, lse)
        gate = gate * count
    if near is not None and gradients and (joint or not triton):
        # keep `far` for the backward: recomputing it there, as on a GPU, would cost a CPU a fifth of the time
        far = _linear_output(query, state, mean, None, None, *settings)
        if joint:
            # phi(q) . mean, as the output of a state of one column over a denominator of 1
            sums = mean, torch.zeros_like(mean), None, None, projection, 1.0, feature_map, triton
            gate = joint_share(gate, _linear_output(query, *sums, wide=True) + eps)
        return near + gate.to(near.dtype) * (far - near)
    return _linear_output(query, state, mean, near, gate, *settings, joint=joint)


class KeySums(NamedTuple):
    """Linear attention whose sums over the keys are taken, and what else each query needs; see `linear_attention`.

    query [B, M, heads, D]; state [B, heads, F, E] and mean [B, heads, F, 1], over the keys, in at least float32;
    projection [heads, D, m], or None; eps and feature_map as there. triton: whether the Triton kernels run.
    """

    query: Tensor
    state: Tensor
    mean: Tensor
    projection: Tensor | None
    eps: float
    feature_map: str
    triton: bool

    def joined(
        self,
        near: Tensor | None = None,
        gate: Tensor | None = None,
        joint: bool = False,
        lse: Tensor | None = None,
    ) -> Tensor:
        """The second pass of `linear_attention`, which has the arguments, where as many keys as queries were summed."""
        query, state, mean, *settings = self
        count, gradients = query.shape[1], torch.is_grad_enabled()
        return _apply_sums(query, state, mean, near, gate, settings, joint, lse, count, gradients)


def sum_keys(query: Tensor, key: Tensor, value: Tensor, **settings) -> KeySums:
    """`begin_sum_keys` of the keys of this process alone."""
    return begin_sum_keys(query, key, value, **settings)(key.shape[1])


def begin_sum_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str = "elu",
    query_projection: Tensor | None = None,
    key_projection: Tensor | None = None,
    key_mask: Tensor | None = None,
    rows: RowShard | None = None,
    backend: str = "auto",
) -> Callable[[int], KeySums]:
    """Begin the first pass of `linear_attention`, which has the arguments; what follows takes the function's result.

    The function waits for the sums of other processes, where there are some, and gives them as if they were over as many
    keys as the number it is called with: that of the queries which `joined` or `joined_attention` will be given.

    Without gradients the projection is held as it is now: offloading gives its parameter other data, once the layer's
    weights may leave.
    """
    _check(query, key, value, None, None, None, key_mask, query_projection, key_projection)
    query, key, value = autocast((query, key, value))
    check_dtype((query, key, value))
    if query_projection is not None:
        query_projection, key_projection = _as(query.dtype, query_projection), _as(query.dtype, key_projection)
    gradients = torch.is_grad_enabled()
    triton = _choose_triton(backend, query, value, query_projection, feature_map, gradients)
    begun = _begin_sums(key, value, key_projection, key_mask, feature_map, triton, rows)
    if query_projection is not None and not gradients:
        query_projection = query_projection.detach()
    eps = FEATURE_MAPS[feature_map].eps

    def finish(queries: int) -> KeySums:
        state, mean, count = begun()
        if rows is None:
            if key_mask is not None:  # what is added to the denominator goes on counting the hidden keys
                state, mean = state * (count / queries), mean * (count / queries)
            return KeySums(query, state, mean, query_projection, eps, feature_map, triton)
        share = count / queries
        return KeySums(query, state * share, mean * share, query_projection, eps * share, feature_map, triton)

    return finish


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # as it mostly is: a call that does nothing takes a microsecond


def _choose_triton(
    backend: str, query: Tensor, value: Tensor, projection: Tensor | None, feature_map: str, gradients: bool
) -> bool:
    """Whether the Triton kernels run for these tensors."""
    if not (backend == "triton" or (backend == "auto" and query.device.type == "cuda")):
        return False
    # plain ints, because torch.compile may keep sizes symbolic
    channels = query.shape[3] if projection is None else projection.shape[2]
    widths = operator.index(query.shape[3]), operator.index(value.shape[3]), operator.index(channels)
    case = (backend, query.device, query.dtype, *widths, feature_map, projection is not None, gradients)
    if torch.compiler.is_compiling():
        from ..tracing import constant

        return constant(_takes_triton, *case)
    return _takes_triton(*case)


def _takes_triton(*case) -> bool:
    """Whether the Triton kernels run. Raises ValueError where they are asked for by name and cannot."""
    return _kept_takes_triton(*case)


@lru_cache(maxsize=64)
def _kept_takes_triton(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    value_width: int,
    channels: int,
    feature_map: str,
    projected: bool,
    gradients: bool,
) -> bool:
    mapped_width = 0 if feature_map == "elu" and not projected else max(width, channels)
    reason = triton_refusal(device.type, dtype, max(width, value_width), feature_map, mapped_width)
    if reason is None and device.type == "cuda":
        sizes = [(1, 70, 2, width), (1, 90, 2, width), (1, 90, 2, value_width)]
        sizes += [(2, width, channels)] * (2 * projected)
        run, reference = (partial(_small_case, feature_map, triton) for triton in (True, False))
        reason = failure_reason(run, reference, sizes, device, dtype, gradients)
        if reason and backend == "auto":
            warn_once(f"linear attention does not use triton: {reason}")
    if reason and backend == "triton":
        raise ValueError(f'backend "triton" cannot run this: {reason}; use backend "auto"')
    return reason is None


def _small_case(feature_map: str, triton: bool, query: Tensor, key: Tensor, value: Tensor, *projections: Tensor):
    query_projection, key_projection = projections or (None, None)
    sums = _linear_state(key, value, key_projection, None, feature_map, triton)
    return _linear_output(query, *sums, None, None, query_projection, 1e-4, feature_map, triton)


def triton_refusal(
    device_type: str, dtype: torch.dtype, width: int, feature_map: str = "elu", mapped_width: int = 0
) -> str | None:
    """Why the Triton kernels cannot take such tensors, or None if they can.

    width: of a head. mapped_width: of queries, keys and projections, if there are projections or a map other than elu.
    """
    if feature_map not in TRITON_MAPS:
        return f"its kernels have the feature maps {', '.join(TRITON_MAPS)}, not {feature_map}"
    if mapped_width > TRITON_MAX_MAPPED_WIDTH:
        given = "projections, and feature maps other than elu,"
        return f"its kernels take {given} at widths up to {TRITON_MAX_MAPPED_WIDTH}, not {mapped_width}"
    return kernel_refusal(_triton_passes, device_type, dtype, width)


def _check(query, key, value, near, gate, lse, key_mask, query_projection, key_projection):
    queries, keys, values = query.shape, key.shape, value.shape
    if not len(queries) == len(keys) == len(values) == 4:
        raise ValueError(f"linear attention takes [B, N, heads, D] tensors, got {shapes(query, key, value)}")
    if queries != keys and (queries[0] != keys[0] or queries[2:] != keys[2:]):
        raise ValueError(f"query and key must agree in batch, heads and width, got {shapes(query, key)}")
    if keys != values and keys[:3] != values[:3]:
        raise ValueError(f"key and value must agree in batch, tokens and heads, got {shapes(key, value)}")
    if (near is None) != (gate is None):
        raise ValueError("near and gate come together: pass both or neither")
    if near is not None and near.shape != (*queries[:3], values[3]):
        raise ValueError(f"near must have the result's shape, one of {shapes(query, value)}, got {shapes(near)}")
    if near is not None and not _broadcasts(gate.shape, near.shape):
        raise ValueError(f"gate must broadcast to near, got {shapes(gate, near)}")
    if (query_projection is None) != (key_projection is None):
        raise ValueError("query_projection and key_projection come together: pass both or neither")
    if query_projection is not None:
        matrices = query_projection.shape
        if matrices != key_projection.shape or matrices[:-1] != queries[2:]:
            given = shapes(query_projection, key_projection)  # only here: torch.compile cannot print symbolic sizes
            raise ValueError(f"the projections must be {list(queries[2:])} x m, one m for both, got {given}")
        if not 1 <= matrices[-1] <= KERNEL_MAX_WIDTH:
            raise ValueError(
                f"the projections must have 1 to {KERNEL_MAX_WIDTH} channels, got {shapes(query_projection)}"
            )
    if key_mask is not None:
        check_mask("key_mask", key_mask, key)
    others = near, gate, lse, key_mask, query_projection, key_projection
    check_device([x for x in (query, key, value, *others) if x is not None])


def _broadcasts(shape, target) -> bool:
    return len(shape) <= len(target) and all(
        size in (1, full) for size, full in zip(reversed(shape), reversed(target), strict=False)
    )


# Opaque operators: torch.compile sees one node each instead of unrolling the loops, and the state may be summed over
# several devices between them. F is the number of features, m the projection's channels.
@as_operator("linear_state")
def _linear_state(
    key: Tensor, value: Tensor, projection: Tensor | None, key_mask: Tensor | None, feature_map: str, triton: bool
) -> tuple[Tensor, Tensor]:
    """state [B, heads, F, E] = phi(k)^T v / N and mean [B, heads, F, 1] of phi(k), in at least float32.

    Masked keys count as zero in both, but are counted in N.
    """
    return _passes(triton).state(key, value, projection, key_mask, feature_map)


@torch.library.custom_op("hybriddit::linear_state_backward", mutates_args=())
def _linear_state_backward(
    grad_state: Tensor,
    grad_mean: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor | None,
    key_mask: Tensor | None,
    feature_map: str,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of key, value and projection (empty without one)."""
    inputs = grad_state, grad_mean, key, value, projection, key_mask, feature_map
    return _with_projection_gradient(key, *_passes(triton).state_backward(*inputs))


@as_operator("linear_output")
def _linear_output(
    query: Tensor,
    state: Tensor,
    mean: Tensor,
    near: Tensor | None,
    gate: Tensor | None,
    projection: Tensor | None,
    eps: float,
    feature_map: str,
    triton: bool,
    joint: bool = False,
    wide: bool = False,
    lse: Tensor | None = None,
    count: float = 1.0,
) -> Tensor:
    """[B, M, heads, E]: phi(q) state / (phi(q) . mean + eps), joined to near by the gate where there is one.

    In the query's dtype, or in the sums' where `wide`. With `joint` it has no gradients; lse and count, of which the
    gate is a multiple, are for Triton's kernel.
    """
    inputs = query, state, mean, near, gate, projection, eps, feature_map, joint, wide
    return _triton_passes().output(*inputs, lse, count) if triton else torch_passes.output(*inputs)


@torch.library.custom_op("hybriddit::linear_output_backward", mutates_args=())
def _linear_output_backward(
    grad_out: Tensor,
    query: Tensor,
    state: Tensor,
    mean: Tensor,
    projection: Tensor | None,
    eps: float,
    feature_map: str,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, state, mean and projection (empty without one), for an output without the join."""
    inputs = grad_out, query, state, mean, projection, eps, feature_map
    return _with_projection_gradient(query, *_passes(triton).output_backward(*inputs))


def _with_projection_gradient(x: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    """The gradients, of which the projection's is the last; operators cannot return None."""
    return grads if grads[-1] is not None else (*grads[:-1], x.new_empty(0))


def _triton_passes():
    from . import triton  # imported here, because Triton may not be installed

    return triton


def _passes(triton: bool):
    return _triton_passes() if triton else torch_passes


def _features(width: int, projection: Tensor | None, feature_map: str) -> int:
    return FEATURE_MAPS[feature_map].features(width if projection is None else projection.shape[2])


def _like_projection(projection: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if projection is None else projection.new_empty(projection.shape)


@_linear_state.register_fake
def _(key, value, projection, key_mask, feature_map, triton):
    (batch, _, heads, width), dtype = key.shape, sum_dtype(key.dtype)
    features = _features(width, projection, feature_map)
    return (
        key.new_empty(batch, heads, features, value.shape[3], dtype=dtype),
        key.new_empty(batch, heads, features, 1, dtype=dtype),
    )


@_linear_state_backward.register_fake
def _(grad_state, grad_mean, key, value, projection, key_mask, feature_map, triton):
    return key.new_empty(key.shape), value.new_empty(value.shape), _like_projection(projection, key)


@_linear_output.register_fake
def _(
    query, state, mean, near, gate, projection, eps, feature_map, triton, joint=False, wide=False, lse=None, count=1.0
):
    return query.new_empty(*query.shape[:3], state.shape[3], dtype=state.dtype if wide else query.dtype)


@_linear_output_backward.register_fake
def _(grad_out, query, state, mean, projection, eps, feature_map, triton):
    sums = (x.new_empty(x.shape) for x in (state, mean))
    return query.new_empty(query.shape), *sums, _like_projection(projection, query)


def _save_state(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _state_autograd(ctx, grad_state, grad_mean):
    key, value, projection, key_mask = ctx.saved_tensors  # read once: checkpointing recomputes them at each reading
    grads = _linear_state_backward(grad_state, grad_mean, key, value, projection, key_mask, *ctx.settings)
    return *grads[:2], None if projection is None else grads[2], None, None, None


def _save_output(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


def _output_autograd(ctx, grad_out):
    query, state, mean, near, gate, projection = ctx.saved_tensors
    grad_near = grad_gate = None
    if near is not None:
        # recomputed rather than kept, so that the join needs no memory of its own
        far = _linear_output(query, state, mean, None, None, projection, *ctx.settings[:3])
        dtype = torch.promote_types(gate.dtype, far.dtype)
        grad_gate = (grad_out.to(dtype) * (far.to(dtype) - near)).sum_to_size(gate.shape).to(gate.dtype)
        grad_far = (gate * grad_out).to(far.dtype)
        grad_near, grad_out = grad_out - grad_far, grad_far
    *grads, grad_projection = _linear_output_backward(grad_out, query, state, mean, projection, *ctx.settings[:3])
    grad_projection = None if projection is None else grad_projection
    return *grads, grad_near, grad_gate, grad_projection, *(None for _ in ctx.settings)


_linear_state.register_autograd(_state_autograd, setup_context=_save_state)
_linear_output.register_autograd(_output_autograd, setup_context=_save_output)


# torch's FLOP counter cannot look into custom operators. Only matrix products are counted; a projection's is one.
@register_flop_formula(torch.ops.hybriddit.linear_state)
def _state_flops(key_shape, value_shape, projection_shape, key_mask_shape, feature_map, *args, **kwargs):
    return _flops(key_shape, projection_shape, feature_map, value_shape[3])


@register_flop_formula(torch.ops.hybriddit.linear_state_backward)
def _state_backward_flops(grad_state_shape, grad_mean_shape, key_shape, value_shape, *args, **kwargs):
    projection_shape, _, feature_map = args[:3]
    return _flops(key_shape, projection_shape, feature_map, value_shape[3], backward=True)


@register_flop_formula(torch.ops.hybriddit.linear_output)
def _output_flops(
    query_shape, state_shape, mean_shape, near_shape, gate_shape, projection_shape, eps, feature_map, *args, **kwargs
):
    return _flops(query_shape, projection_shape, feature_map, state_shape[3] + 1)


@register_flop_formula(torch.ops.hybriddit.linear_output_backward)
def _output_backward_flops(
    grad_out_shape, query_shape, state_shape, mean_shape, projection_shape, eps, feature_map, *args, **kwargs
):
    return _flops(query_shape, projection_shape, feature_map, state_shape[3] + 1, backward=True)


def _flops(shape, projection_shape, feature_map, columns, backward=False):
    """Of one pass over tokens of this shape: the projection, and phi's product with this many columns.

    The backward computes the projection again, and like the other product it has two gradients.
    """
    batch, length, heads, width = shape
    channels = width if projection_shape is None else projection_shape[2]
    projected = 0 if projection_shape is None else width * channels
    product = FEATURE_MAPS[feature_map].features(channels) * columns
    return 2 * batch * length * heads * (3 * projected + 2 * product if backward else projected + product)
