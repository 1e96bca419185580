"""What mixers in plain torch share: one that weighs the keys by more than phi(q) . phi(k) has a method `sums`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..inputs import autocast, sum_dtype
from ..layout import TokenLayout
from ..linear import FEATURE_MAPS
from ..linear.features import LARGEST
from ..linear.formula import join_far
from ..rows import RowShard
from .linear import LinearMixer, cooled, mean_key


class PlainMixer(LinearMixer):
    """A far branch whose sums over the keys depend on where these are in the image. The base of such mixers.

    Settings are LinearMixer's. It runs in plain torch, in float32 at least, on whole images alone.
    """

    name: str  # in messages

    def __init__(self, heads: int, head_dim: int, **settings):
        super().__init__(heads, head_dim, **settings)
        self.spreads = self.sums_add_up = False

    def phi(self, x: torch.Tensor) -> torch.Tensor:
        """The feature map, of projected queries or keys: [B, N, heads, m] -> [B, N, heads, features]."""
        return FEATURE_MAPS[self.feature_map].formula(x)

    def sums(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: TokenLayout,
        text_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For every query, the sum of the weighted values and the sum of the weights: [B, M, heads, D], [B, M, heads, 1].

        query [B, M, heads, features] of the image; key [B, N, heads, features] and value [B, N, heads, D] of its tokens and
        of text, as the layout says. text_mask: [B, T, 1, 1], 0 for text to leave out, else 1; None: there is none.
        """
        raise NotImplementedError

    @staticmethod
    def with_ones(value: torch.Tensor) -> torch.Tensor:
        """Values with a channel of ones behind, whose weighted sum is that of the weights."""
        return F.pad(value, (0, 1), value=1.0)

    @staticmethod
    def text_state(key: torch.Tensor, value: torch.Tensor, text_mask: torch.Tensor | None) -> torch.Tensor:
        """The sum of phi(k) v^T over text, [B, heads, features, E]; 0 where there is none."""
        return torch.einsum("bnhf,bnhe->bhfe", key if text_mask is None else key * text_mask, value)

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
    ) -> torch.Tensor | None:
        """As LinearMixer's, with a layout; key_mask hides text alone. Raises ValueError for an image spread over processes."""
        if rows is not None:
            raise ValueError(f"the far branch's mixer {self.name!r} does not run on an image spread over processes")
        if only_sums:
            return None
        if self.center_keys:
            key = key - mean_key(key, key_mask, None)
        dtype = value.dtype
        query, key, value, *beside = autocast((query, key, value) if near is None else (query, key, value, near))
        with torch.autocast(query.device.type, enabled=False):
            query, key, value = (x.to(sum_dtype(x.dtype)) for x in (query, key, value))
            query, key = (
                self.phi(
                    x
                    if matrix is None
                    else torch.einsum("bnhd,hdm->bnhm", x.clamp(-LARGEST, LARGEST), matrix.to(x.dtype))
                )
                for x, matrix in (
                    cooled(query, self.projection_q, self.log_temperature_q),
                    cooled(key, self.projection_k, self.log_temperature_k),
                )
            )
            text_mask = None if key_mask is None else layout.split(key_mask)[0].to(key.dtype)[:, :, None, None]
            out, weights = self.sums(query, key, value, layout, text_mask)
            weights = weights + FEATURE_MAPS[self.feature_map].eps * key.shape[1]
            near = beside[0].to(out.dtype) if beside else None
            return join_far(out / weights, weights, near, gate, joint, lse).to(dtype)
