"""The feature maps of linear attention, which make queries and keys positive; one row each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class FeatureMap(NamedTuple):
    """One feature map phi.

    formula: phi in plain torch, [..., D] -> [..., features], never negative.
    fused: whether the backends of `linear_attention` compute it; if not, `formula.py` runs.
    vanishes_at: the value at which all features are 0; `linear_attention` writes it over masked keys.
    """

    formula: Callable[[Tensor], Tensor]
    fused: bool = False
    vanishes_at: float | None = None


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, that is x + 1 above 0 and exp(x) below; LinFusion's feature map (arXiv 2409.02097)."""
    return F.elu(x) + 1


FEATURE_MAPS = {"elu": FeatureMap(elu_plus_one, fused=True, vanishes_at=-math.inf)}
