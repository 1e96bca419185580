"""Block states: every part of the image weighs the sums over the other parts by itself (after MHLA, arXiv 2601.07832)."""

from __future__ import annotations

import torch
from torch import nn

from .plain import PlainMixer

SIDE = 4  # parts of an image along each axis, whatever its size


class BlockMixer(PlainMixer):
    """Linear attention with a learned factor on the weights between any two of SIDE x SIDE parts of an image.

    For a query in part a, a key in part b has the weight exp(c[a, b]) phi(q) . phi(k), with c [heads, parts, parts] learned
    and 0 at the start, which is LinearMixer. Parts are equal fractions of a grid's sides, so that c is for any size; of
    several grids those at the same place are one part. Text keys have no factor.
    """

    name = "blocks"

    def __init__(self, heads: int, head_dim: int, **settings):
        super().__init__(heads, head_dim, **settings)
        self.log_factors = nn.Parameter(torch.zeros(heads, SIDE**2, SIDE**2))

    def sums(self, query, key, value, layout, text_mask):
        """See PlainMixer."""
        (text_key, key), (text_value, value) = layout.split(key), layout.split(self.with_ones(value))
        parts = [tokens.to(query.device) for tokens in tokens_by_part(layout.grids)]
        states = [torch.einsum("bnhf,bnhe->bhfe", key[:, part], value[:, part]) for part in parts]
        mixed = torch.einsum("bghfe,hag->bahfe", torch.stack(states, dim=1), self.log_factors.to(query.dtype).exp())
        mixed = mixed + self.text_state(text_key, text_value, text_mask)[:, None]
        found = [torch.einsum("bnhf,bhfe->bnhe", query[:, part], mixed[:, a]) for a, part in enumerate(parts)]
        out = torch.cat(found, dim=1)[:, torch.argsort(torch.cat(parts))]
        return out[..., :-1], out[..., -1:]

    def flops(self, queries: int, keys: int) -> dict[str, int]:
        """LinearMixer's, and the mixing of the parts' states."""
        found = super().flops(queries, keys)
        found["products"] += 2 * SIDE**4 * self.heads * self.features * self.head_dim
        return found


def tokens_by_part(grids: tuple[tuple[int, int], ...]) -> list[torch.Tensor]:
    """For each part, the places of its tokens in the sequence of all grids."""
    numbers = []
    for rows, columns in grids:
        row, column = (torch.arange(side) * SIDE // side for side in (rows, columns))
        numbers.append((row[:, None] * SIDE + column).flatten())
    part = torch.cat(numbers)
    return [(part == number).nonzero().flatten() for number in range(SIDE**2)]
