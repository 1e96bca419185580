"""Families whose teachers were trained on the noise schedule of DDPM: their times are its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .family import Family
from .recipe import ddpm_noise, ddpm_parts


class DDPMFamily(Family):
    """A family whose teacher predicts noise, image or v, as its scheduler says, at the steps of a noise schedule."""

    middle_time = 500

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, scheduler: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return ddpm_noise(latents, noise, times, scheduler)

    def parts(
        self, noisy: torch.Tensor, prediction: torch.Tensor, times: torch.Tensor, scheduler: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return ddpm_parts(noisy, prediction, times, scheduler)

    def times_at(self, sigmas: Sequence[float], scheduler: Any) -> torch.Tensor:
        keep = scheduler.alphas_cumprod.double()
        strengths = ((1 - keep) / keep).log() / 2  # of the noise, beside the image's: rising
        wanted = torch.tensor(sigmas, dtype=torch.float64).logit()
        above = torch.searchsorted(strengths, wanted).clamp(1, len(strengths) - 1)
        return torch.where(wanted - strengths[above - 1] < strengths[above] - wanted, above - 1, above)

    def sampling_from(self, scheduler: Any, sigmas: Sequence[float]) -> tuple[Any, dict[str, Any]]:
        scheduler, _ = super().sampling_from(scheduler, sigmas)
        steps = self.times_at(sigmas, scheduler).unique().flip(0).tolist()
        return scheduler, {"timesteps": steps, "num_inference_steps": len(steps)}
