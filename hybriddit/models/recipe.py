"""Distillation recipes: the times and noise that teachers were trained with, and the weights of the losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# (count, image tokens, scheduler, generator) -> [count] times, on the CPU: steps of the noise schedule (int64) for DDPM
# teachers, else sigmas in (0, 1] (float32), where 1 is pure noise
DrawTimes = Callable[[int, int, Any, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """How one kind of teacher is distilled.

    draw_times: draws the times that the student is trained at.
    task, output, layer: weights of the three losses.
    prompt_dropout: share of samples trained with the empty prompt, for classifier-free guidance.
    task_needs_teacher_images: whether the task loss is right only on the teacher's own images and their guidance value,
        because a guidance-distilled teacher no longer fits the data it was first trained on.
    few_steps: whether the teacher samples in a few large steps: its outputs then say no scores of noisy images.
    """

    draw_times: DrawTimes
    task: float
    output: float
    layer: float
    prompt_dropout: float
    task_needs_teacher_images: bool = False
    few_steps: bool = False


def uniform_steps(count: int, tokens: int, scheduler: Any, generator: torch.Generator) -> torch.Tensor:
    """DDPM: every step of the teacher's noise schedule equally often; int64."""
    return torch.randint(len(alphas_of(scheduler)), (count,), generator=generator)


def few_steps(count: int, tokens: int, scheduler: Any, generator: torch.Generator, *, most: int = 4) -> torch.Tensor:
    """The times of schedules of 1 to `most` steps: first the schedule is drawn, then one of its steps."""
    steps = torch.randint(1, most + 1, (count,), generator=generator)
    step = (torch.rand(count, generator=generator) * steps).floor()
    return 1 - step / steps


def shifted_logit_normal(count: int, tokens: int, scheduler: Any, generator: torch.Generator) -> torch.Tensor:
    """Flow matching: logit-normal times (SD3, arXiv 2403.03206), moved towards noise as images grow."""
    sigma = torch.randn(count, generator=generator).sigmoid()
    return moved(sigma, scheduler_shift(tokens, scheduler.config))


def sampled_logit_normal(count: int, tokens: int, scheduler: Any, generator: torch.Generator) -> torch.Tensor:
    """Logit-normal times, moved towards noise as the pipelines move theirs."""
    return moved(torch.randn(count, generator=generator).sigmoid(), sampling_shift(tokens, scheduler.config))


def sampled_few_steps(count: int, tokens: int, scheduler: Any, generator: torch.Generator) -> torch.Tensor:
    """The times of pipelines' schedules of 1 to 8 steps."""
    steps = few_steps(count, tokens, scheduler, generator, most=8)
    return moved(steps, sampling_shift(tokens, scheduler.config))


def moved(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """Times at which sigma / (1 - sigma) is `shift` times as large."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def scheduler_shift(tokens: int, config: Mapping[str, Any]) -> float:
    """The factor on sigma / (1 - sigma) by which a scheduler moves times towards noise, for an image of `tokens`."""
    if config.get("use_dynamic_shifting"):  # FLUX: the factor's logarithm is linear in the tokens, between two sizes
        base_tokens, max_tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = base + (top - base) * (tokens - base_tokens) / (max_tokens - base_tokens)
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    # SD3 gives its shift for 1024 x 1024 pixels (4096 tokens); it grows with the square root of the number of tokens
    shift = config.get("shift", config.get("flow_shift", 1.0))  # under the second name in DPM-Solver and UniPC
    return max(1.0, shift * math.sqrt(tokens / 4096))


def sampling_shift(tokens: int, config: Mapping[str, Any]) -> float:
    """The factor on sigma / (1 - sigma) by which pipelines move times towards noise: at any size, or by formula."""
    return scheduler_shift(tokens, config) if config.get("use_dynamic_shifting") else config.get("shift", 1.0)


def flow_noise(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow matching: (1 - sigma) latents + sigma noise, and the velocity noise - latents; all shaped like `latents`."""
    sigma = sigmas.to(latents).view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents + sigma * noise, noise - latents


def flow_parts(noisy: torch.Tensor, velocity: torch.Tensor, sigmas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `flow_noise`: the latents and the noise of which it makes these."""
    sigma = sigmas.to(noisy).view(-1, *[1] * (noisy.ndim - 1))
    return noisy - sigma * velocity, noisy + (1 - sigma) * velocity


def ddpm_noise(
    latents: torch.Tensor, noise: torch.Tensor, steps: torch.Tensor, scheduler: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """DDPM: the latents with the schedule's noise at these steps, and what the teacher predicts by the scheduler."""
    signal, sigma = _signal_and_sigma(latents, steps, scheduler)
    targets = {"epsilon": noise, "sample": latents, "v_prediction": signal * noise - sigma * latents}
    return signal * latents + sigma * noise, targets[_prediction_type(scheduler, targets)]


def ddpm_parts(
    noisy: torch.Tensor, prediction: torch.Tensor, steps: torch.Tensor, scheduler: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `ddpm_noise`: the latents and the noise of which it makes these."""
    signal, sigma = _signal_and_sigma(noisy, steps, scheduler)
    parts = {
        "epsilon": lambda: ((noisy - sigma * prediction) / signal, prediction),
        "sample": lambda: (prediction, (noisy - signal * prediction) / sigma),
        "v_prediction": lambda: (signal * noisy - sigma * prediction, sigma * noisy + signal * prediction),
    }
    return parts[_prediction_type(scheduler, parts)]()


def _signal_and_sigma(latents: torch.Tensor, steps: torch.Tensor, scheduler: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of image and noise at these steps of a noise schedule, broadcastable to `latents`."""
    keep = alphas_of(scheduler).to(latents)[steps].view(-1, *[1] * (latents.ndim - 1))
    return keep.sqrt(), (1 - keep).sqrt()


def _prediction_type(scheduler: Any, known: Collection[str]) -> str:
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in known:
        raise ValueError(f"the scheduler's prediction_type is {kind!r}: {', '.join(known)} can be distilled")
    return kind


def alphas_of(scheduler: Any) -> torch.Tensor:
    """The share of the image at every step of a noise schedule. Raises ValueError for a scheduler that has none."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or getattr(scheduler.config, "use_flow_sigmas", False):
        raise ValueError(
            f"a {type(scheduler).__name__} has no noise schedule of DDPM, which this teacher was trained with"
        )
    return alphas
