"""Hide padded text by an extra channel, because no backend of window attention takes a mask over text."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor

# The score of a padded text key, so low that its softmax weight is exactly 0.
PADDED_SCORE = -1e4
# Heads are widened to the next multiple of this, a width that kernels load without a mask.
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
    """Widen the heads so that padded text gets a weight of exactly 0 and all other scores stay as they are.

    In the first added channel queries are 1, keys are 0, and keys of padded text are negative; other added channels are
    0, and so are the output's. query, key, value [B, H, W, heads, D]; text [B, S, heads, D]; text_mask bool [B, S].
    scale: that of the true width.
    """
    head_dim = operator.index(query.shape[-1])
    channels = HEAD_DIM_MULTIPLE - head_dim % HEAD_DIM_MULTIPLE
    padded = ~text_mask[:, :, None, None]  # [B, S, 1, 1]
    # float16's largest value is 65504: half of it leaves room for sums
    lowest = max(PADDED_SCORE / scale, torch.finfo(query.dtype).min / 2)
    query = torch.cat((query, _channels(query, channels, 1.0)), dim=-1)
    key, value, text_value = (F.pad(x, (0, channels)) for x in (key, value, text_value))
    hidden = _channels(text_key, channels, lowest).masked_fill(~padded, 0)
    text_key = torch.cat((text_key.masked_fill(padded, 0), hidden), dim=-1)
    return query, key, value, text_key, text_value


def _channels(x: Tensor, count: int, first: float) -> Tensor:
    """Channels to add to x [..., D]: [..., count], the first one `first`, the others 0."""
    return F.pad(x.new_full((*x.shape[:-1], 1), first), (0, count - 1))
