"""Multi-scale linear attention: keys and values of small neighbourhoods beside those of tokens (EfficientViT, arXiv
2205.14756)."""

from __future__ import annotations

import torch
from torch import nn

from ..layout import TokenLayout
from ..rows import RowShard
from .linear import LinearMixer

SIDE = 5  # of a neighbourhood, in tokens


class MultiscaleMixer(LinearMixer):
    """Linear attention over the image's tokens and, as further keys, SIDE x SIDE neighbourhoods around each.

    Keys and values of the neighbourhoods are depthwise convolutions of the tokens', averages at the start. (EfficientViT
    has queries at this scale too, and heads for each; here the heads are the pretrained layer's.)
    """

    def __init__(self, heads: int, head_dim: int, **settings):
        super().__init__(heads, head_dim, **settings)
        self.spreads = self.sums_add_up = False
        width = heads * head_dim
        self.key_conv, self.value_conv = (
            nn.Conv2d(width, width, SIDE, padding=SIDE // 2, groups=width, bias=False) for _ in range(2)
        )
        for conv in (self.key_conv, self.value_conv):
            nn.init.constant_(conv.weight, SIDE**-2)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        key_mask: torch.Tensor | None = None,
        only_sums: bool = False,
        rows: RowShard | None = None,
        layout: TokenLayout | None = None,
        **settings,
    ) -> torch.Tensor | None:
        """As LinearMixer's, with a layout. Raises ValueError for an image that is spread over processes."""
        if rows is not None:
            raise ValueError("the far branch's mixer 'multiscale' does not run on an image spread over processes")
        if only_sums:  # which count every token once
            return None
        if key_mask is not None:
            key_mask = torch.cat((key_mask, key_mask.new_ones(len(key), layout.image_length)), dim=1)
        key, value = (
            torch.cat((x, _around(conv, layout.split(x)[1], layout.grids)), dim=1)
            for conv, x in ((self.key_conv, key), (self.value_conv, value))
        )
        return super().forward(query, key, value, key_mask=key_mask, **settings)

    def flops(self, queries: int, keys: int) -> dict[str, int]:
        """LinearMixer's with twice the keys, and the convolutions."""
        found = super().flops(queries, 2 * keys)
        found["products"] += 2 * 2 * keys * self.key_conv.weight.numel()
        return found


def _around(conv: nn.Conv2d, image: torch.Tensor, grids: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """A convolution of each grid by itself: [B, N, heads, D] -> [B, N, heads, D]."""
    images = image.flatten(2).transpose(1, 2).split([rows * columns for rows, columns in grids], dim=2)
    images = [conv(x.unflatten(2, grid)).flatten(2) for x, grid in zip(images, grids, strict=True)]
    return torch.cat(images, dim=2).transpose(1, 2).unflatten(2, image.shape[2:])
