"""The plain formula of linear attention, in any dtype: the reference for every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .features import FEATURE_MAPS, LARGEST, LARGEST_GATE, LARGEST_SHARE


def linear_attention_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    near: Tensor | None = None,
    gate: Tensor | None = None,
    joint: bool = False,
    lse: Tensor | None = None,
    eps: float | None = None,
    feature_map: str = "elu",
    query_projection: Tensor | None = None,
    key_projection: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Linear attention, computed directly from its formula.

    out_i = phi(q_i) state / (phi(q_i) . mean + eps), with state = mean_j phi(k_j) v_j^T and mean = mean_j phi(k_j).
    Where there are projections, q_i is replaced by q_i query_projection, and k_j by k_j key_projection. Where there is
    near, the result is near + gate * (out - near); with joint, `joint_share` of the gate and the denominator, as a sum
    over the keys, takes the gate's place; with near's log-sum-exp lse, of `joint_gate`.

    query [B, M, heads, D], key [B, N, heads, D], value and near [B, N, heads, E], projections [heads, D, m], key_mask
    bool [B, N] -> [B, M, heads, E]. eps: None is the feature map's own.
    """
    phi = FEATURE_MAPS[feature_map]
    if query_projection is not None:
        query, key = (
            torch.einsum("bnhd,hdm->bnhm", x.clamp(-LARGEST, LARGEST), projection.to(x.dtype))
            for x, projection in ((query, query_projection), (key, key_projection))
        )
    query, key = phi.formula(query), phi.formula(key)
    count = max(key.shape[1], 1)
    if key_mask is not None:
        key, count = key * key_mask[:, :, None, None], key_mask.sum(1)[:, None, None, None]
    state = torch.einsum("bnhf,bnhe->bhfe", key, value) / count
    mean = key.sum(1).unsqueeze(-1) / count  # [B, heads, features, 1]
    numerator, denominator = (torch.einsum("bmhf,bhfe->bmhe", query, sums) for sums in (state, mean))
    denominator = denominator + (phi.eps if eps is None else eps)
    return join_far(numerator / denominator, denominator * count, near, gate, joint, lse)


def join_far(
    far: Tensor, weights: Tensor, near: Tensor | None, gate: Tensor | None, joint: bool, lse: Tensor | None
) -> Tensor:
    """The far branch's result joined with near's, as `linear_attention_formula` says; itself where there is no near.

    far, near: [B, M, heads, E]. weights: the sum of the keys' weights in far, [B, M, heads, 1].
    """
    if near is None:
        return far
    gate = gate if lse is None else joint_gate(gate, lse)
    return near + (joint_share(gate, weights) if joint else gate) * (far - near)


def joint_gate(gate: Tensor, lse: Tensor) -> Tensor:
    """sinh(gate) / 10 * exp(-lse): what a gate is worth beside a softmax of this log-sum-exp.

    gate: broadcastable to [B, M, heads, 1 or E]. lse: [B, M, heads]. Both are bounded, so that no product and no
    gradient overflows.
    """
    gate = torch.sinh(gate.to(lse.dtype).clamp(-LARGEST_GATE, LARGEST_GATE)) / 10
    return gate * torch.exp(-lse.clamp(min=-LARGEST_GATE)).unsqueeze(-1)


def joint_share(gate: Tensor, denominator: Tensor) -> Tensor:
    """x / (1 + |x|) with x = gate * denominator: the result's share where it is joined "joint"."""
    x = (gate * denominator).clamp(-LARGEST_SHARE, LARGEST_SHARE)
    return x / (1 + x.abs())
