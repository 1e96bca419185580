"""Window attention by the Triton kernels of `kernels.py`: any window, stride, dilation, text and mask, on a GPU.

Without gradients, linear attention over the whole image can be joined in the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..layout import room_for
from ..operators import as_operator
from ..trial import kernel_refusal
from .case import WindowCase
from .rule import seen_pairs

# The backend is chosen below this share of dense attention's query-key pairs (estimated from the pairs, unmeasured).
BREAK_EVEN = 0.8
# What fits beside near's sums in registers (tests/attention/window/test_window_compile.py).
JOINED_MAX_WIDTH, JOINED_MAX_CHANNELS = 128, 32


def attend(query, key, value, text_key, text_value, window, stride, dilation, scale, text_mask=None) -> Tensor:
    """Compute window attention (see `dispatch.Backend`)."""
    return attend_with_lse(query, key, value, text_key, text_value, window, stride, dilation, scale, text_mask)[0]


def attend_with_lse(
    query, key, value, text_key, text_value, window, stride, dilation, scale, text_mask=None
) -> tuple[Tensor, Tensor]:
    """The same, and its log-sum-exp [B, H, W, heads] in float32; both have gradients."""
    out, lse = window_attention(
        query, key, value, text_key, text_value, text_mask, list(window), list(stride), list(dilation), scale
    )
    return out, lse.movedim(1, 3)


def attend_joined(
    query, key, value, text_key, text_value, window, stride, dilation, scale, far, gate, joint, rows, text_mask=None
) -> Tensor:
    """The same, joined with linear attention; see `dispatch.Backend`."""
    # sizes one by one: torch takes longer to read them from a torch.Size
    sums = far.query.view_as(query), far.state, far.mean, far.projection, gate.view(*query.shape[:4])
    settings = window, stride, dilation, scale, far.feature_map, far.eps, joint, rows
    return joined_attention(query, key, value, text_key, text_value, text_mask, *sums, *settings)


def joined_refusal(case: WindowCase, feature_map: str, channels: int | None) -> str | None:
    """Why `attend_joined` cannot join linear attention of this kind to a case of `attend`'s, or None.

    channels: of the projection; None: there is none.
    """
    if case.head_dim > JOINED_MAX_WIDTH:
        return f"its kernel joins at head widths up to {JOINED_MAX_WIDTH}, not {case.head_dim}"
    fits = feature_map == "elu" if channels is None else channels <= JOINED_MAX_CHANNELS
    if not fits:
        return f"its kernel joins elu, or projections of up to {JOINED_MAX_CHANNELS} channels"
    return None


def refusal(case: WindowCase) -> str | None:
    """Why the kernels cannot do a case, or None."""
    if case.circle:
        return "it has no circular windows"
    return kernel_refusal(_kernels, case.device.type, case.dtype, case.head_dim)


def slower(case: WindowCase) -> str | None:
    """Why dense attention is faster, or None."""
    share = (seen_pairs(case.grid, case.window, case.dilation) + case.tokens * case.text_length) / case.dense_pairs
    return case.too_much_work(share, BREAK_EVEN)


def _kernels():
    from . import kernels  # imported here, because Triton may not be installed

    return kernels


# One operator a pass: torch.compile sees a node, whatever the grid.
@as_operator("window_attention")
def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor | None,
    text_value: Tensor | None,
    text_mask: Tensor | None,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Window attention [B, H, W, heads, D], and its log-sum-exp [B, heads, H, W] in float32."""
    settings = tuple(window), tuple(stride), tuple(dilation), scale
    return _kernels().forward(query, key, value, text_key, text_value, text_mask, *settings)


@as_operator("joined_attention")
def joined_attention(
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
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    feature_map: str,
    eps: float,
    joint: bool,
    text_rows: Sequence[int],
) -> Tensor:
    """near + share (far - near), with near window attention. It has no gradients.

    It is written to rows of a new tensor [B, before + H * W + after, heads, D], text_rows being (before, after).
    far = phi(q') state / (phi(q') . mean + eps) with q' = far_query, [B, H, W, heads, D], times the projection, if there
    is one; state and mean are the means over the grid's tokens, see `linear.dispatch`. gate: [B, H, W, heads], the share;
    with joint, the share is `joint_share` of its `joint_gate` times the number of tokens.
    """
    settings = tuple(window), tuple(stride), tuple(dilation), scale, feature_map, eps, joint, tuple(text_rows)
    near = query, key, value, text_key, text_value, text_mask
    return _kernels().joined(*near, far_query, state, mean, projection, gate, *settings)


@torch.library.custom_op("hybriddit::window_attention_backward", mutates_args=())
def window_attention_backward(
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
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and text; text's are empty where there is none."""
    settings = tuple(window), tuple(stride), tuple(dilation), scale
    tensors = query, key, value, text_key, text_value, text_mask, out, lse
    grads = _kernels().backward(grad_out, grad_lse, *tensors, *settings)
    return tuple(query.new_empty(0) if x is None else x for x in grads)


@window_attention.register_fake
def _(query, *args):
    batch, height, width, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(batch, heads, height, width, dtype=torch.float32)


@joined_attention.register_fake
def _(query, *args):
    return room_for(query, args[-1])


@window_attention_backward.register_fake
def _(grad_out, grad_lse, query, key, value, text_key, text_value, *args):
    texts = (query.new_empty(0) if x is None else x.new_empty(x.shape) for x in (text_key, text_value))
    return *(x.new_empty(x.shape) for x in (query, key, value)), *texts


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.settings = inputs[6:]


def _autograd(ctx, grad_out, grad_lse):
    saved = ctx.saved_tensors  # read once: under checkpointing a second read is an error
    grads = window_attention_backward(grad_out, grad_lse, *saved, *ctx.settings)
    texts = (None, None) if saved[3] is None else grads[3:]
    return *grads[:3], *texts, None, *(None for _ in ctx.settings)


window_attention.register_autograd(_autograd, setup_context=_setup_context)


# torch's FLOP counter cannot look into custom operators.
@register_flop_formula(torch.ops.hybriddit.window_attention)
def _forward_flops(query, key, value, text_key, text_value, text_mask, window, stride, dilation, scale, **kwargs):
    return 2 * _product_flops(query, text_key, window, dilation)


@register_flop_formula(torch.ops.hybriddit.joined_attention)
def _joined_flops(
    query, key, value, text_key, text_value, text_mask, far_query, state, mean, projection, *args, **kwargs
):
    _, window, _, dilation = args[:4]
    batch, height, width, heads, head_dim = query
    per_token = state[2] * (head_dim + 1) + (0 if projection is None else head_dim * projection[2])
    far = 2 * batch * height * width * heads * per_token
    return 2 * _product_flops(query, text_key, window, dilation) + far


@register_flop_formula(torch.ops.hybriddit.window_attention_backward)
def _backward_flops(
    grad_out, grad_lse, query, key, value, text_key, text_value, text_mask, out, lse, *settings, **kwargs
):
    # scores and the weights' gradients once for each of the two kernels, and a product for each of three gradients
    return 7 * _product_flops(query, text_key, settings[0], settings[2])


def _product_flops(query, text_key, window, dilation):
    """FLOPs of the products of all queries with the keys that they see."""
    batch, height, width, heads, head_dim = query
    pairs = seen_pairs((height, width), tuple(window), tuple(dilation)) + height * width * (
        text_key[1] if text_key else 0
    )
    return 2 * batch * heads * head_dim * pairs
