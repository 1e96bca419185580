"""The log-sum-exp of window attention, by one more key, because most backends do not give it, or not its gradients."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import sum_dtype

# The score of the key that is added, above that of the query's own key, which is always seen: its weight is then at most
# a 400th of the sum, and not too small for any dtype.
SCORE = -6.0
CHANNELS = 8  # added to the heads, of which one is needed: a width that kernels load without a mask


def lse_by_one_more_key(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor | None,
    text_value: Tensor | None,
    *,
    scale: float,
    **settings,
) -> tuple[Tensor, Tensor]:
    """Window attention and its log-sum-exp [B, H, W, heads]; see `neighborhood_attention`, which `attend` is.

    A key of weight e is put beside the text. Its value, 1 in a channel of its own, comes out as e / (Z + e), where Z is
    the sum of the true keys' weights; so gradients are right with every backend. What lies more than some 60 above the
    query's score with its own key is beyond float32, and counts as that.
    """
    head_dim, batch, heads = operator.index(query.shape[-1]), query.shape[0], query.shape[3]
    with torch.no_grad():  # the result does not depend on e
        score = (query * key).sum(-1, keepdim=True)
        score = score - score.abs() / 64 + SCORE / scale  # lower by what bfloat16 may round the scores
    query = torch.cat((query, F.pad(score, (0, CHANNELS - 1))), 4)
    key, value, text_key, text_value = (
        None if x is None else F.pad(x, (0, CHANNELS)) for x in (key, value, text_key, text_value)
    )
    one = F.pad(query.new_ones(batch, 1, heads, 1), (head_dim, CHANNELS - 1))  # as a key and as a value
    if text_key is None:
        text_key, text_value = one, one
    else:
        text_key, text_value = torch.cat((text_key, one), 1), torch.cat((text_value, one), 1)
    out = attend(query, key, value, text_key=text_key, text_value=text_value, scale=scale, **settings)
    out, rest = out[..., :head_dim], out[..., head_dim].to(sum_dtype(out.dtype))
    rest = rest.clamp(1e-30, 0.5)
    out = (out / (1 - rest).unsqueeze(-1)).to(out.dtype)
    return out, torch.log1p(-rest) - rest.log() + score[..., 0].to(rest.dtype) * scale
