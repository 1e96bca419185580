"""The UNets of Stable Diffusion 1.5, 2.1 and XL: the self-attentions (attn1) of all their levels are converted.

Each level halves the grid of the one before, rounding up, as its convolution does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from ..attention import TokenLayout
from .ddpm import DDPMFamily
from .family import Processors, Published, check_latents_scale
from .hybrid_model import hybrid_class
from .pixart_sigma import DenseAttnProcessor, HybridAttnProcessor
from .processing import check_call
from .recipe import Recipe, alphas_of, uniform_steps

PIXELS = 8  # a latent, along each axis: SDXL is told its image's size in pixels
# the UNet's arguments beyond prompts, latents and times, which are not given here
UNSERVED = ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "only_cross_attention", "dual_cross_attention")


def halved(token_layout: TokenLayout) -> TokenLayout:
    """The layout one level down: a convolution of stride 2 rounds up."""
    return token_layout._replace(grids=tuple((-(-rows // 2), -(-columns // 2)) for rows, columns in token_layout.grids))


class HybridUNetAttnProcessor(HybridAttnProcessor):
    """Hybrid self-attention at any level of a UNet. `token_layout` is that of the latents."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_layout: TokenLayout | None = None,
    ) -> torch.Tensor:
        check_call(token_layout, attention_mask)
        while token_layout.image_length > hidden_states.shape[1]:  # no two levels have as many tokens
            token_layout = halved(token_layout)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, token_layout)


HybridUNet2DConditionModel = hybrid_class(UNet2DConditionModel, _repeated_blocks=["BasicTransformerBlock"])

CLIP_L, OPEN_CLIP_H, OPEN_CLIP_BIG_G = 123_060_480, 340_387_840, 694_659_840  # parameters of text encoders
XL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15 = Published({"sample_size": 64, "cross_attention_dim": 768}, text_parameters=CLIP_L)


