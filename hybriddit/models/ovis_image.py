"""Ovis-Image: FLUX's blocks with text that has places of its own, no pooled text, and guidance with a negative prompt.

Sources, read in November 2026: diffusers 0.42's OvisImageTransformer2DModel and OvisImagePipeline, whose call takes 50
steps and a guidance of 5; the model_index.json of AIDC-AI/Ovis-Image-7B, of which the encoder is a Qwen3 of width 2048,
Qwen3-1.7B's, and the VAE FLUX's. It is a flow model, and its pipeline moves times by the size of the image. The times that
it was trained at are not published: a student learns at SD3's, moved by the scheduler's shift.

A token of the text has its number as row and as column, as a token of the image would on the diagonal. Padded text is
zeros before it is embedded, and is not hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, OvisImagePipeline, OvisImageTransformer2DModel
from diffusers.models.transformers.transformer_ovis_image import OvisImageAttnProcessor

from .family import Processors, Published
from .flux import DenseFluxAttnProcessor, Flux, HybridFluxAttnProcessor, position_ids
from .hybrid_model import hybrid_class
from .recipe import Recipe, shifted_logit_normal

HybridOvisImageTransformer2DModel = hybrid_class(OvisImageTransformer2DModel)
QWEN3_1_7B = 1_720_574_976


class OvisImage(Flux):
    """Ovis-Image-7B."""

    name = "Ovis-Image"
    dense_class = OvisImageTransformer2DModel
    hybrid_class = HybridOvisImageTransformer2DModel
    processors = (Processors(OvisImageAttnProcessor, HybridFluxAttnProcessor, DenseFluxAttnProcessor),)
    positions = ("plain",)  # the others would move the text's places with the image's
    image_arguments = ("hidden_states", "img_ids")
    pipelines = {"text-to-image": OvisImagePipeline}
    text_encoders = ("text_encoder",)
    longest_text = 256
    scheduler = FlowMatchEulerDiscreteScheduler
    guided = True
    guided_together = False
    recipes = {"ovis_image": Recipe(shifted_logit_normal, 1.0, 0.5, 0.5, 0.1)}
    published = {
        # the defaults of diffusers' class
        "AIDC-AI/Ovis-Image-7B": Published(shape="ovis-image", text_parameters=QWEN3_1_7B),
    }

    def encode_prompts(self, pipeline: Any, prompts: list[str], **length: int) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, **length)[0]}

    def example_text(
        self, config: Mapping[str, Any], count: int, length: int, make: Callable[..., torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": make(count, length, config["joint_attention_dim"])}

    def sampling_arguments(
        self, text: Mapping[str, torch.Tensor], empty: Mapping[str, torch.Tensor], count: int
    ) -> dict[str, Any]:
        # its own negative prompt is an empty one, which it does not take beside an encoded one
        return {**super().sampling_arguments(text, empty, count), "negative_prompt": None}

    def default_recipe(self, config: Mapping[str, Any]) -> str:
        return "ovis_image"

    def model_inputs(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        grid: tuple[int, int],
        guidance: float | None,
    ) -> dict[str, Any]:
        embeds = text["prompt_embeds"]
        ids = position_ids(noisy, embeds.shape[1], grid)
        place = torch.arange(embeds.shape[1], device=noisy.device)
        ids["txt_ids"] = torch.stack((torch.zeros_like(place), place, place), dim=1).to(noisy)
        return {"hidden_states": noisy, "encoder_hidden_states": embeds, "timestep": times, **ids}
