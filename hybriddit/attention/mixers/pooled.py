"""Pooled keys: softmax weights of averages over the parts of an image (as in PVT, arXiv 2102.12122, with a fixed number)."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import adaptive_avg_pool2d

from ..linear.features import LARGEST_GATE
from .plain import PlainMixer


class PooledMixer(PlainMixer):
    """Weights exp(q . k / sqrt(m)) of the averages of keys over S x S parts of each grid, with the averages of the values.

    S is the root of the heads' width, rounded: whatever the image's size there are about as many pooled keys as
    LinearMixer has features, so that the cost is linear. The weight is bounded by exp(40), and counts the pooled tokens.
    Text keys are not pooled. There is no feature map: raises ValueError for another than the default.
    """

    name = "pooled"

    def __init__(self, heads: int, head_dim: int, *, feature_map: str = "polynomial", **settings):
        if feature_map != "polynomial":
            raise ValueError(
                f"mixer 'pooled' weighs keys by exp(q . k), without feature map {feature_map!r}: leave that at 'polynomial'"
            )
        super().__init__(heads, head_dim, feature_map=feature_map, **settings)
        self.side = max(1, round(math.sqrt(head_dim)))

    def phi(self, x: torch.Tensor) -> torch.Tensor:
        """No feature map, but half of the scores' scale."""
        return x * x.shape[-1] ** -0.25

    def sums(self, query, key, value, layout, text_mask):
        """See PlainMixer."""
        (text_key, key), (text_value, value) = layout.split(key), layout.split(self.with_ones(value))
        sizes = [rows * columns for rows, columns in layout.grids]
        keys, values = [text_key], [text_value if text_mask is None else text_value * text_mask]
        for image_key, image_value, grid in zip(key.split(sizes, 1), value.split(sizes, 1), layout.grids, strict=True):
            pooled_key, pooled_value = (self._pooled(x, grid) for x in (image_key, image_value))
            keys.append(pooled_key)
            values.append(pooled_value * (math.prod(grid) / pooled_value.shape[1]))  # each stands for so many tokens
        scores = torch.einsum("bmhf,bphf->bhmp", query, torch.cat(keys, dim=1)).clamp(-LARGEST_GATE, LARGEST_GATE)
        out = torch.einsum("bhmp,bphe->bmhe", scores.exp(), torch.cat(values, dim=1))
        return out[..., :-1], out[..., -1:]

    def _pooled(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Averages over the parts of one grid: [B, N, heads, E] -> [B, side * side, heads, E]."""
        parts = adaptive_avg_pool2d(x.flatten(2).transpose(1, 2).unflatten(2, grid), self.side)
        return parts.flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])

    def flops(self, queries: int, keys: int) -> dict[str, int]:
        """The projections, and the products with the pooled keys and values of one grid."""
        projected = 0 if self.projection_q is None else self.head_dim * self.channels
        pairs = queries * self.heads * self.side**2
        products = 2 * (queries + keys) * self.heads * projected + 2 * pairs * (self.channels + self.head_dim)
        return {"products": products, "normalization": 2 * pairs}
