"""What each family's teacher was trained for: one table, and how to draw times, make targets and call the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Recipe:
    """How one family is distilled.

    pipeline: the diffusers pipeline class it belongs to, as a name.
    times: "ddpm" (uniform over the teacher's 1000 steps), "logit_normal" (shifted by size) or "few_step" (only the
        times of the 1 to 4 step schedules the teacher was distilled for).
    task, output, layer: weights of the three losses.
    task_needs_teacher_images: a guidance-distilled teacher no longer fits its own training set, so the task loss is
        right only on images it made itself, with the guidance value that made them.
    prompt_dropout: share of samples trained with the empty prompt, for classifier-free guidance.
    """

    pipeline: str
    times: str
    task: float
    output: float
    layer: float
    prompt_dropout: float
    task_needs_teacher_images: bool = False


RECIPES = {
    "pixart_sigma": Recipe("PixArtSigmaPipeline", "ddpm", 1.0, 0.5, 0.5, 0.1),
    "sd3": Recipe("StableDiffusion3Pipeline", "logit_normal", 1.0, 0.5, 0.5, 0.1),
    "flux_dev": Recipe("FluxPipeline", "logit_normal", 1.0, 0.5, 0.5, 0.0, task_needs_teacher_images=True),
    "flux_schnell": Recipe("FluxPipeline", "few_step", 0.0, 1.0, 0.5, 0.0),
}


def recipe_of(pipeline, name: str | None = None) -> Recipe:
    """`choose_recipe` for a loaded pipeline."""
    return choose_recipe(type(pipeline).__name__, pipeline.transformer, name)


def choose_recipe(pipeline: str, transformer, name: str | None = None) -> Recipe:
    """The row called `name`, or the one that fits the transformer; `pipeline` is the name of its pipeline's class.

    A FLUX model without a guidance embedding is taken for a few-step one (schnell): give "flux_dev" where it is none.
    Raises ValueError for an unknown name, a recipe of another pipeline, and a transformer that has none.
    """
    if name is None:
        kind = type(transformer).__name__
        if "PixArt" in kind:
            name = "pixart_sigma"
        elif "SD3" in kind:
            name = "sd3"
        elif "Flux" in kind:
            name = "flux_dev" if transformer.config.guidance_embeds else "flux_schnell"
        else:
            raise ValueError(f"no distillation recipe for a {kind}; there are recipes for {', '.join(RECIPES)}")
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: choose from {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if recipe.pipeline.removesuffix("Pipeline") not in pipeline:
        raise ValueError(f"recipe {name!r} is for a {recipe.pipeline}, not for a {pipeline}")
    return recipe


def draw_times(recipe: Recipe, count: int, tokens: int, scheduler, generator: torch.Generator) -> torch.Tensor:
    """`count` times, on the CPU: DDPM steps (int64), or sigmas in (0, 1], 1 being noise (fp32).

    tokens: of the image, which sets the shift.
    """
    if recipe.times == "ddpm":
        return torch.randint(len(scheduler.alphas_cumprod), (count,), generator=generator)
    if recipe.times == "few_step":
        # first which schedule (1 to 4 steps), then which of its steps: sigma = 1 - step / steps
        steps = torch.randint(1, 5, (count,), generator=generator)
        step = (torch.rand(count, generator=generator) * steps).floor()
        return 1 - step / steps
    sigma = torch.randn(count, generator=generator).sigmoid()
    shift = _shift(tokens, scheduler.config)
    return shift * sigma / (1 + (shift - 1) * sigma)


def _shift(tokens: int, config) -> float:
    """How far larger images move the times towards noise: the factor on sigma / (1 - sigma)."""
    if config.get("use_dynamic_shifting"):  # FLUX: log-linear between two sizes
        base_tokens, max_tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return math.exp(base + (top - base) * (tokens - base_tokens) / (max_tokens - base_tokens))
    # SD3 states its shift for 1024 x 1024 pixels (4096 tokens) and lets it grow with the square root of their number
    return max(1.0, config.get("shift", 1.0) * math.sqrt(tokens / 4096))


def add_noise(
    recipe: Recipe, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, scheduler
) -> tuple[torch.Tensor, torch.Tensor]:
    """The noisy latents and what the teacher was trained to predict from them; all shaped like `latents`."""
    shape = (-1, *[1] * (latents.ndim - 1))
    if recipe.times == "ddpm":
        keep = scheduler.alphas_cumprod.to(latents)[times].view(shape)
        return keep.sqrt() * latents + (1 - keep).sqrt() * noise, noise
    sigma = times.to(latents).view(shape)
    return (1 - sigma) * latents + sigma * noise, noise - latents


def model_inputs(
    recipe: Recipe,
    noisy: torch.Tensor,
    times: torch.Tensor,
    text: dict[str, torch.Tensor],
    grid: tuple[int, int],
    guidance: float | None,
) -> dict:
    """The keyword arguments of the transformer.

    text: the prompts' tensors under the pipeline's own names; grid: (height, width) in tokens; guidance: the value for
    a guidance embedding, None where the model has none.
    """
    embeds = text["prompt_embeds"]
    if recipe.pipeline == "PixArtSigmaPipeline":
        return {
            "hidden_states": noisy,
            "encoder_hidden_states": embeds,
            "encoder_attention_mask": text["prompt_attention_mask"],
            "timestep": times,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
    common = {
        "hidden_states": noisy,
        "encoder_hidden_states": embeds,
        "pooled_projections": text["pooled_prompt_embeds"].to(noisy),
    }
    if recipe.pipeline == "StableDiffusion3Pipeline":
        return common | {"timestep": times * 1000}
    rows, columns = torch.meshgrid(*(torch.arange(n, device=noisy.device) for n in grid), indexing="ij")
    image_ids = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).view(-1, 3).to(noisy)
    return common | {
        "timestep": times,
        "guidance": None if guidance is None else torch.full_like(times, guidance),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(embeds.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
    }


def prediction(recipe: Recipe, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """The part of the model's output that predicts the target: PixArt's second half is a variance."""
    if recipe.times == "ddpm" and output.shape[1] == 2 * latents.shape[1]:
        return output[:, : latents.shape[1]]
    return output
