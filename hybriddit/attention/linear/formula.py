"""The plain formula of linear attention, in any dtype: the reference for every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .features import FEATURE_MAPS


def linear_attention_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    eps: float = 1e-4,
    feature_map: str = "elu",
    key_mask: Tensor | None = None,
) -> Tensor:
    """Linear attention, computed directly from its formula.

    out_i = phi(q_i) state / (phi(q_i) . mean + eps), with state = mean_j phi(k_j) v_j^T and mean = mean_j phi(k_j).
    query [B, M, heads, D], key [B, N, heads, D], value [B, N, heads, E], key_mask bool [B, N] -> [B, M, heads, E].
    """
    phi = FEATURE_MAPS[feature_map].formula
    query, key, count = phi(query), phi(key), max(key.shape[1], 1)
    if key_mask is not None:
        key = key * key_mask[:, :, None, None]
        count = key_mask.sum(1)[:, None, None, None]
    state = torch.einsum("bnhd,bnhe->bhde", key, value) / count
    mean = key.sum(1).unsqueeze(-1) / count  # [B, heads, D, 1]
    weighted, total = (torch.einsum("bmhd,bhde->bmhe", query, sums) for sums in (state, mean))
    return weighted / (total + eps)
