"""Neighborhood (sliding-window) attention over a grid and all text: checks, and the choice of a backend."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import autocast, check_device, check_dtype, check_mask, shapes, sum_dtype
from ..layout import room_for
from ..linear import KeySums, linear_attention_formula, sum_keys
from ..trial import failure_reason, warn_once
from . import dense, flex, natten, tiled, triton
from .case import WindowCase
from .lse import lse_by_one_more_key
from .rule import covers, pair
from .text_mask import hide_padded_text


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    circle: bool = False,
    scale: float | None = None,
    text_key: Tensor | None = None,
    text_value: Tensor | None = None,
    text_mask: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every token to the window around it and to all text.

    Each axis follows natten's rule: the window shifts inwards at borders, and a group of `stride` tokens shares one.
    With dilation d, tokens whose positions are equal modulo d form an axis of their own. A window larger than its axis
    is clamped to it, then the stride to the window.

    Args:
        query, key, value: [B, H, W, heads, D].
        window, stride, dilation: int or (rows, columns), in tokens.
        circle: the window is the tokens at a Euclidean distance below `window`, an int, and of less at borders. It has
            neither stride nor dilation.
        scale: factor on the scores; None is D ** -0.5.
        text_key, text_value: [B, S, heads, D], both or neither.
        text_mask: bool [B, S], False for padded text, which no query sees; None sees all text.
        return_lse: also return the logarithm of the sum of exp(score), [B, H, W, heads] in at least float32. It has
            gradients.
        backend: "tiled" and "dense" run on any device. "triton" is hybriddit's own kernels, on a GPU (or in Triton's
            interpreter); it and "flex", torch's FlexAttention, need Triton and a C compiler there. On a CPU flex is
            uncompiled and has no gradients. "natten" needs its compiled kernels and an NVIDIA GPU, and does not take a
            window of 1 or one that has to be clamped. "auto" takes the one that should be fastest of those that can do
            the case. Its first use of triton, flex or natten tries a small case; if that fails, it warns and takes
            another.

    Returns [B, H, W, heads, D], or that and the log-sum-exp. Raises ValueError for inputs that do not fit together, a
    window or dilation below 1, a stride below 1 or above the window, and a backend that is unknown or cannot do the
    case.

    Neighborhood attention, and windows with a stride: arXiv 2204.07143, 2504.16922. FlexAttention: arXiv 2412.05496.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown window attention backend {backend!r}: use one of auto, {', '.join(BACKENDS)}")
    window, stride, dilation = _pairs(window, stride, dilation, circle)
    query, key, value, text_key, text_value = _cast_and_check(query, key, value, text_key, text_value, text_mask)
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    if query.numel() == 0:
        out = F.scaled_dot_product_attention(query, key, value)  # no work, but it keeps autograd's graph
        return (out, out.sum(-1).to(sum_dtype(out.dtype))) if return_lse else out
    text_mask = None if text_key is None else text_mask
    if _serves_any_size(backend, circle, query, key, value, text_key, text_value):
        out, lse = attention_of_any_size(
            query, key, value, text_key, text_value, text_mask, window, stride, dilation, circle, scale, backend
        )
        return (out, lse) if return_lse else out
    take = _traced(_take)
    case = _case(query, key, value, text_key, text_value, window, stride, dilation, circle)
    taken, has_lse = take(backend, return_lse, *case)
    hidden = text_mask is not None and not (BACKENDS[taken].masks_text and (has_lse or not return_lse))
    if hidden:
        text = text_key, text_value, text_mask
        query, key, value, text_key, text_value = hide_padded_text(query, key, value, *text, scale)
        taken, has_lse = take(backend, return_lse, *case[:4], operator.index(query.shape[4]), *case[5:])
    if return_lse and not has_lse:
        settings = {"window": window, "stride": stride, "dilation": dilation, "circle": circle}
        settings |= {"scale": scale, "backend": backend}
        out, lse = lse_by_one_more_key(neighborhood_attention, query, key, value, text_key, text_value, **settings)
    else:
        attend = BACKENDS[taken].attend_with_lse if return_lse else BACKENDS[taken].attend
        options = {} if text_mask is None or hidden else {"text_mask": text_mask}
        options |= {"circle": True} if circle else {}
        out = attend(query, key, value, text_key, text_value, *case[5:8], scale, **options)
        out, lse = out if return_lse else (out, None)
    out = out[..., :head_dim] if hidden else out
    return (out, lse) if return_lse else out


def joined_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sums: KeySums,
    gate: Tensor,
    joint: bool,
    *,
    window: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    circle: bool = False,
    scale: float | None = None,
    text_key: Tensor | None = None,
    text_value: Tensor | None = None,
    text_mask: Tensor | None = None,
    text_rows: tuple[int, int] = (0, 0),
    backend: str = "auto",
) -> Tensor:
    """`neighborhood_attention` joined with linear attention over the grid's tokens, where no gradient is wanted.

    The result [B, H * W, heads, D] is that of `linear_attention(..., near=near, gate=gate, joint=joint)`, with joint also
    lse=lse. It is computed by one kernel, which does not write near, if the backend has one for the case.

    Args:
        query to value, window to backend: as there.
        sums: linear attention's over those tokens in their order, query [B, H * W, heads, D]. Or of a mixer with several
            states: what has `KeySums.joined` alone, which no kernel takes.
        gate: broadcastable to [B, H * W, heads, D].
        text_rows: further rows of the result before and after the image's, to which the caller is to write: it is
            [B, before + H * W + after, heads, D], and need not be made from that of the image.

    Raises ValueError as there, where gradients are on, and for sums of other tokens.
    """
    if torch.is_grad_enabled():
        raise ValueError("joined_attention has no gradients: call it under torch.no_grad()")
    window, stride, dilation = _pairs(window, stride, dilation, circle)
    query, key, value, text_key, text_value = _cast_and_check(query, key, value, text_key, text_value, text_mask)
    text_mask = None if text_key is None else text_mask
    batch, height, width, heads, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    near = query, key, value, text_key, text_value
    rule = window, stride, dilation, circle, scale
    if not isinstance(sums, KeySums):
        return _joined_apart(near, text_mask, sums, gate, joint, text_rows, backend, rule)
    tokens = batch, height * width, heads, head_dim
    if sums.query.shape != tokens or sums.state.shape[3] != head_dim:
        raise ValueError(
            f"linear attention must be over the grid's tokens, got {shapes(query, sums.query, sums.state)}"
        )
    check_dtype((query, sums.query))
    check_device((query, sums.query, sums.state, gate))
    if _serves_any_size(backend, circle, *near):
        return joined_of_any_size(*near, text_mask, *sums, gate, joint, *rule, text_rows, backend)
    taken = None
    if gate.shape[-1] == 1 and query.numel():
        channels = None if sums.projection is None else operator.index(sums.projection.shape[2])
        case = _case(*near, window, stride, dilation, circle)
        taken = _traced(_take_joined)(backend, sums.feature_map, channels, joint, *case)
    if taken is None:
        return _joined_apart(near, text_mask, sums, gate, joint, text_rows, backend, rule)
    gate = gate.expand(*tokens[:3], 1)
    return BACKENDS[taken].attend_joined(*near, *case[5:8], scale, sums, gate, joint, text_rows, text_mask=text_mask)


def _joined_apart(near, text_mask, sums, gate, joint, text_rows, backend, rule) -> Tensor:
    """`joined_attention` by window attention, and the second pass of linear attention after it."""
    query, key, value, text_key, text_value = near
    text = {"text_key": text_key, "text_value": text_value, "text_mask": text_mask}
    window, stride, dilation, circle, scale = rule
    settings = {"window": window, "stride": stride, "dilation": dilation, "circle": circle, "scale": scale}
    out = neighborhood_attention(query, key, value, return_lse=joint, backend=backend, **text, **settings)
    out, lse = (out[0], out[1].flatten(1, 2)) if joint else (out, None)
    image = sums.joined(out.flatten(1, 2), gate, joint, lse)
    if not any(text_rows):
        return image
    whole = room_for(query, text_rows)
    whole.narrow(1, text_rows[0], image.shape[1]).copy_(image)
    return whole


def _serves_any_size(backend: str, circle: bool, *inputs: Tensor | None) -> bool:
    """Whether torch.compile traces a graph for several sizes of these inputs, in which one operator is to serve them all.

    inputs: query, key, value, text key and text value, or None in place of these two.
    """
    if not torch.compiler.is_compiling():
        return False
    from ..tracing import are_symbolic, constant

    query, text_key = inputs[0], inputs[3]
    sizes = query.shape[1:3] if text_key is None else (*query.shape[1:3], text_key.shape[1])
    kind = query.device, query.dtype, operator.index(query.shape[4])
    return not _gradients(*inputs) and are_symbolic(*sizes) and constant(_takes_any_size, backend, circle, *kind)


def _gradients(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _pairs(window, stride, dilation, circle):
    window, stride, dilation = pair("window", window), pair("stride", stride), pair("dilation", dilation)
    if circle and (window[0] != window[1] or stride != (1, 1) or dilation != (1, 1)):
        raise ValueError(
            f"a circle has one radius and neither stride nor dilation, got {window}, {stride} and {dilation}"
        )
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(f"stride {stride} is larger than window {window}: tokens would be skipped; lower the stride")
    return window, stride, dilation


def _traced(function: Callable) -> Callable:
    """The function, of plain values; hidden from torch.compile while that traces."""
    if not torch.compiler.is_compiling():
        return function
    from ..tracing import constant

    return partial(constant, function)


def _case(query, key, value, text_key, text_value, window, stride, dilation, circle) -> tuple:
    """The fields of a `WindowCase`."""
    # plain ints: torch.compile keeps one graph a size, whose backend is chosen for it
    grid, heads = tuple(map(operator.index, query.shape[1:3])), operator.index(query.shape[3])
    return (
        query.device,
        query.dtype,
        grid,
        heads,
        operator.index(query.shape[4]),
        window if circle else (min(window[0], grid[0]), min(window[1], grid[1])),
        (min(stride[0], window[0], grid[0]), min(stride[1], window[1], grid[1])),
        dilation,
        0 if text_key is None else operator.index(text_key.shape[1]),
        _gradients(query, key, value, text_key, text_value),
        circle,
    )


def _takes_any_size(backend: str, circle: bool, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the backend for large grids runs within an operator that serves all sizes."""
    large = WindowCase(device, dtype, (128, 128), 1, head_dim, (16, 16), circle=circle)
    return BACKENDS[_taken(backend, large)].any_size


