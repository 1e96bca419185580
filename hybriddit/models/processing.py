"""Helpers of all families' attention processors: projections with updates, far inputs, the token layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..attention import HybridAttention, TokenLayout
from .wrapping import is_plain


class LowRankDelta(nn.Module):
    """Low-rank update of one projection, zero at the start.

    x -> up(down(x)), [..., in_features] -> [..., out_features].
    """

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(hidden_states))


class FullDelta(nn.Linear):
    """Update of one projection's whole matrix and bias, zero at the start."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features, out_features, bias)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


def full_update(own: torch.Tensor, wanted: torch.Tensor, name: str) -> torch.Tensor:
    """What a FullDelta adds to a projection's weight or bias, `name`, to make it `wanted`; in float32 at least.

    Raises ValueError where the projection's own is no ordinary tensor.
    """
    if not is_plain(own) or not own.is_floating_point():
        raise ValueError(f"{name} is quantised or offloaded: load the published file before that")
    exact = torch.promote_types(own.dtype, torch.float32)
    return wanted.to(own.device, exact) - own.detach().to(exact)


def delta_name(projection: str) -> str:
    """The key of a projection's update. It is not the projection's name, else peft would put LoRA on the update too."""
    return projection.replace(".", "_") + "_delta"


def project(attn: nn.Module, name: str, hidden_states: torch.Tensor) -> torch.Tensor:
    """Apply one projection of the layer, as a module so that LoRA works, and add its update if it has one."""
    return updated(attn, name, attn.get_submodule(name)(hidden_states), hidden_states)


def updated(attn: nn.Module, name: str, out: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """What a projection, or a part of one, made of hidden_states, with its update if it has one."""
    deltas = attn.hybrid.deltas
    key = delta_name(name)
    return out + deltas[key](hidden_states) if key in deltas else out


def far_inputs(
    attn: nn.Module,
    hidden_states: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    norms: tuple[nn.Module | None, nn.Module | None] | None = None,
    rotate: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor | None]:
    """HybridAttention's far_query, far_key and gate; empty for a layer without a far branch.

    hidden_states [B, N, width] and its raw projections query [B, N, heads, D] and key [B, N, kv_heads, D]: of image
    tokens only. norms: the layer's norms of queries and keys; None: its `norm_q` and `norm_k`. rotate: the model's
    rotary embedding of image tokens, if it has one. Both are applied here.
    """
    hybrid: HybridAttention = attn.hybrid
    if hybrid.far is None:
        return {}
    far_query, far_key, gate = hybrid.far_inputs(hidden_states, query, key)
    if far_query is None:
        if rotate is None or hybrid.rotary == "model":
            return {"gate": gate}  # the far branch takes the layer's own queries and keys
        far_query, far_key = query, key
    norm_q, norm_k = (attn.norm_q, attn.norm_k) if norms is None else norms
    far_query, far_key = norm(norm_q, far_query), norm(norm_k, far_key)
    if hybrid.rotary == "model":
        far_query, far_key = rotate(far_query), rotate(far_key)
    return {"far_query": far_query, "far_key": far_key, "gate": gate}


def norm(module: nn.Module | None, heads: torch.Tensor) -> torch.Tensor:
    """Apply the query or key norm, if the layer has one."""
    return heads if module is None else module(heads)


def check_call(token_layout: TokenLayout | None, attention_mask: torch.Tensor | None = None) -> None:
    """Raise ValueError if a hybrid processor gets no layout, or gets a mask, which it does not support."""
    if token_layout is None:
        raise ValueError(
            "hybrid attention needs `token_layout`: call the whole model, or pass one in its attention kwargs"
        )
    if attention_mask is not None:
        raise ValueError("hybrid attention takes no attention mask: leave it out, or restore_dense(model) first")


class CheckpointWithKwargs:
    """Gradient checkpointing that passes attention kwargs on to the blocks of a model that drops them there.

    name: of the argument, the model's and the blocks'. kwargs: of the model's current call, None in dense mode.
    """

    def __init__(self, checkpoint: Callable[..., Any], name: str):
        self.checkpoint, self.name = checkpoint, name
        self.kwargs: dict[str, Any] | None = None

    def __call__(self, block: Callable[..., Any], *arguments: Any) -> Any:
        return self.checkpoint(partial(block, **{self.name: self.kwargs}), *arguments)


class LayoutHolder:
    """Holds the token layout of the current call, for models whose attention kwargs do not reach their processors.

    All hybrid processors of one model share its holder as their attribute `layout_holder`. given: the layout of all calls,
    where their arguments do not tell it, as tensors without values do not.
    """

    def __init__(self):
        self.token_layout: TokenLayout | None = None
        self.given: TokenLayout | None = None


class CheckpointWithLayout:
    """Gradient checkpointing that recomputes a block under the layout that it first ran with.

    By the time of the backward pass the model may have run with another layout. This is an object and not a closure, so
    that a deep copy of the model also copies the holder.
    """

    def __init__(self, checkpoint: Callable[..., Any], holder: LayoutHolder):
        self.checkpoint, self.holder = checkpoint, holder

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        holder, token_layout = self.holder, self.holder.token_layout

        def under_its_layout(*arguments):
            holder.token_layout = token_layout  # the next call of the model sets its own layout
            return function(*arguments)

        return self.checkpoint(under_its_layout, *arguments)
