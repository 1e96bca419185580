"""Far branches: modules that attend to the whole image at a cost linear in its tokens.

A mixer is made by Mixer(heads, head_dim, feature_map=...) and has the methods of LinearMixer: `forward`, `flops` and
`work`. Another mixer takes one file and a row of `MIXERS`.
"""

from __future__ import annotations

import torch
from torch import nn

from .linear import FEATURE_MAPS, linear_attention
from .work import Work, attention_work


class LinearMixer(nn.Module):
    """Generalized linear attention (arXiv 2409.02097): every query sees all keys, at a cost linear in both.

    It has no weights. heads, head_dim: of queries, keys and values. feature_map: a key of `linear.FEATURE_MAPS`.
    """

    def __init__(self, heads: int, head_dim: int, *, feature_map: str = "elu"):
        super().__init__()
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"unknown feature map {feature_map!r}: use one of {', '.join(FEATURE_MAPS)}")
        self.heads, self.head_dim, self.feature_map = heads, head_dim, feature_map

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        near: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to all keys: query [B, M, heads, D], key and value [B, N, heads, D] -> [B, M, heads, D].

        near, gate: the result is near + gate * (far - near), computed in one pass. key_mask: bool [B, N], False for
        keys to leave out.
        """
        return linear_attention(
            query, key, value, near=near, gate=gate, key_mask=key_mask, feature_map=self.feature_map
        )

    def flops(self, queries: int, keys: int) -> dict[str, int]:
        """FLOPs of one image: the matrix "products", and the "normalization" (the denominator's two sums)."""
        tokens, width = queries + keys, self.heads * self.head_dim
        return {"products": 2 * tokens * width * self.head_dim, "normalization": 2 * tokens * width}

    def work(self, queries: int, keys: int, element_size: int) -> dict[str, Work]:
        """The work of this branch alone, by direction (see `attention_work`); FLOPs are those of the products."""
        width = self.heads * self.head_dim
        inputs, outputs = (queries + 2 * keys) * width, queries * width
        return attention_work(inputs, outputs, self.flops(queries, keys)["products"], element_size)


MIXERS = {"linear": LinearMixer}


def check_mixer(mixer: str, feature_map: str) -> None:
    """Raise ValueError for an unknown mixer, or a feature map that the mixer does not have."""
    if mixer not in MIXERS:
        raise ValueError(f"unknown mixer {mixer!r}: use one of {', '.join(MIXERS)}")
    with torch.device("meta"):
        MIXERS[mixer](1, 1, feature_map=feature_map)
