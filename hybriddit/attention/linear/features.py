"""The feature maps of linear attention, which make queries and keys positive; one row each."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 2.0**40  # values beyond it count as this: then no sum or product of features overflows float32
LARGEST_SHARE = 2.0**100  # of the result's weights to near's where they are joined "joint", likewise
LARGEST_GATE = 40.0  # of gates beside a softmax, and of its log-sum-exp below 0: far alone, and more
LARGEST_FACTOR = 2.0**15  # likewise for the factors of products of degree 2


class FeatureMap(NamedTuple):
    """One feature map phi, from m channels to some number of features.

    formula: phi in plain torch, [..., m] -> [..., features], such that phi(q) . phi(k) is never negative.
    features: m -> number of features.
    eps: added to the denominator phi(q) . mean(phi(k)).
    fused: whether the backends of `linear_attention` compute it; if not, `formula.py` runs.
    """

    formula: Callable[[Tensor], Tensor]
    features: Callable[[int], int]
    eps: float
    fused: bool = False

    def channels(self, width: int) -> int:
        """The largest m with at most `width` features: the state is then no larger than [width, D]."""
        return max((m for m in range(1, width + 1) if self.features(m) <= width), default=1)


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, that is x + 1 above 0 and exp(x) below; LinFusion's feature map (arXiv 2409.02097)."""
    return F.elu(x.clamp(max=LARGEST)) + 1


def hedgehog(x: Tensor) -> Tensor:
    """(softmax(x), softmax(-x)) over the channels: sharp, and bounded (arXiv 2402.04347)."""
    return torch.cat((x.softmax(-1), (-x).softmax(-1)), dim=-1)


def polynomial(x: Tensor) -> Tensor:
    """All distinct products of degree 0, 1 and 2, so that phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(m).

    That is exp(s) up to its second order, and at least 1/2 (arXiv 2402.18668).
    """
    x = x.clamp(-LARGEST_FACTOR, LARGEST_FACTOR)
    x = torch.cat((torch.ones_like(x[..., :1]), x * x.shape[-1] ** -0.25), dim=-1)
    left, right, scale = product_pairs(x.shape[-1] - 1)
    return x[..., left] * x[..., right] * torch.tensor(scale, dtype=x.dtype, device=x.device)


@lru_cache(maxsize=16)
def product_pairs(channels: int) -> tuple[list[int], list[int], list[float]]:
    """The factors of each product of `polynomial`, as indices into (1, x_1, …, x_m), and its scale."""
    pairs = [(i, j) for i in range(channels + 1) for j in range(i, channels + 1)]
    scale = [math.sqrt(0.5) if i == j > 0 else 1.0 for i, j in pairs]
    return [i for i, _ in pairs], [j for _, j in pairs], scale


FEATURE_MAPS = {
    "elu": FeatureMap(elu_plus_one, lambda m: m, eps=1e-4, fused=True),
    "hedgehog": FeatureMap(hedgehog, lambda m: 2 * m, eps=1e-8, fused=True),
    "polynomial": FeatureMap(polynomial, lambda m: (m + 1) * (m + 2) // 2, eps=1e-8, fused=True),
}
