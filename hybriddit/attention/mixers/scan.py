"""Scans: linear attention whose weights decay with what lies between query and key, as in Mamba-2 (arXiv 2405.21060) and
gated linear attention (arXiv 2312.06635; for images DiG, arXiv 2405.18428). In both directions, by rows and by columns."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .plain import PlainMixer

CHUNK = 64  # tokens whose weights are written at once
SHORTEST, LONGEST = 16.0, 4096.0  # tokens after which weights have fallen by e, at the start, of the heads


class ScanMixer(PlainMixer):
    """Linear attention with the weights phi(q_i) . phi(k_j) exp(-|L_i - L_j|), L being the sum of the tokens' decays.

    A token's decay is softplus(w . k + b) of its projected key's features, per head; at the start it is a constant, from
    1 / 16 in the first head to 1 / 4096 in the last. Even heads go through each grid row by row, odd ones column by column; both
    directions count, so that no token comes first. Text keys do not decay.
    """

    name = "scan"

    def __init__(self, heads: int, head_dim: int, **settings):
        super().__init__(heads, head_dim, **settings)
        reach = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), heads)
        self.decay_weight = nn.Parameter(torch.zeros(heads, self.features))
        self.decay_bias = nn.Parameter(torch.log(torch.expm1(1 / reach)))  # softplus of it is 1 / reach

    def sums(self, query, key, value, layout, text_mask):
        """See PlainMixer."""
        (text_key, key), (text_value, value) = layout.split(key), layout.split(self.with_ones(value))
        decay = torch.einsum("bnhf,hf->bnh", key, self.decay_weight.to(key.dtype)) + self.decay_bias.to(key.dtype)
        decay, found = F.softplus(decay).unsqueeze(-1), []
        sizes = [rows * columns for rows, columns in layout.grids]
        tokens = zip(*(x.split(sizes, dim=1) for x in (query, key, value, decay)), layout.grids, strict=True)
        for *parts, grid in tokens:
            out = torch.empty_like(parts[2])
            for heads, by_columns in ((slice(0, None, 2), False), (slice(1, None, 2), True)):
                ordered = [x[:, :, heads] for x in parts]
                if by_columns:
                    ordered = [turned(x, grid) for x in ordered]
                result = scan(*(x.transpose(1, 2) for x in ordered)).transpose(1, 2)
                out[:, :, heads] = turned(result, grid[::-1]) if by_columns else result
            found.append(out)
        text = torch.einsum("bmhf,bhfe->bmhe", query, self.text_state(text_key, text_value, text_mask))
        out = torch.cat(found, dim=1) + text
        return out[..., :-1], out[..., -1:]

    def flops(self, queries: int, keys: int) -> dict[str, int]:
        """LinearMixer's twice, for both directions, and the weights within chunks."""
        found = super().flops(queries, keys)
        within = 2 * queries * self.heads * CHUNK * (self.features + self.head_dim)
        state = 2 * (queries + keys) * self.heads * self.features * self.head_dim
        return {**found, "products": found["products"] + state + within}


def turned(x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The tokens of a grid column by column: [B, rows * columns, ...] -> [B, columns * rows, ...]."""
    return x.unflatten(1, grid).transpose(1, 2).flatten(1, 2)


def scan(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """sum_j query_i . key_j exp(-|L_i - L_j|) value_j, with L_i the sum of decays up to i, chunk by chunk.

    query, key [B, heads, N, features], value [B, heads, N, E], decay [B, heads, N, 1], not negative.
    """
    length = query.shape[2]
    size = min(CHUNK, length)
    query, key, value, decay = (
        F.pad(x, (0, 0, 0, -length % size)).unflatten(2, (-1, size)) for x in (query, key, value, decay)
    )
    place = decay.cumsum(3)  # [B, heads, chunks, size, 1], within the chunk
    whole = place[:, :, :, -1:]
    within = torch.exp(-(place - place.transpose(3, 4)).abs())
    out = (query @ key.transpose(3, 4) * within) @ value
    # what is left of a token at its chunk's end, and at its start; likewise of a query
    ahead = (key * torch.exp(place - whole)).transpose(3, 4) @ value
    behind = (key * torch.exp(-place)).transpose(3, 4) @ value
    kept = torch.exp(-whole)
    before, after = _running(ahead, kept), _running(behind.flip(2), kept.flip(2)).flip(2)
    out = out + (query * torch.exp(-place)) @ before + (query * torch.exp(place - whole)) @ after
    return out.flatten(2, 3)[:, :, :length]


def _running(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """For each chunk what is left of the states before it: [B, heads, chunks, features, E]."""
    state, found = torch.zeros_like(states[:, :, 0]), []
    for own, share in zip(states.unbind(2), kept.unbind(2), strict=True):
        found.append(state)
        state = state * share + own
    return torch.stack(found, dim=2)
