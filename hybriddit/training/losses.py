"""What distillation compares: outputs of the attention layers, and of the whole model."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn


def converted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> attention module, for every layer that has been converted."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "hybrid")}


@contextmanager
def captured_outputs(layers: dict[str, nn.Module]):
    """Within it, what each layer returns is kept: yields a dict name -> tuple of tensors, filled by the forward pass.

    The hooks are gone before the backward pass, so that recomputing a checkpointed block captures nothing twice. They
    only keep references: a computation in a hook would differ between the pass and its recomputation.
    """
    outputs: dict[str, tuple[torch.Tensor, ...]] = {}

    def keep(name):
        def hook(module, arguments, output):
            parts = output if isinstance(output, tuple) else (output,)
            # the last SD3 block throws its text output away, unprojected
            outputs[name] = parts[:1] if getattr(module, "context_pre_only", None) else parts

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
    """Mean over samples and layers of the squared error of the attention output, over the teacher's variance there.

    Outputs are [B, tokens, width]; the variance is each sample's own, so that the loss of a batch does not depend on
    how it is divided. A layer that returns image and text counts as the mean of the two, each over its own variance.
    """
    if student.keys() != teacher.keys() or not teacher:
        raise RuntimeError(f"student and teacher ran different layers: {sorted(student)} and {sorted(teacher)}")
    return torch.stack(
        [
            torch.stack([_relative_error(s, t) for s, t in zip(student[name], parts, strict=True)]).mean()
            for name, parts in teacher.items()
        ]
    ).mean()


def _relative_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    teacher = teacher.float().flatten(1)
    error = (student.float().flatten(1) - teacher).square().mean(1)
    return (error / teacher.var(1, correction=0).clamp_min(1e-8)).mean()
