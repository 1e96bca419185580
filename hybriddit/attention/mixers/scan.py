"""Scans: linear attention whose weights decay with what lies between query and key, as in Mamba-2 (arXiv 2405.21060) and
gated linear attention (arXiv 2312.06635; for images DiG, arXiv 2405.18428). In both directions, by rows and by columns."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from ..trial import failure_reason, warn_once
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
                result = scan(*ordered)
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
    """sum_j query_i . key_j exp(-|L_i - L_j|) value_j, with L_i the sum of decays up to i.

    query, key [B, N, heads, features], value [B, N, heads, E], decay [B, N, heads, 1], not negative. On a GPU it is computed
    by flash-linear-attention's kernels where they are installed and give what plain torch does on a small case.
    """
    inputs = query, key, value, decay
    if query.device.type == "cuda" and query.dtype == torch.float32 and not torch.compiler.is_compiling():
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        if kernels_refusal(query.device, query.shape[3], value.shape[3], gradients) is None:
            return scan_by_kernels(*inputs)
    return scan_in_chunks(*inputs)


@lru_cache(maxsize=64)
def kernels_refusal(device: torch.device, features: int, width: int, gradients: bool) -> str | None:
    """Why flash-linear-attention's kernels do not scan here, or None; warns if they are installed and fail."""
    try:
        import fla.ops.simple_gla  # noqa: F401
    except ImportError:
        return "flash-linear-attention is not installed (pip install fla-core)"
    except Exception as error:  # one for another torch or Triton may raise anything
        warn_once(f"scans do not use flash-linear-attention, which fails with {type(error).__name__}: {error}")
        return "flash-linear-attention does not load"
    shapes = (2, 90, 3, features), (2, 90, 3, features), (2, 90, 3, width), (2, 90, 3, 1)
    run, reference = (
        lambda query, key, value, decay, scans=scans: scans(query, key, value, F.softplus(decay - 3))
        for scans in (scan_by_kernels, scan_in_chunks)
    )
    reason = failure_reason(run, reference, shapes, device, torch.float32, gradients)
    if reason:
        warn_once(f"scans do not use flash-linear-attention: {reason}")
    return reason


def scan_by_kernels(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """`scan` by flash-linear-attention: causal both ways, less each token's own part, which is in both.

    Its weights from j to a later i decay by tokens j + 1 to i, so the way back has each token's decay one place later.
    """
    from fla.ops.simple_gla import chunk_simple_gla

    decay = -decay.squeeze(-1)
    ahead, _ = chunk_simple_gla(query, key, value, g=decay, scale=1.0)
    back = [x.flip(1).contiguous() for x in (query, key, value, F.pad(decay[:, 1:], (0, 0, 0, 1)))]
    behind, _ = chunk_simple_gla(*back[:3], g=back[3], scale=1.0)
    return ahead + behind.flip(1) - (query * key).sum(-1, keepdim=True) * value


def scan_in_chunks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """`scan` in plain torch, chunk by chunk."""
    query, key, value, decay = (x.transpose(1, 2) for x in (query, key, value, decay))
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
    return out.flatten(2, 3)[:, :, :length].transpose(1, 2)


def _running(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """For each chunk what is left of the states before it: [B, heads, chunks, features, E]."""
    state, found = torch.zeros_like(states[:, :, 0]), []
    for own, share in zip(states.unbind(2), kept.unbind(2), strict=True):
        found.append(state)
        state = state * share + own
    return torch.stack(found, dim=2)