# An opaque operator for sizes that torch.compile keeps symbolic: one graph serves all, and the backend is chosen when it
# runs. The log-sum-exp is a small part of the work, and is computed whether it is wanted or not.
@torch.library.custom_op("hybriddit::neighborhood_attention", mutates_args=())
def attention_of_any_size(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor | None,
    text_value: Tensor | None,
    text_mask: Tensor | None,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    circle: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`neighborhood_attention` without gradients, and its log-sum-exp [B, H, W, heads], both contiguous."""
    out, lse = neighborhood_attention(
        query,
        key,
        value,
        window=tuple(window),
        stride=tuple(stride),
        dilation=tuple(dilation),
        circle=circle,
        scale=scale,
        text_key=text_key,
        text_value=text_value,
        text_mask=text_mask,
        return_lse=True,
        backend=backend,
    )
    return out.contiguous(), lse.contiguous()


@attention_of_any_size.register_fake
def _(query, *args):
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=sum_dtype(query.dtype))


@torch.library.custom_op("hybriddit::joined_neighborhood_attention", mutates_args=())
def joined_of_any_size(
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
    eps: float,
    feature_map: str,
    triton: bool,
    gate: Tensor,
    joint: bool,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    circle: bool,
    scale: float,
    text_rows: Sequence[int],
    backend: str,
) -> Tensor:
    """`joined_attention`, contiguous; far_query to triton: of `KeySums`."""
    return joined_attention(
        query,
        key,
        value,
        KeySums(far_query, state, mean, projection, eps, feature_map, triton),
        gate,
        joint,
        window=tuple(window),
        stride=tuple(stride),
        dilation=tuple(dilation),
        circle=circle,
        scale=scale,
        text_key=text_key,
        text_value=text_value,
        text_mask=text_mask,
        text_rows=tuple(text_rows),
        backend=backend,
    ).contiguous()


@joined_of_any_size.register_fake
def _(query, *args):
    return room_for(query, args[-2])


def _cast_and_check(query, key, value, text_key, text_value, text_mask):
    if (text_key is None) != (text_value is None):
        raise ValueError("text_key and text_value come together: pass both or neither")
    image, text = (query, key, value), () if text_key is None else (text_key, text_value)
    if query.ndim != 5 or not query.shape == key.shape == value.shape:
        raise ValueError(f"query, key and value must share one shape [B, H, W, heads, D], got {shapes(*image)}")
    if text:
        batch, _, _, heads, head_dim = query.shape
        sizes = text_key.shape
        if len(sizes) != 4 or sizes != text_value.shape or (sizes[0], *sizes[2:]) != (batch, heads, head_dim):
            raise ValueError(
                f"text_key and text_value must be [{batch}, S, {heads}, {head_dim}] here, got {shapes(*text)}"
            )
    if text_mask is not None and not text:
        raise ValueError("text_mask needs text_key and text_value")
    if text_mask is not None:
        check_mask("text_mask", text_mask, text_key)
    check_device(image + text if text_mask is None else (*image, *text, text_mask))
    tensors = autocast(image + text)
    check_dtype(tensors)
    # text without tokens counts as no text
    return tensors if text and text[0].shape[1] else (*tensors[:3], None, None)


class Choice(NamedTuple):
    """The backend that runs, why, and (name, reason) for each one before it in BACKENDS that does not."""

    backend: str
    reason: str
    passed_over: tuple[tuple[str, str], ...]


class Backend(NamedTuple):
    """One way to compute window attention.

    attend: (query, key, value, text_key, text_value, window, stride, dilation, scale) -> [B, H, W, heads, D]; image
        tensors are [B, H, W, heads, D], text [B, S, heads, D] or None, the others pairs (rows, columns) and a number.
        For a circular window, where `refusal` allows one, it and attend_with_lse are given circle=True besides.
    refusal: (case) -> why the backend cannot do it, or None.
    slower: (case) -> why another backend is faster, or None.
    attend_with_lse: as attend, -> (output, log-sum-exp [B, H, W, heads]), on lse_devices (their types; None is any).
        lse_gradients: whether both have gradients.
    attend_joined: as attend, with (linear attention's sums, gate [B, N, heads, 1], joint, text_rows) after them; see
        `joined_attention`. joined_refusal: (case, feature map, channels of the projection or None) -> why it cannot, or
        None.
    masks_text: whether all take text_mask, bool [B, S]; else padded text is hidden by a wider head.
    tried: whether a small case is tried before the backend's first use on a GPU.
    any_size: whether it can run within another operator, so that a compiled graph serves all sizes.
    """

    attend: Callable[..., Tensor]
    refusal: Callable[[WindowCase], str | None]
    slower: Callable[[WindowCase], str | None]
    attend_with_lse: Callable[..., tuple[Tensor, Tensor]] | None = None
    lse_devices: tuple[str, ...] | None = None
    lse_gradients: bool = False
    attend_joined: Callable[..., Tensor] | None = None
    joined_refusal: Callable[[WindowCase, str, int | None], str | None] | None = None
    masks_text: bool = False
    tried: bool = False
    any_size: bool = True


def choose_backend(case: WindowCase, *, tried: bool = False) -> Choice:
    """Choose a backend as `neighborhood_attention` does with "auto". tried: also run the backends' small cases."""
    if covers(case.grid, case.window, case.dilation, case.circle):
        return Choice("dense", "the window covers the grid", ())
    passed_over = []
    for name, backend in BACKENDS.items():
        reason = backend.refusal(case) or backend.slower(case)
        if reason is None and tried and backend.tried and case.on_gpu:
            reason = _trial_failure(name, case.device, case.dtype, case.head_dim, case.gradients)
            if reason:
                warn_once(f"window attention does not use {name}: {reason}")
        if reason is None:
            break
        passed_over.append((name, reason))
    return Choice(name, _why(name, case), tuple(passed_over))


def _why(name: str, case: WindowCase) -> str:
    if name == "dense":
        return "no other backend would be faster on so small a grid or so large a window"
    return "the fastest that can run here" if case.on_gpu else "the fastest on a CPU"


def _take(backend: str, return_lse: bool, *case) -> tuple[str, bool]:
    """The name of the backend to run, and whether it gives the log-sum-exp, if that is wanted.

    Raises ValueError where a backend is asked for by name and cannot.
    """
    case = WindowCase(*case)
    taken = _taken(backend, case)
    return taken, return_lse and _gives_lse(taken, case)


@lru_cache(maxsize=512)
def _taken(backend: str, case: WindowCase) -> str:
    if backend == "auto":
        return choose_backend(case, tried=True).backend
    row = BACKENDS[backend]
    reason = row.refusal(case)
    if reason is None and row.tried and case.on_gpu:
        reason = _trial_failure(backend, case.device, case.dtype, case.head_dim, case.gradients)
    if reason:
        raise ValueError(f'backend "{backend}" cannot run this: {reason}; use backend "auto"')
    return backend


def _gives_lse(name: str, case: WindowCase) -> bool:
    row = BACKENDS[name]
    if row.attend_with_lse is None or (case.gradients and not row.lse_gradients):
        return False
    if row.lse_devices is not None and case.device.type not in row.lse_devices:
        return False
    reason = None
    if row.tried and case.on_gpu:
        reason = _trial_failure(name, case.device, case.dtype, case.head_dim, False, lse=True)
    if reason:
        warn_once(f"window attention takes the log-sum-exp from one more key, not from {name}: {reason}")
    return reason is None


def _take_joined(backend: str, feature_map: str, channels: int | None, joint: bool, *case) -> str | None:
    """The name of the backend to run if it joins such linear attention, else None."""
    return _kept_take_joined(backend, feature_map, channels, joint, WindowCase(*case))


@lru_cache(maxsize=512)
def _kept_take_joined(
    backend: str, feature_map: str, channels: int | None, joint: bool, case: WindowCase
) -> str | None:
    taken = _taken(backend, case)
    row = BACKENDS[taken]
    if row.attend_joined is None or row.joined_refusal(case, feature_map, channels):
        return None
    reason = None
    if row.tried and case.on_gpu:
        reason = _joined_failure(taken, case.device, case.dtype, case.head_dim, feature_map, channels, joint)
    if reason:
        warn_once(f"window attention is joined with linear attention in a pass of its own, not by {taken}: {reason}")
    return None if reason else taken


@lru_cache(maxsize=64)
def _joined_failure(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    feature_map: str,
    channels: int | None,
    joint: bool,
) -> str | None:
    """Why a backend fails to join a small case, or differs there from plain formulas; None if it does neither."""
    grid, settings = (20, 36), ((7, 9), (1, 1), (1, 1), head_dim**-0.5)
    image, tokens = (1, *grid, 2, head_dim), (1, grid[0] * grid[1], 2, head_dim)
    sizes = [image] * 3 + [(1, 5, 2, head_dim)] * 2 + [tokens] * 2 + [(*tokens[:3], 1)]
    sizes += [(2, head_dim, channels)] * (0 if channels is None else 2)

    def arguments(inputs):
        near, (far_query, far_key, gate), projections = inputs[:5], inputs[5:8], inputs[8:] or (None, None)
        phi = {"feature_map": feature_map, "query_projection": projections[0], "key_projection": projections[1]}
        return near, (far_query, far_key, near[2].flatten(1, 2)), phi, gate

    def run(*inputs):
        near, far, phi, gate = arguments(inputs)
        sums = sum_keys(*far, backend="torch", **phi)
        return BACKENDS[name].attend_joined(*near, *settings, sums, gate, joint, (0, 0))

    def reference(*inputs):
        near, far, phi, gate = arguments(inputs)
        near, lse = (x.flatten(1, 2) for x in tiled.attend_with_lse(*near, *settings))
        phi |= {"joint": True, "lse": lse} if joint else {}
        return linear_attention_formula(*far, near=near, gate=gate, **phi)

    return failure_reason(run, reference, sizes, device, dtype, False)


@lru_cache(maxsize=64)
def _trial_failure(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool, lse: bool = False
) -> str | None:
    """Why a backend fails on a small case, or differs there from the tiled backend; None if it does neither.

    lse: of its log-sum-exp, else of its output.
    """
    settings = (7, 9), (1, 1), (1, 1), head_dim**-0.5
    sizes = [(1, 20, 36, 2, head_dim)] * 3 + [(1, 5, 2, head_dim)] * 2
    row = BACKENDS[name]
    return failure_reason(
        lambda *inputs: row.attend_with_lse(*inputs, *settings)[1] if lse else row.attend(*inputs, *settings),
        lambda *inputs: tiled.attend_with_lse(*inputs, *settings)[lse],
        sizes,
        device,
        dtype,
        gradients,
    )


# Fastest first.
BACKENDS = {
    "triton": Backend(
        triton.attend,
        triton.refusal,
        triton.slower,
        triton.attend_with_lse,
        lse_gradients=True,
        attend_joined=triton.attend_joined,
        joined_refusal=triton.joined_refusal,
        masks_text=True,
        tried=True,
    ),
    "flex": Backend(flex.attend, flex.refusal, flex.slower, tried=True, any_size=False),  # it is compiled for each size
    "natten": Backend(natten.attend, natten.refusal, natten.slower, natten.attend_with_lse, tried=True),
    "tiled": Backend(tiled.attend, tiled.refusal, tiled.slower, tiled.attend_with_lse),
    "dense": Backend(dense.attend, dense.refusal, dense.slower, dense.attend_with_lse, ("cpu",)),
}
