"""The hybrid layer on an image whose rows lie with several processes, of which each has its own rows and all of the text.

The far branch needs the others' sums over their keys, the window some rows of the neighbours, and text queries the
others' results. What travels for one branch is on its way while another is computed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .inputs import autocast
from .layout import TokenLayout
from .rows import RowShard
from .window import joined_attention, neighborhood_attention
from .window.tiled import attend_keys, attend_keys_backward, has_fused_kernel

CHUNK = 8192  # keys whose scores are written at once, where no fused kernel runs


def spread_attention(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_layout: TokenLayout,
    *,
    far_query: Tensor | None,
    far_key: Tensor | None,
    gate: Tensor | None,
    scale: float | None,
    text_mask: Tensor | None,
) -> Tensor:
    """The forward of a HybridAttention, which has the arguments, of the text and this process's rows: [B, S, heads, D].

    Raises ValueError for a far branch that cannot be spread, and for pooled keys.
    """
    if layer.pooled is not None:
        raise ValueError("pooled keys are not computed on an image spread over processes: call the model in one")
    rows, (grid,) = token_layout.rows, token_layout.grids
    (text_query, image_query), (text_key, image_key), (text_value, image_value) = map(
        token_layout.split, (query, key, value)
    )
    local = [x.unflatten(1, grid) for x in (image_key, image_value)]
    for_every_head = layer.for_every_head
    text_key, text_value, image_key, image_value = map(for_every_head, (text_key, text_value, image_key, image_value))
    around = sums = None
    if layer.kind != "linear":
        reach = rows.whole
        if layer.window is not None:
            reach = layer.near_reach(rows.height)
        around = rows.extended(local, reach)
    if layer.far is not None:
        far_query, far_key = layer.far_tokens(far_query, far_key, image_query, image_key, token_layout)
    if layer.kind == "hybrid":
        image_layout = token_layout._replace(text_length=0)
        sums = layer.far(far_query, far_key, image_value, only_sums=True, rows=rows, layout=image_layout)
        if sums is None:
            name = layer.far.feature_map
            raise ValueError(f"the far branch's feature map {name!r} does not run on an image spread over processes")
    text = None
    if token_layout.text_length:
        keys = text_key, text_value, image_key, image_value
        text = softmax_over_processes(rows, text_query, *keys, text_mask, scale)
    if layer.kind == "linear":
        keys, values, seen = far_key, image_value, None
        if token_layout.text_length:
            keys, values = token_layout.join(text_key, far_key), token_layout.join(text_value, image_value)
            counted = text_key.new_ones(text_key.shape[:2], dtype=torch.bool) if text_mask is None else text_mask
            counted = counted & rows.leads
            seen = token_layout.join(counted, counted.new_ones(len(counted), token_layout.image_length))
        image = layer.far(far_query, keys, values, key_mask=seen, rows=rows, layout=token_layout)
    elif layer.kind == "dense":
        keys, values = (for_every_head(x.flatten(1, 2)) for x in around())
        whole = token_layout._replace(grids=((rows.height, grid[1]),), rows=None)
        keys, values = whole.join(text_key, keys), whole.join(text_value, values)
        image = layer.softmax(image_query, keys, values, whole, scale, text_mask)
    else:
        settings = layer.near_settings(scale, text_key, text_value, text_mask)
        keys, values = (for_every_head(x.flatten(1, 2)).unflatten(1, x.shape[1:3]) for x in around())
        begin, end = reach(rows.first, rows.count)
        margins = rows.first - begin, end - rows.first - rows.count
        images = _with_rows(image_query.unflatten(1, grid), margins), keys, values
        image = _near_and_far(layer, images, grid, margins, sums, gate, settings)
    if layer.value_conv is not None:
        image = image + layer.value_conv(image_value, token_layout.grids, rows)
    return image if text is None else token_layout.join(text, image)


def _near_and_far(layer, images, grid, margins, sums, gate, settings) -> Tensor:
    """The window's output joined with the far branch's, if there is one: [B, N, heads, D] of this process's rows.

    images: query, key and value [B, H, W, heads, D], of these rows with `margins` of others above and below, where the
    queries are zero and their results are not used.
    """
    own, joint = slice(margins[0], margins[0] + grid[0]), layer.join == "joint"
    if sums is None:
        return neighborhood_attention(*images, **settings)[:, own].flatten(1, 2)
    gate = layer.gate if gate is None else gate
    if layer.far.states == 1 and layer.far_only is None and not torch.is_grad_enabled():
        sums = sums(math.prod(images[0].shape[1:3]))
        far_query = _with_rows(sums.query.unflatten(1, grid), margins).flatten(1, 2)
        if gate.ndim == 4:  # of each token
            gate = _with_rows(gate.unflatten(1, grid), margins).flatten(1, 2)
        image = joined_attention(*images, sums._replace(query=far_query), gate, joint, **settings)
        return image.narrow(1, margins[0] * grid[1], math.prod(grid))
    near = neighborhood_attention(*images, return_lse=joint, **settings)
    near, lse = (x[:, own].flatten(1, 2) for x in near) if joint else (near[:, own].flatten(1, 2), None)
    gate, lse = layer.opened(gate, lse)
    return sums(near.shape[1]).joined(near, gate, joint, lse)


def _with_rows(image: Tensor, margins: tuple[int, int]) -> Tensor:
    """An image [B, H, W, heads, D] with rows of zeros above and below."""
    return F.pad(image, (0, 0, 0, 0, 0, 0, *margins))


def softmax_over_processes(
    rows: RowShard,
    query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    key: Tensor,
    value: Tensor,
    text_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Softmax attention of queries that all processes hold alike, over the text and the rows of all: [B, M, heads, D].

    query [B, M, heads, D]; text [B, T, heads, D], held alike; key and value [B, N, heads, D], of this process's rows.
    text_mask: bool [B, T], False for text to leave out. Each process attends to its own rows, the leading one to the
    text too; what travels are results for the queries.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tensors = autocast((query, text_key, text_value, key, value))
    with torch.autocast(query.device.type, enabled=False):
        return _SoftmaxOverProcesses.apply(rows, scale, text_mask, *tensors)


class _SoftmaxOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, scale, text_mask, query, text_key, text_value, key, value):
        keys, values, mask = _seen(rows, text_mask, text_key, text_value, key, value)
        out, lse = softmax_with_lse(query.transpose(1, 2), keys, values, mask, scale)
        highest = rows.largest(lse)
        weight = torch.exp(lse - highest).unsqueeze(-1)
        out, weight = rows.total(out * weight, weight)()
        out, lse = out / weight, highest + weight.squeeze(-1).log()
        ctx.save_for_backward(query, text_key, text_value, key, value, out, lse)
        ctx.rows, ctx.scale, ctx.text_mask = rows, scale, text_mask
        return out.transpose(1, 2).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, text_key, text_value, key, value, out, lse = ctx.saved_tensors
        rows, lengths = ctx.rows, (text_key.shape[1], key.shape[1])
        # each process uses the result for tokens of its own, and has a share of the gradient
        (grad,) = rows.total(grad.to(out.dtype, memory_format=torch.contiguous_format))()
        keys, values, mask = _seen(rows, ctx.text_mask, text_key, text_value, key, value)
        grads = _attend_backward(grad.transpose(1, 2), query.transpose(1, 2), keys, values, out, lse, mask, ctx.scale)
        grad_query, *grads = (x.transpose(1, 2) for x in grads)
        texts, images = (torch.zeros_like(text_key), torch.zeros_like(text_value)), grads
        if rows.leads:
            texts, images = zip(*(x.split(lengths, dim=1) for x in grads), strict=True)
        return None, None, None, grad_query, *texts, *images


def _seen(rows, text_mask, text_key, text_value, key, value):
    """Keys and values [B, heads, tokens, D] that this process attends to, and their additive mask or None."""
    mask = None
    if rows.leads:
        key, value = torch.cat((text_key, key), dim=1), torch.cat((text_value, value), dim=1)
        if text_mask is not None:
            mask = key.new_zeros(len(key), 1, 1, key.shape[1])
            mask[..., : text_mask.shape[1]].masked_fill_(~text_mask[:, None, None], -math.inf)
    return key.transpose(1, 2), value.transpose(1, 2), mask


def softmax_with_lse(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention [B, heads, M, D] and its log-sum-exp [B, heads, M], both in at least float32.

    query [B, heads, M, D], key and value [B, heads, N, D]. mask: additive, [B, 1, 1, N], or None.
    """
    out = lse = None
    for keys in _chunks(key):
        part, part_lse = attend_keys(query, key[:, :, keys], value[:, :, keys], _of(mask, keys), scale)
        part = part.to(part_lse.dtype)
        out, lse = (part, part_lse) if out is None else merged(out, lse, part, part_lse)
    return out, lse


def merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over two sets of keys, from the output [..., D] and log-sum-exp [...] over each of them."""
    both = torch.logaddexp(lse, other_lse)
    return torch.lerp(out, other, (other_lse - both).exp_().unsqueeze(-1)), both


def _attend_backward(grad, query, key, value, out, lse, mask, scale):
    """Gradients of query, key and value, for an out and lse that cover other processes' keys too."""
    grad, out = grad.to(query.dtype), out.to(query.dtype)
    parts = [
        attend_keys_backward(grad, query, key[:, :, keys], value[:, :, keys], out, lse, _of(mask, keys), scale)
        for keys in _chunks(key)
    ]
    grad_query, *grads = zip(*parts, strict=True)
    return sum(grad_query), *(torch.cat(x, dim=2) for x in grads)


def _chunks(key: Tensor) -> list[slice]:
    """Slices of the keys, such that scores, where they are written, stay small."""
    length = key.shape[2]
    size = length if has_fused_kernel(key) else CHUNK
    return [slice(start, start + size) for start in range(0, length, size)]


def _of(mask: Tensor | None, keys: slice) -> Tensor | None:
    return None if mask is None else mask[..., keys]
