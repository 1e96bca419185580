"""The feature maps of linear attention, one row each: what makes queries and keys positive."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class FeatureMap(NamedTuple):
    """One feature map phi.

    formula: phi in plain torch, [..., D] -> [..., features], nowhere below 0.
    fused: whether the backends of `linear_attention` compute it; else `formula.py` is what runs.
    vanishes_at: a raw key whose features are all 0, by which the backends leave a masked key out.
    """

    formula: Callable[[Tensor], Tensor]
    fused: bool = False
    vanishes_at: float | None = None


def elu_plus_one(x: Tensor) -> Tensor:
    """x + 1 above 0 and exp(x) below (LinFusion's, arXiv 2409.02097)."""
    return F.elu(x) + 1


FEATURE_MAPS = {"elu": FeatureMap(elu_plus_one, fused=True, vanishes_at=-math.inf)}
