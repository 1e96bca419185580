"""What the families' attention processors share: projections with their deltas, and the far branch's inputs."""

from __future__ import annotations

import torch
from torch import nn

from ..attention import HybridAttention, TokenLayout

# every projection an attention layer of the supported families may have
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class LowRankDelta(nn.Module):
    """x -> up(down(x)), zero at the start: what `attention` training changes in one projection."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(hidden_states))


def projections(attn: nn.Module) -> dict[str, nn.Module]:
    """The projections that this attention layer has and whose output matters, by name."""
    found = {}
    for name in PROJECTIONS:
        if name == "add_q_proj" and attn.context_pre_only:
            continue  # SD3's last block drops what its text queries find
        owner, _, index = name.partition(".")
        module = getattr(attn, owner, None)
        if module is not None:
            found[name] = module[int(index)] if index else module
    return found


def delta_name(projection: str) -> str:
    """The key of a projection's delta: not that projection's name, by which peft would put LoRA on the delta too."""
    return projection.replace(".", "_") + "_delta"


def project(attn: nn.Module, name: str, hidden_states: torch.Tensor) -> torch.Tensor:
    """One projection of the layer, called as a module so that LoRA works, plus its delta where there is one."""
    out = (attn.to_out[0] if name == "to_out.0" else getattr(attn, name))(hidden_states)
    deltas = attn.hybrid.deltas
    key = delta_name(name)
    return out + deltas[key](hidden_states) if key in deltas else out


def far_inputs(
    attn: nn.Module, hidden_states: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> dict[str, torch.Tensor | None]:
    """HybridAttention's far_query, far_key and gate; empty for a layer without a far branch.

    hidden_states [B, N, width] and query, key [B, N, heads, D], raw projections, all of the image tokens alone. The
    layer's own norms are applied here, rotary embedding is not: phi after it would lose its sign.
    """
    hybrid: HybridAttention = attn.hybrid
    if hybrid.far is None:
        return {}
    far_query, far_key, gate = hybrid.far_inputs(hidden_states, query, key)
    return {"far_query": norm(attn.norm_q, far_query), "far_key": norm(attn.norm_k, far_key), "gate": gate}


def norm(module: nn.Module | None, heads: torch.Tensor) -> torch.Tensor:
    """Query or key norm, where the layer has one."""
    return heads if module is None else module(heads)


def check_call(token_layout: TokenLayout | None, attention_mask: torch.Tensor | None) -> None:
    """What a hybrid processor cannot do without, or with."""
    if token_layout is None:
        raise ValueError(
            "hybrid attention needs `token_layout`: call the whole model, or pass one in its attention kwargs"
        )
    if attention_mask is not None:
        raise ValueError("hybrid attention takes no attention mask: leave it out, or restore_dense(model) first")
