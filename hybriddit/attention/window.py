"""Neighborhood (sliding-window) attention over a 2-D grid, plus text that every query sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _axis_mask(n, window, stride, dilation):
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        r, j = i % dilation, i // dilation
        n_r = (n - r + dilation - 1) // dilation
        w = min(window, n_r)
        s = min(stride, w)
        leader = min(j // s * s + s // 2, n_r - 1)
        start = min(max(leader - w // 2, 0), n_r - w)
        for t in range(start, start + w):
            mask[i, r + dilation * t] = True
    return mask


def neighborhood_attention(
    query, key, value, *, window, stride=1, dilation=1, scale=None, text_key=None, text_value=None, backend="auto"
):
    """Placeholder: a dense mask."""
    b, h, w, heads, d = query.shape
    pair = lambda x: (x, x) if isinstance(x, int) else x
    window, stride, dilation = pair(window), pair(stride), pair(dilation)
    rows, cols = (_axis_mask(n, window[i], stride[i], dilation[i]) for i, n in enumerate((h, w)))
    mask = (rows[:, None, :, None] & cols[None, :, None, :]).reshape(h * w, h * w).to(query.device)
    k, v = key.flatten(1, 2), value.flatten(1, 2)
    if text_key is not None:
        k, v = torch.cat((k, text_key), 1), torch.cat((v, text_value), 1)
        mask = F.pad(mask, (0, text_key.shape[1]), value=True)
    q, k, v = (x.transpose(1, 2) for x in (query.flatten(1, 2), k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).reshape(b, h, w, heads, -1)
