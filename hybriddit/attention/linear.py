"""Generalized linear attention (LinFusion, arXiv 2409.02097): non-causal, normalised, phi = elu + 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear_attention(query, key, value, *, eps=1e-4, backend="auto"):
    """Placeholder: the plain formula."""
    q, k = F.elu(query) + 1, F.elu(key) + 1
    state = torch.einsum("bnhd,bnhe->bhde", k, value) / key.shape[1]
    norm = torch.einsum("bnhd,bhd->bnh", q, k.mean(1)) + eps
    return torch.einsum("bnhd,bhde->bnhe", q, state) / norm[..., None]
