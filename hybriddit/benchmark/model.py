"""Benchmark cases of whole transformers with random weights: one forward pass, or a few steps of a sampler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from ..attention.work import Work
from ..models.family import transformer_blocks
from .measure import Case
from .subjects import Subject

SAMPLER_STEPS = 4


def weight_bytes(subject: Subject, px: int, layers: int | None, dtype: torch.dtype) -> int:
    """Bytes of the dense transformer's weights."""
    with init_empty_weights():
        model = subject.make(px, layers)
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


def random_model(subject: Subject, px: int, layers: int | None, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The dense transformer with random weights, made on the device without a copy in the host's memory."""
    with init_empty_weights(include_buffers=False):
        model = subject.make(px, layers)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            weights = torch.empty(parameter.shape, dtype=dtype, device=device)
            _fill(name, weights)
            module.register_parameter(name, nn.Parameter(weights, requires_grad=False))
    return nn.Module.to(model, device=device, dtype=dtype).eval()  # not diffusers' `to`, which warns about fp32 modules


def _fill(name: str, weights: Tensor) -> None:
    """Fill weights in place: matrices at random, biases with 0, scales with 1."""
    if weights.ndim > 1:
        weights.normal_(std=0.02)
    else:
        weights.fill_(0.0 if name.endswith("bias") else 1.0)


def variant_model(subject: Subject, model: nn.Module, variant: str, window: int) -> tuple[nn.Module, list[Tensor]]:
    """The dense model itself, or a twin of it with hybrid or linear attention; and the weights that the twin adds."""
    if variant == "dense":
        return model, []
    shared = {id(parameter) for parameter in model.parameters()}
    twin = subject.variant(model, variant, window)
    added = {name: parameter for name, parameter in twin.named_parameters() if id(parameter) not in shared}
    for name, parameter in added.items():
        _fill(name, parameter.data)
    return twin, list(added.values())


def model_cases(
    part: str,
    subject: Subject,
    px: int,
    variants: Sequence[str],
    window: int,
    layers: int | None,
    compiled: bool,
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
) -> list[Case]:
    """One case per variant, on the same weights and inputs; `part` is "transformer" or "generation".

    backward: also compute gradients of latents, text and the added weights; the others are frozen, as in distillation.
    A "generation" case runs SAMPLER_STEPS steps of a diffusers pipeline without text encoders and VAE.
    """
    model = random_model(subject, px, layers, dtype, device)
    arguments, inputs = subject.example(model, px, backward)
    gradients: dict[torch.Size, Tensor] = {}
    cases = []
    for variant in variants:
        twin, added = variant_model(subject, model, variant, window)
        for weights in added:
            weights.requires_grad_(backward)
        if compiled:
            # block by block, as diffusers' compile_repeated_blocks does: equal blocks are compiled once
            for block in transformer_blocks(twin):
                block.compile()
        if part == "generation":
            forward, steps = subject.sampler(twin, px, SAMPLER_STEPS), SAMPLER_STEPS
        else:

            def forward(twin=twin) -> Tensor:
                out = twin(**arguments, return_dict=False)[0]
                return torch.stack(out) if isinstance(out, list) else out

            steps = 1
        cases.append(Case(variant, forward, [*inputs, *added], steps, gradients=gradients))
    return cases


def batch_of(part: str, subject: Subject) -> int:
    """Images in one call of the transformer: 2 in a sampler with guidance, for the prompt and the empty prompt."""
    return 2 if part == "generation" and subject.guided and subject.together else 1


def calls_of(part: str, subject: Subject) -> int:
    """Calls of the transformer in a step: 2 in a sampler with guidance that calls it for each of the two prompts."""
    return 2 if part == "generation" and subject.guided and not subject.together else 1


def model_work(
    part: str,
    subject: Subject,
    px: int,
    variants: Sequence[str],
    window: int,
    layers: int | None,
    dtype: torch.dtype,
) -> dict[str, dict[str, Work]]:
    """The work of each variant, by direction: FLOPs, and the bytes of the weights that are read.

    The models are on the meta device, so nothing is computed. The backward pass counts gradients of activations, not
    those of the frozen weights.
    """
    with torch.device("meta"):
        dense = subject.make(px, layers)
        models = {"dense": dense}
        models |= {variant: variant_model(subject, dense, variant, window)[0] for variant in variants}
        outside, inside = subject.flops(models, px)
    batch, calls, works = batch_of(part, subject), calls_of(part, subject), {}
    for variant in variants:
        weights = calls * sum(p.numel() for p in models[variant].parameters()) * dtype.itemsize
        forward = Work(weights, calls * batch * (outside + inside[variant]))
        back = Work(weights, calls * batch * (outside + 2 * inside[variant]))
        both = Work(weights, forward.flops + back.flops)
        works[variant] = {"forward": forward, "backward": back, "forward + backward": both, "step": forward}
    return works
