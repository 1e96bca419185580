"""Window attention as dense attention under a mask: for small grids, and for windows that cover most of one."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import WindowCase
from .rule import KEPT_MASK_ELEMENTS, additive_mask, axis_distances, covers, distance_limit

# Up to this many tokens, torch's dense attention on a CPU is slower in bfloat16 than in float32, backward by a quarter.
FLOAT32_TOKENS = 512


def attend(query, key, value, text_key, text_value, window, stride, dilation, scale, circle=False) -> Tensor:
    """Compute window attention (see `dispatch.Backend`)."""
    grid, dtype = tuple(query.shape[1:3]), query.dtype
    query, key, value, mask = _inputs(query, key, value, text_key, text_value, window, stride, dilation, circle)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).to(dtype)
    return out.transpose(1, 2).unflatten(1, grid)


def attend_with_lse(
    query, key, value, text_key, text_value, window, stride, dilation, scale, circle=False
) -> tuple[Tensor, Tensor]:
    """The same on a CPU, and its log-sum-exp [B, H, W, heads], which has no gradients."""
    grid, dtype = tuple(query.shape[1:3]), query.dtype
    tensors = _inputs(query, key, value, text_key, text_value, window, stride, dilation, circle)
    # the kernel reads channels as neighbours in memory, and does not check that they are
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in tensors[:3])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=tensors[3], scale=scale
    )
    return out.to(dtype).transpose(1, 2).unflatten(1, grid), lse.transpose(1, 2).unflatten(1, grid)


def _inputs(query, key, value, text_key, text_value, window, stride, dilation, circle):
    """Query, key and value as dense attention takes them, and the additive mask; None if all is seen."""
    grid, text_length = tuple(query.shape[1:3]), 0 if text_key is None else text_key.shape[1]
    mask = None
    if not covers(grid, window, dilation, circle):
        # under torch.compile and with fake tensors the mask is part of the graph; a cached one would leak into it
        keep = type(query) is Tensor and not torch.compiler.is_compiling()
        keep = keep and (grid[0] * grid[1]) ** 2 <= KEPT_MASK_ELEMENTS
        make_mask = _kept_mask if keep else _mask
        mask = make_mask(grid, window, stride, dilation, circle, text_length, query.dtype, query.device)
    query, key, value = _join_text(query, key, value, text_key, text_value)
    if query.dtype == torch.bfloat16 and query.device.type == "cpu" and math.prod(grid) <= FLOAT32_TOKENS:
        query, key, value = query.float(), key.float(), value.float()
        mask = None if mask is None else mask.float()
    return query, key, value, mask


def refusal(case: WindowCase) -> str | None:
    """None: this backend runs everywhere."""
    return None


def slower(case: WindowCase) -> str | None:
    """None: this is the backend that the others are compared with."""
    return None


def _join_text(query, key, value, text_key, text_value):
    """Append the text to keys and values: -> query [B, heads, N, D], key and value [B, heads, N + S, D].

    Image tensors are [B, H, W, heads, D], those of the text [B, S, heads, D].
    """
    query, key, value = (x.flatten(1, 2) for x in (query, key, value))
    if text_key is not None:
        key, value = torch.cat((key, text_key), dim=1), torch.cat((value, text_value), dim=1)
    return tuple(x.transpose(1, 2) for x in (query, key, value))


def _mask(grid, window, stride, dilation, circle, text_length, dtype, device) -> Tensor:
    """The additive mask, [N, N + text]."""
    axes = zip(grid, window, stride, dilation, strict=True)
    rows, columns = (axis_distances(*axis, circle).to(device) for axis in axes)
    seen = rows[:, None, :, None] + columns[None, :, None, :] < distance_limit(window[0], circle)
    seen = seen.flatten(2, 3).flatten(0, 1)
    return additive_mask(seen, text_length, dtype)


@lru_cache(maxsize=16)
def _kept_mask(*case) -> Tensor:
    with torch.inference_mode(False):  # a mask made in inference mode could not be saved for a later backward
        return _mask(*case)