class StableDiffusionUNet(DDPMFamily):
    """Stable Diffusion 1.5, 2.1 and XL, and what was finetuned or pruned from them."""

    name = "Stable Diffusion's UNets"
    component = "unet"
    dense_class = UNet2DConditionModel
    hybrid_class = HybridUNet2DConditionModel
    layers = ("*.attn1",)
    processors = (Processors(AttnProcessor2_0, HybridUNetAttnProcessor, DenseAttnProcessor),)
    attention_kwargs = "cross_attention_kwargs"
    joint = False
    skip_connections = True
    pipelines = {
        "text-to-image": StableDiffusionPipeline,
        "image-to-image": StableDiffusionImg2ImgPipeline,
        "inpainting": StableDiffusionInpaintPipeline,
    }
    other_pipelines = (
        {
            "text-to-image": StableDiffusionXLPipeline,
            "image-to-image": StableDiffusionXLImg2ImgPipeline,
            "inpainting": StableDiffusionXLInpaintPipeline,
        },
    )
    scheduler = DPMSolverMultistepScheduler
    recipes = {"unet": Recipe(uniform_steps, 1.0, 0.5, 0.5, 0.1)}
    published = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": SD15,
        "runwayml/stable-diffusion-v1-5": SD15,
        "stabilityai/stable-diffusion-2-1": Published(
            {
                "sample_size": 96,
                "cross_attention_dim": 1024,
                "attention_head_dim": (5, 10, 20, 20),
                "use_linear_projection": True,
                "upcast_attention": True,
            },
            text_parameters=OPEN_CLIP_H,
        ),
        "stabilityai/stable-diffusion-xl-base-1.0": Published(XL, text_parameters=CLIP_L + OPEN_CLIP_BIG_G),
    }

    def check_config(self, config: Mapping[str, Any]) -> None:
        for name in UNSERVED:
            value = config.get(name)
            if any(value) if isinstance(value, (list, tuple)) else value:
                raise ValueError(f"a UNet with {name} {value!r} is not supported: those of Stable Diffusion are")
        if config.get("addition_embed_type") not in (None, "text_time"):
            raise ValueError(
                f"a UNet with addition_embed_type {config['addition_embed_type']!r} is not supported: those of Stable "
                "Diffusion are"
            )

    # Tokens

    def layer_layout(self, model: nn.Module, layer: str, token_layout: TokenLayout) -> TokenLayout:
        stack, index = layer.split(".")[:2]
        last = len(model.down_blocks) - 1
        level = {"down_blocks": int, "up_blocks": lambda index: last - int(index)}.get(stack, lambda _: last)(index)
        for _ in range(level):
            token_layout = halved(token_layout)
        return token_layout

    def token_layout(self, model: nn.Module, inputs: Mapping[str, Any]) -> TokenLayout:
        return TokenLayout(0, (tuple(inputs["sample"].shape[-2:]),), self.text_first)

    def latents_per_token(self, config: Mapping[str, Any]) -> int:
        return 1

    def latents_shape(self, config: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, ...]:
        return (config["out_channels"], *grid)

    def latent_pixels(self, vae_config: Mapping[str, Any]) -> int:
        pixels = super().latent_pixels(vae_config)
        if pixels != PIXELS:
            raise ValueError(f"the VAE has {pixels} pixels a latent, and {self.name} are for one of {PIXELS}")
        return pixels

    def model_latents(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        check_latents_scale(vae.config)
        return latents * vae.config.scaling_factor  # their pipelines add no shift

    def vae_latents(self, vae: nn.Module, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        check_latents_scale(vae.config)
        return latents / vae.config.scaling_factor

    # Prompts

    def check_encoders(self, components: Mapping[str, Any]) -> None:
        super().check_encoders(components)
        if components.get("text_encoder_2", ()) is None:
            raise ValueError(
                "this pipeline has no text_encoder_2, without which a StableDiffusionXLPipeline reads no prompts"
            )

    def encode_prompts(self, pipeline: Any, prompts: list[str], **length: int) -> dict[str, torch.Tensor]:
        self.text_length(**length)
        if not hasattr(pipeline, "text_encoder_2"):
            return {"prompt_embeds": pipeline.encode_prompt(prompts, pipeline._execution_device, 1, False)[0]}
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        if pipeline.config.force_zeros_for_empty_prompt:  # as the pipeline has it where there is no negative prompt
            said = torch.tensor([prompt != "" for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds * said[:, None, None], pooled * said[:, None]
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def example_text(
        self, config: Mapping[str, Any], count: int, length: int, make: Callable[..., torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        text = {"prompt_embeds": make(count, length, config["cross_attention_dim"])}
        if config["addition_embed_type"] is not None:
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            text["pooled_prompt_embeds"] = make(count, pooled)
        return text

    def text_length(self, max_sequence_length: int | None = None, tokenizer_length: int = 77) -> int:
        if max_sequence_length is not None:
            raise ValueError(f"{self.name} read as many tokens as their tokenizer gives: leave max_sequence_length out")
        return tokenizer_length

    # The teacher

    def default_recipe(self, config: Mapping[str, Any]) -> str:
        if config["in_channels"] != config["out_channels"]:
            raise ValueError(
                f"a UNet that makes {config['out_channels']} channels of {config['in_channels']} (inpainting, editing) is "
                "not distilled: distill the text-to-image UNet, and load the adapter with check_base=False (--any-base)"
            )
        if config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                "a UNet that takes the guidance scale (LCM) is not distilled: distill the one it was made from"
            )
        return super().default_recipe(config)

    def model_inputs(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        grid: tuple[int, int],
        guidance: float | None,
    ) -> dict[str, Any]:
        inputs = {"sample": noisy, "timestep": times, "encoder_hidden_states": text["prompt_embeds"]}
        if "pooled_prompt_embeds" not in text:
            return inputs
        size = [side * PIXELS for side in grid]
        sizes = noisy.new_tensor([[*size, 0, 0, *size]]).expand(len(noisy), -1)  # original, crop's corner, target
        return {
            **inputs,
            "added_cond_kwargs": {"text_embeds": text["pooled_prompt_embeds"].to(noisy), "time_ids": sizes},
        }

    def latents_and_times(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs["sample"], torch.as_tensor(inputs["timestep"]).expand(len(inputs["sample"]))

    def sampling_from(self, scheduler: Any, sigmas: Sequence[float]) -> tuple[Any, dict[str, Any]]:
        alphas_of(scheduler)
        return super().sampling_from(self.scheduler.from_config(scheduler.config), sigmas)
