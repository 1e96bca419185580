"""Chroma: FLUX's blocks and positions, padded text hidden by a mask, and guidance with a negative prompt.

Sources, read in November 2026: diffusers 0.42's ChromaTransformer2DModel and ChromaPipeline; the cards of
lodestones/Chroma and lodestones/Chroma1-HD. It is a flow model, made from FLUX.1-schnell and trained without its
few-step distillation. diffusers' page samples it with 40 steps and a guidance of 3; the scheduler of Chroma1-HD shifts
times by 3, at any size. The times that Chroma was trained at have a density of its authors' own, with heavier tails than
SD3's; they publish no formula, so a student learns at SD3's, moved by the scheduler's shift.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    ChromaImg2ImgPipeline,
    ChromaInpaintPipeline,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)

from ..attention import TokenLayout
from .family import T5_XXL, Published
from .flux import Flux, position_ids
from .hybrid_model import hybrid_class
from .recipe import Recipe, shifted_logit_normal

HybridChromaTransformer2DModel = hybrid_class(ChromaTransformer2DModel)


class Chroma(Flux):
    """Chroma1, of all versions that diffusers' ChromaTransformer2DModel holds."""

    name = "Chroma"
    dense_class = ChromaTransformer2DModel
    hybrid_class = HybridChromaTransformer2DModel
    checkpoints_kwargs = False
    pipelines = {
        "text-to-image": ChromaPipeline,
        "image-to-image": ChromaImg2ImgPipeline,
        "inpainting": ChromaInpaintPipeline,
    }
    text_encoders = ("text_encoder",)
    scheduler = FlowMatchEulerDiscreteScheduler
    guided = True
    recipes = {"chroma": Recipe(shifted_logit_normal, 1.0, 0.5, 0.5, 0.1)}
    published = {
        "lodestones/Chroma1-HD": Published(shape="chroma", text_parameters=T5_XXL),  # the defaults of diffusers' class
    }

    def exact_inputs(self, inputs: dict[str, Any], token_layout: TokenLayout) -> dict[str, Any]:
        """With the text's part of `attention_mask` alone: each block would make a square of all of it.

        It hides where it is 0, which is how Chroma was trained. (diffusers adds a mask of numbers to the scores, and so
        hides nothing: huggingface/diffusers issue 13619. A bool mask hides there, too.) Raises ValueError for a mask of
        another shape than [B, text and image].
        """
        inputs, mask = super().exact_inputs(inputs, token_layout), inputs.get("attention_mask")
        if mask is None:
            return inputs
        shape = len(inputs["hidden_states"]), token_layout.text_length + token_layout.image_length
        if mask.shape != shape:
            raise ValueError(
                f"attention_mask has one value for each token of text and image, {shape}: not {tuple(mask.shape)}"
            )
        text_mask = mask[:, : token_layout.text_length].bool()
        kwargs = {**(inputs.get("joint_attention_kwargs") or {}), "text_mask": text_mask}
        return {**inputs, "attention_mask": None, "joint_attention_kwargs": kwargs}

    def encode_prompts(self, pipeline: Any, prompts: list[str], **length: int) -> dict[str, torch.Tensor]:
        embeds, _, mask, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, **length)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask.bool()}

    def example_text(
        self, config: Mapping[str, Any], count: int, length: int, make: Callable[..., torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        embeds = make(count, length, config["joint_attention_dim"])
        return {"prompt_embeds": embeds, "prompt_attention_mask": embeds.new_ones(count, length, dtype=torch.bool)}

    def default_recipe(self, config: Mapping[str, Any]) -> str:
        return "chroma"

    def model_inputs(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        grid: tuple[int, int],
        guidance: float | None,
    ) -> dict[str, Any]:
        seen = text["prompt_attention_mask"].bool()
        return {
            "hidden_states": noisy,
            "encoder_hidden_states": text["prompt_embeds"],
            "timestep": times,
            "attention_mask": torch.cat((seen, seen.new_ones(noisy.shape[:2])), 1),
            **position_ids(noisy, seen.shape[1], grid),
        }
