"""Generalized linear attention, the far branch of the defaults and of LinFusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..inputs import sum_dtype
from ..layout import TokenLayout
from ..linear import FEATURE_MAPS, KeySums, begin_sum_keys, linear_attention, sum_keys
from ..rows import RowShard
from ..work import Work, attention_work

MAX_CHANNELS, MAX_FEATURES = 128, 256  # of the kernels


class LinearMixer(nn.Module):
    """Generalized linear attention (arXiv 2409.02097): every query sees all keys, at a cost linear in both.

    Queries and keys are projected by a learned matrix per head, one for each of the two, and then made positive by phi.

    Args:
        heads, head_dim: of queries, keys and values.
        feature_map: phi, a key of `linear.FEATURE_MAPS`.
        projection: channels m of the projections [heads, D, m], up to 128; they start alike, with orthonormal columns
            (rows if m > D). 0: none. None: as many channels as give phi at most D features.
        temperature: whether each head learns a temperature of its queries and one of its keys, 1 at the start.
        center_keys: whether the mean over the tokens is subtracted from the keys.

    Raises ValueError for an unknown feature map, and a projection that is too wide for it.
    """

    states = 1  # sums over the keys that it holds for a head, of which each query sees one or several

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        feature_map: str = "polynomial",
        projection: int | None = None,
        temperature: bool = False,
        center_keys: bool = False,
    ):
        super().__init__()
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"unknown feature map {feature_map!r}: use one of {', '.join(FEATURE_MAPS)}")
        phi = FEATURE_MAPS[feature_map]
        if projection is None:
            projection = phi.channels(head_dim)
        channels = projection or head_dim
        most = min(MAX_CHANNELS, phi.channels(MAX_FEATURES))
        if projection > most or phi.features(channels) > MAX_FEATURES:
            what = f"a projection of {projection} channels" if projection else f"heads of {head_dim} without projection"
            raise ValueError(f"feature map {feature_map!r} does not take {what}: use a projection of at most {most}")
        self.heads, self.head_dim, self.feature_map, self.center_keys = heads, head_dim, feature_map, center_keys
        self.channels, self.features = channels, phi.features(channels)
        self.spreads = FEATURE_MAPS[feature_map].fused
        self.sums_add_up = self.spreads and not center_keys
        self.projection_q = self.projection_k = self.log_temperature_q = self.log_temperature_k = None
        if projection:
            self.projection_q, self.projection_k = (nn.Parameter(torch.empty(heads, head_dim, channels)) for _ in "qk")
            for matrix in self.projection_q.data:
                nn.init.orthogonal_(matrix)
            self.projection_k.data.copy_(self.projection_q.data)
        if temperature:
            self.log_temperature_q, self.log_temperature_k = (nn.Parameter(torch.zeros(heads, 1, 1)) for _ in "qk")

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        near: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        key_mask: torch.Tensor | None = None,
        joint: bool = False,
        lse: torch.Tensor | None = None,
        only_sums: bool = False,
        rows: RowShard | None = None,
        layout: TokenLayout | None = None,
    ) -> torch.Tensor | KeySums | Callable[[int], KeySums] | None:
        """Attend to all keys: query [B, M, heads, D], key and value [B, N, heads, D] -> [B, M, heads, D].

        near, gate: the result is near + gate * (far - near), computed in one pass. joint: the gate is multiplied by the
        sum of the keys' weights, to x, and x / (1 + |x|) takes its place. lse: near's log-sum-exp [B, M, heads]; the gate
        is then sinh(gate) / 10 * exp(-lse). key_mask: bool [B, N], False for keys to leave out.

        only_sums: give the sums over all keys instead, and what each query needs besides, which `joined_attention`
        takes; without gradients. None for a feature map that the backends of `linear_attention` lack. (It is not a
        method of its own, because offloading loads weights for `forward` alone.)

        rows: of an image that is spread over processes, which rows these tokens are, see `linear_attention`. only_sums
        then gives what `begin_sum_keys` does, with gradients.

        layout: of the keys. It makes no difference here: the sums are over all keys, wherever they are.
        """
        if only_sums and not FEATURE_MAPS[self.feature_map].fused:
            return None
        query, key, phi = self.prepared(query, key, key_mask, rows)
        if only_sums and rows is not None:
            return begin_sum_keys(query, key, value, rows=rows, **phi)
        if only_sums:
            return sum_keys(query, key, value, key_mask=key_mask, **phi)
        beside = {"near": near, "gate": gate, "joint": joint, "lse": lse}
        return linear_attention(query, key, value, key_mask=key_mask, rows=rows, **beside, **phi)

    def prepared(
        self, query: torch.Tensor, key: torch.Tensor, key_mask: torch.Tensor | None, rows: RowShard | None
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Query and key, centred and cooled, and phi and the projections as `linear_attention` takes them."""
        if self.center_keys:
            key = key - mean_key(key, key_mask, rows)
        query, query_projection = cooled(query, self.projection_q, self.log_temperature_q)
        key, key_projection = cooled(key, self.projection_k, self.log_temperature_k)
        projections = {"query_projection": query_projection, "key_projection": key_projection}
        return query, key, {"feature_map": self.feature_map, **projections}

    def flops(self, queries: int, keys: int) -> dict[str, int]:
        """FLOPs of one image: the matrix "products", and the "normalization" (the denominator's two sums)."""
        tokens = (queries + keys) * self.heads
        projected = 0 if self.projection_q is None else self.head_dim * self.channels
        return {
            "products": 2 * tokens * (projected + self.features * self.head_dim),
            "normalization": 2 * tokens * self.features,
        }

    def work(self, queries: int, keys: int, element_size: int) -> dict[str, Work]:
        """The work of this branch alone, by direction (see `attention_work`); FLOPs are those of the products."""
        width = self.heads * self.head_dim
        inputs, outputs = (queries + 2 * keys) * width, queries * width
        return attention_work(inputs, outputs, self.flops(queries, keys)["products"], element_size)


def mean_key(key: torch.Tensor, key_mask: torch.Tensor | None, rows: RowShard | None) -> torch.Tensor:
    """The mean of the keys that are not masked, of all processes: [B, N, heads, D] -> [B, 1, heads, D]."""
    if key_mask is None and rows is None:
        return key.mean(1, keepdim=True)
    seen = key.new_ones(len(key), key.shape[1], 1, 1) if key_mask is None else key_mask[:, :, None, None]
    total, count = (key * seen).sum(1, keepdim=True), seen.sum(1, keepdim=True)
    if rows is not None:
        dtype = sum_dtype(key.dtype)
        total, count = rows.total(total.to(dtype), count.to(dtype))()
    return (total / count).to(key.dtype)


def cooled(
    x: torch.Tensor, projection: torch.Tensor | None, log_temperature: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Divide by the temperature: the projection where there is one, as it is smaller, else x [B, N, heads, D]."""
    if log_temperature is None:
        return x, projection
    factor = torch.exp(-log_temperature)
    if projection is None:
        return x * factor.squeeze(-1).to(x.dtype), None
    return x, projection * factor
