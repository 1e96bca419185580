"""PixArt-Sigma: its self-attention over the image (attn1) is converted, the cross-attention to text (attn2) is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed_from_grid

from ..attention import TokenLayout
from .ddpm import DDPMFamily
from .family import T5_XXL, Processors, Published, check_latents_scale
from .hybrid_model import hybrid_class
from .processing import check_call, far_inputs, norm, project
from .recipe import Recipe, uniform_steps


class HybridAttnProcessor:
    """AttnProcessor2_0 for self-attention, with hybrid attention in place of softmax over all tokens."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_layout: TokenLayout | None = None,
    ) -> torch.Tensor:
        check_call(token_layout, attention_mask)
        query, key, value = (
            project(attn, name, hidden_states).unflatten(-1, (attn.heads, -1))  # [B, N, heads, D]
            for name in ("to_q", "to_k", "to_v")
        )
        far = far_inputs(attn, hidden_states, query, key)
        query, key = norm(attn.norm_q, query), norm(attn.norm_k, key)
        out = attn.hybrid(query, key, value, token_layout, **far).flatten(2).to(query.dtype)
        return attn.to_out[1](project(attn, "to_out.0", out))


class DenseAttnProcessor(AttnProcessor2_0):
    """The teacher's processor, for layers that stay dense: it accepts and ignores `token_layout`."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_layout: TokenLayout | None = None,
    ) -> torch.Tensor:
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)


def embed_in_strips(embed: PatchEmbed, rows: int, latents: torch.Tensor) -> torch.Tensor:
    """diffusers' PatchEmbed over `rows` rows of tokens at a time: [B, C, h, w] -> [B, N, width].

    The table of an image's positions is in float64, several times as large as the tokens in bfloat16.
    """
    height, width = (side // embed.patch_size for side in latents.shape[2:])
    tokens = []
    for start in range(0, height, rows):
        end = min(start + rows, height)
        strip = embed.proj(latents[:, :, start * embed.patch_size : end * embed.patch_size])
        strip = strip.flatten(2).transpose(1, 2)
        if (embed.height, embed.width) == (height, width):
            positions = embed.pos_embed[:, start * width : end * width]
        else:
            row, column = (
                torch.arange(first, last, device=latents.device, dtype=torch.float32)
                / (length / embed.base_size)
                / embed.interpolation_scale
                for first, last, length in ((start, end, height), (0, width, width))
            )
            grid = torch.stack(torch.meshgrid(column, row, indexing="xy"))  # columns go first, as in diffusers
            positions = get_2d_sincos_pos_embed_from_grid(embed.pos_embed.shape[-1], grid).float()
        tokens.append((strip + positions).to(strip.dtype))
    return torch.cat(tokens, 1)


HybridPixArtTransformer2DModel = hybrid_class(PixArtTransformer2DModel, _repeated_blocks=["BasicTransformerBlock"])

XL = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "use_additional_conditions": False,
}


class PixArtSigma(DDPMFamily):
    """PixArt-Sigma, in all its sizes."""

    name = "PixArt-Sigma"
    dense_class = PixArtTransformer2DModel
    hybrid_class = HybridPixArtTransformer2DModel
    layers = ("transformer_blocks.*.attn1",)
    processors = (Processors(AttnProcessor2_0, HybridAttnProcessor, DenseAttnProcessor),)
    attention_kwargs = "cross_attention_kwargs"
    joint = False
    image_entrance = "pos_embed"
    image_exit = "proj_out"
    positions = ("interpolated",)  # by the model itself
    pipelines = {"text-to-image": PixArtSigmaPipeline}
    scheduler = DPMSolverMultistepScheduler
    recipes = {"pixart_sigma": Recipe(uniform_steps, 1.0, 0.5, 0.5, 0.1)}
    published = {
        "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": Published(
            {**XL, "sample_size": 64, "interpolation_scale": 1}, text_parameters=T5_XXL
        ),
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": Published(
            {**XL, "sample_size": 128, "interpolation_scale": 2}, "pixart-sigma", text_parameters=T5_XXL
        ),
    }

    def strip_forwards(self, model: torch.nn.Module, rows: int) -> dict[torch.nn.Module, Callable[..., Any]]:
        return {model.pos_embed: partial(embed_in_strips, model.pos_embed, rows)}

    def model_latents(self, vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
        check_latents_scale(vae.config)
        return latents * vae.config.scaling_factor  # its pipeline adds no shift either

    def vae_latents(self, vae: torch.nn.Module, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        check_latents_scale(vae.config)
        return latents / vae.config.scaling_factor

    def encode_prompts(self, pipeline: Any, prompts: list[str], **length: int) -> dict[str, torch.Tensor]:
        embeds, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, **length)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def example_text(
        self, config: Mapping[str, Any], count: int, length: int, make: Callable[..., torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        embeds = make(count, length, config["caption_channels"])
        return {"prompt_embeds": embeds, "prompt_attention_mask": embeds.new_ones(count, length)}

    def sampling_arguments(
        self, text: Mapping[str, torch.Tensor], empty: Mapping[str, torch.Tensor], count: int
    ) -> dict[str, Any]:
        # the requested size, not the nearest one of diffusers' list; and only encoded prompts
        own = {"use_resolution_binning": False, "prompt": None, "negative_prompt": None}
        return {**super().sampling_arguments(text, empty, count), **own}

    def model_inputs(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        grid: tuple[int, int],
        guidance: float | None,
    ) -> dict[str, Any]:
        return {
            "hidden_states": noisy,
            "encoder_hidden_states": text["prompt_embeds"],
            "encoder_attention_mask": text["prompt_attention_mask"],
            "timestep": times,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    def prediction(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        # the second half of the channels is a variance
        return output[:, : latents.shape[1]] if output.shape[1] == 2 * latents.shape[1] else output
