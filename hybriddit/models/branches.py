"""What each branch of a hybrid model's layers does: switch one off, and measure what the output is without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ..attention import HybridAttention

BRANCHES = ("near", "far")


def hybrid_layers(model: nn.Module) -> dict[str, HybridAttention]:
    """The layers that have both branches, by the names of their attention modules. Raises ValueError for none."""
    suffix = ".hybrid"
    layers = {
        name.removesuffix(suffix): module
        for name, module in model.named_modules()
        if isinstance(module, HybridAttention) and module.kind == "hybrid"
    }
    if not layers:
        raise ValueError("no layer of this model has both branches: there is none to switch off")
    return layers


@contextmanager
def one_branch(model: nn.Module, branch: str) -> Iterator[None]:
    """Within the block, the layers with both branches use one alone: "near" (window and text) or "far".

    The model's weights, and its layers of other kinds, stay as they are. Raises ValueError for another name, and for a
    model without such layers.
    """
    if branch not in BRANCHES:
        raise ValueError(f"unknown branch {branch!r}: use one of {', '.join(BRANCHES)}")
    with ExitStack() as stack:
        for layer in hybrid_layers(model).values():
            stack.enter_context(_alone(layer, branch))
        yield


@contextmanager
def _alone(layer: HybridAttention, branch: str) -> Iterator[None]:
    far, far_only = layer.far, layer.far_only
    if branch == "near":
        layer.far = None
    else:  # of every image of a batch
        layer.far_only = torch.ones(1, dtype=torch.bool, device=next(layer.parameters()).device)
    try:
        yield
    finally:
        layer.far, layer.far_only = far, far_only


@contextmanager
def branch_changes(model: nn.Module) -> Iterator[dict[str, dict[str, list[torch.Tensor]]]]:
    """Within the block, the model's passes fill {layer: {"near": [...], "far": [...]}}, a tensor [heads] a pass.

    A value is how much the layer's output for image tokens changes without that branch, as `relative_error`: 0 for a
    branch that is not used. The layers with both branches compute their attention three times meanwhile.
    """
    found: dict[str, dict[str, list[torch.Tensor]]] = {}

    def measure(name: str):
        def hook(layer, args, kwargs, out):
            layout = args[3]
            for branch, other in zip(BRANCHES, reversed(BRANCHES), strict=True):
                with torch.no_grad(), _alone(layer, other):
                    without = layer.forward(*args, **kwargs)
                change = relative_error(*(layout.split(tokens)[1] for tokens in (without, out)))
                found[name][branch].append(change.cpu())

        return hook

    handles = []
    for name, layer in hybrid_layers(model).items():
        found[name] = {branch: [] for branch in BRANCHES}
        handles.append(layer.register_forward_hook(measure(name), with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def relative_error(out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared error of [B, N, heads, D] over the variance of what is wanted, of each head: [heads], the mean over B."""
    out, wanted = out.float(), wanted.float()
    variance = wanted.var((1, 3), correction=0).clamp_min(1e-12)
    return ((out - wanted).square().mean((1, 3)) / variance).mean(0)
