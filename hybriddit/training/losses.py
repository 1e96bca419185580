"""The layer loss and the distribution loss, and the hooks that collect the attention layers' outputs."""

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
    """The attention modules that run their hybrid, by name: all that have been converted but what `keep_dense` names."""
    kept = getattr(model, "_kept_dense", ())
    return {name: module for name, module in model.named_modules() if hasattr(module, "hybrid") and name not in kept}


@contextmanager
def captured_outputs(
    family: Family, layers: dict[str, nn.Module], beside: dict[str, nn.Module] | None = None
) -> Iterator[dict[str, tuple[torch.Tensor, ...]]]:
    """Yield a dict that the forward pass fills: name of a layer -> the parts of its output that the model uses.

    Leave the block before the backward pass: its hooks are then gone, and recomputing a checkpointed block captures
    nothing twice. The hooks only keep references: anything they computed would be missing in that recomputation.

    beside: further layers, which get hooks, too, and whose outputs are dropped at the end. For compiled blocks: torch runs
    the code of one block for others like it, and does not look whether they have hooks.
    """
    beside = {name: layer for name, layer in (beside or {}).items() if name not in layers}
    outputs: dict[str, tuple[torch.Tensor, ...]] = {}

    def keep(name):
        def hook(module, arguments, output):
            outputs[name] = family.layer_outputs(module, output)

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in {**layers, **beside}.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
        for name in beside:
            outputs.pop(name, None)


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


def distribution_loss(
    family: Family,
    scheduler: Any,
    noisy: torch.Tensor,
    prediction: torch.Tensor,
    times: torch.Tensor,
    earlier: torch.Tensor,
    student: Callable[[torch.Tensor], torch.Tensor],
    teacher: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Distribution matching at any time of the student's sampling: LinVideo's (arXiv 2510.08318, equations 11 to 13).

    One step of the student's sampling (Euler's of a flow, else DDIM's) takes x_s, `noisy` at `times`, to x_t at `earlier`
    times t, which are nearer to the image. Let q_t be the distribution of the x_t, and p_t the teacher's at t. With
    respect to the student's weights w, and by the chain rule through that step,

        grad KL(q_t || p_t) = E[(score of q_t - score of p_t)(x_t) . dx_t/dw]

    A network's score is minus the noise it says to be in x_t, over sigma_t. As in LinVideo, the student's own stands for
    the score of q_t, where DMD2 (arXiv 2405.14867) trains a further network for that: exact if the x_t are distributed
    as the student's own samples at t, and in any case 0 where the student is the teacher. No gradient passes the scores.

    The times are weighted with sigma_t / |dx_t/dprediction|, so that the gradient with respect to the prediction is the
    difference of both noises at x_t, with the step's sign, however near to noise or image s and t are.

    noisy, prediction: [B, ...] in fp32; prediction: the student's, with gradients. times, earlier: [B], as recipes draw
    them. student, teacher: what they predict from such latents at the `earlier` times; they run without gradients.

    Returns the mean squared difference of both noises at x_t, with the gradients above, as a mean over all elements.
    """

    def step(start: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        return family.add_noise(*family.parts(start, predicted, times, scheduler), earlier, scheduler)[0]

    with torch.no_grad():
        arrived = step(noisy, prediction)
        noises = (family.parts(arrived, run(arrived), earlier, scheduler)[1] for run in (student, teacher))
        difference = next(noises) - next(noises)
        one = torch.ones_like(noisy.flatten(1)[:, :1]).view(-1, *[1] * (noisy.ndim - 1))
        slope = step(torch.zeros_like(one), one)  # dx_t/dprediction: the step is linear in both
    pull = (-difference * slope.sign() * prediction).mean()
    return difference.square().mean() + pull - pull.detach()


def _relative_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    teacher = teacher.float().flatten(1)
    error = (student.float().flatten(1) - teacher).square().mean(1)
    return (error / teacher.var(1, correction=0).clamp_min(1e-8)).mean()
