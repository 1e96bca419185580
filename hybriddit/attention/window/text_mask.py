"""Padded text, hidden by a further channel: no backend of window attention takes a mask over text."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor

# The score of a padded text key: its exponential is 0 beside that of any other score.
PADDED_SCORE = -1e4
# Kernels load head widths whole that are multiples of this: a head is widened to the next one.
HEAD_DIM_MULTIPLE = 8


def hide_padded_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_mask: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The inputs with wider heads, such that padded text has a weight of exactly 0 and all other scores are unchanged.

    In the first added channel queries are 1 and keys 0, but those of padded text are negative; the others are 0. The
    output's added channels are 0. query, key, value [B, H, W, heads, D]; text [B, S, heads, D]; text_mask bool [B, S];
    scale is that of the true width.
    """
    head_dim = operator.index(query.shape[-1])
    channels = HEAD_DIM_MULTIPLE - head_dim % HEAD_DIM_MULTIPLE
    padded = ~text_mask[:, :, None, None]  # [B, S, 1, 1]
    # float16 ends at 65504: half of it leaves room for sums
    lowest = max(PADDED_SCORE / scale, torch.finfo(query.dtype).min / 2)
    query = torch.cat((query, _channels(query, channels, 1.0)), dim=-1)
    key, value, text_value = (F.pad(x, (0, channels)) for x in (key, value, text_value))
    hidden = _channels(text_key, channels, lowest).masked_fill(~padded, 0)
    text_key = torch.cat((text_key.masked_fill(padded, 0), hidden), dim=-1)
    return query, key, value, text_key, text_value


def _channels(x: Tensor, count: int, first: float) -> Tensor:
    """[..., D] -> [..., count], the first of them `first` and the others 0."""
    return F.pad(x.new_full((*x.shape[:-1], 1), first), (0, count - 1))
