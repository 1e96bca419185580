"""The layer loss of distillation, and the hooks that collect the attention layers' outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..models.family import Family
from ..models.layerwise import beside_dense
from ..models.wrapping import with_forward


def converted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules that have been converted, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "hybrid")}


@contextmanager
def captured_outputs(family: Family, layers: dict[str, nn.Module]) -> Iterator[dict[str, tuple[torch.Tensor, ...]]]:
    """Yield a dict that the forward pass fills: name of a layer -> the parts of its output that the model uses.

    Leave the block before the backward pass: its hooks are then gone, and recomputing a checkpointed block captures
    nothing twice. The hooks only keep references: anything they computed would be missing in that recomputation.
    """
    outputs: dict[str, tuple[torch.Tensor, ...]] = {}

    def keep(name):
        def hook(module, arguments, output):
            outputs[name] = family.layer_outputs(module, output)

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def layer_loss(
    student: dict[str, tuple[torch.Tensor, ...]], teacher: dict[str, tuple[torch.Tensor, ...]]
) -> torch.Tensor:
    """Squared error of attention outputs divided by the teacher's variance, as the mean over samples and layers.

    Outputs are [B, tokens, width]. Each sample has its own variance, so that the loss of a batch does not depend on how
    it is divided. A layer that returns image and text counts as the mean of both, each divided by its own variance.
    """
    if student.keys() != teacher.keys() or not teacher:
        raise RuntimeError(f"student and teacher ran different layers: {sorted(student)} and {sorted(teacher)}")
    return torch.stack(
        [
            torch.stack([_relative_error(s, t) for s, t in zip(student[name], parts, strict=True)]).mean()
            for name, parts in teacher.items()
        ]
    ).mean()


def layers_alone(model: nn.Module, family: Family, count: int, run: Callable[[], Any]) -> torch.Tensor:
    """`layer_loss` of a hybrid model's layers where each sees the teacher's own input; the mean over `count` layers.

    run: calls the model, or what wraps it, once. Each layer's gradients are computed while it runs, and its intermediate
    results are gone before the next. The result has these gradients, for all of the model's parameters that are trained
    (0 for those that take no part), so that it can be backpropagated, accumulated and averaged like any other loss.
    """
    gradients = {p: None for name, p in model.named_parameters() if p.requires_grad}
    losses = []

    def learn(attn: nn.Module, dense: Any, hybrid: Callable[[], Any]) -> None:
        own = [p for p in attn.hybrid.parameters() if p.requires_grad]
        with torch.set_grad_enabled(bool(own)):
            parts = zip(family.layer_outputs(attn, hybrid()), family.layer_outputs(attn, dense), strict=True)
            loss = torch.stack([_relative_error(s, t) for s, t in parts]).mean() / count
        losses.append(loss.detach())
        if own:
            gradients.update(zip(own, torch.autograd.grad(loss, own, allow_unused=True), strict=True))

    # what wraps the model may need gradients enabled around it; blocks compiled for other passes are not used here
    quiet = with_forward(model, torch.no_grad()(model.forward))
    with torch.compiler.set_stance("force_eager"), beside_dense(model, learn), quiet:
        run()
    slopes = [(p * (0.0 if gradient is None else gradient)).sum() for p, gradient in gradients.items()]
    slope = torch.stack(slopes).sum()
    return torch.stack(losses).sum() + slope - slope.detach()


def _relative_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    teacher = teacher.float().flatten(1)
    error = (student.float().flatten(1) - teacher).square().mean(1)
    return (error / teacher.var(1, correction=0).clamp_min(1e-8)).mean()
