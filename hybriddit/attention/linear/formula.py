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
    count = max(key.shape[1], 1) if key_mask is None else key_mask.sum(1)[:, None, None, None]
    settings = {"feature_map": feature_map, "query_projection": query_projection, "key_projection": key_projection}
    numerator, denominator = linear_attention_sums(query, key, value, key_mask=key_mask, **settings)
    eps = FEATURE_MAPS[feature_map].eps if eps is None else eps
    return numerator / count / (denominator / count + eps)


def linear_attention_sums(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str = "elu",
    query_projection: Tensor | None = None,
    key_projection: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sums over j of phi(q_i) . phi(k_j) v_j and of phi(q_i) . phi(k_j): [B, M, heads, E] and [B, M, heads, 1].

    Arguments as above.
    """
    phi = FEATURE_MAPS[feature_map].formula
    if query_projection is not None:
        query, key = (
            torch.einsum("bnhd,hdm->bnhm", x.clamp(-LARGEST, LARGEST), projection.to(x.dtype))
            for x, projection in ((query, query_projection), (key, key_projection))
        )
    query, key = phi(query), phi(key)
    if key_mask is not None:
        key = key * key_mask[:, :, None, None]
    state = torch.einsum("bnhf,bnhe->bhfe", key, value)
    total = key.sum(1).unsqueeze(-1)  # [B, heads, features, 1]
    return tuple(torch.einsum("bmhf,bhfe->bmhe", query, sums) for sums in (state, total))
