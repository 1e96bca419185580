"""The plain formula of linear attention, in any dtype: the reference for every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .features import FEATURE_MAPS, LARGEST


def linear_attention_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    eps: float | None = None,
    feature_map: str = "elu",
    query_projection: Tensor | None = None,
    key_projection: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Linear attention, computed directly from its formula.

    out_i = phi(q_i) state / (phi(q_i) . mean + eps), with state = mean_j phi(k_j) v_j^T and mean = mean_j phi(k_j).
    Where there are projections, q_i is replaced by q_i query_projection, and k_j by k_j key_projection.

    query [B, M, heads, D], key [B, N, heads, D], value [B, N, heads, E], projections [heads, D, m], key_mask bool
    [B, N] -> [B, M, heads, E]. eps: None is the feature map's own.
    """
    row, count = FEATURE_MAPS[feature_map], max(key.shape[1], 1)
    if query_projection is not None:
        query, key = (
            torch.einsum("bnhd,hdm->bnhm", x.clamp(-LARGEST, LARGEST), projection.to(x.dtype))
            for x, projection in ((query, query_projection), (key, key_projection))
        )
    query, key = row.formula(query), row.formula(key)
    if key_mask is not None:
        key = key * key_mask[:, :, None, None]
        count = key_mask.sum(1)[:, None, None, None]
    state = torch.einsum("bnhf,bnhe->bhfe", key, value) / count
    mean = key.sum(1).unsqueeze(-1) / count  # [B, heads, features, 1]
    weighted, total = (torch.einsum("bmhf,bhfe->bmhe", query, sums) for sums in (state, mean))
    return weighted / (total + (row.eps if eps is None else eps))
