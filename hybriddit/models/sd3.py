"""Stable Diffusion 3 and 3.5: image first; 3.5-medium's dual attention adds layers that see only the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.embeddings import PatchEmbed
from torch import nn

from ..attention import TokenLayout
from .family import T5_XXL, Family, Processors, Published
from .hybrid_model import hybrid_class
from .positions import stretched_rows
from .processing import check_call, far_inputs, norm, project
from .recipe import Recipe, shifted_logit_normal


class HybridJointAttnProcessor:
    """JointAttnProcessor2_0 with hybrid attention in place of softmax over all tokens."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_layout: TokenLayout | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        check_call(token_layout, attention_mask)

        def heads(name, tokens):
            return project(attn, name, tokens).unflatten(-1, (attn.heads, -1))  # [B, S, heads, D]

        query, key, value = (heads(name, hidden_states) for name in ("to_q", "to_k", "to_v"))
        far = far_inputs(attn, hidden_states, query, key)
        query, key = norm(attn.norm_q, query), norm(attn.norm_k, key)

        if encoder_hidden_states is None:  # attn2 of a dual block sees only the image
            image_layout = token_layout._replace(text_length=0)
            out = attn.hybrid(query, key, value, image_layout, **far).flatten(2).to(query.dtype)
            return attn.to_out[1](project(attn, "to_out.0", out))

        text_query, text_key, text_value = (
            heads(name, encoder_hidden_states) for name in ("add_q_proj", "add_k_proj", "add_v_proj")
        )
        query = token_layout.join(norm(attn.norm_added_q, text_query), query)
        key = token_layout.join(norm(attn.norm_added_k, text_key), key)
        value = token_layout.join(text_value, value)
        out = attn.hybrid(query, key, value, token_layout, **far).flatten(2).to(query.dtype)
        text, image = token_layout.split(out)
        if not attn.context_pre_only:
            text = project(attn, "to_add_out", text)
        return attn.to_out[1](project(attn, "to_out.0", image)), text


class DenseJointAttnProcessor(JointAttnProcessor2_0):
    """The teacher's processor, for layers that stay dense: it accepts and ignores `token_layout`."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_layout: TokenLayout | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)


ROWS = 64  # of tokens whose positions are made at a time


def embed_stretched(embed: PatchEmbed, native: tuple[int, int], latents: torch.Tensor) -> torch.Tensor:
    """diffusers' PatchEmbed, with the middle of its table stretched where an image is larger than native.

    latents [B, C, h, w] -> [B, N, width]. native: (rows, columns) of tokens. A stretched table is never held as a whole.
    """
    tokens, most = embed.proj(latents).permute(0, 2, 3, 1).contiguous(), embed.pos_embed_max_size
    grid = tokens.shape[1:3]
    rows, columns = (min(most, own, length) for own, length in zip(native, grid, strict=True))
    top, left = (most - rows) // 2, (most - columns) // 2
    table = embed.pos_embed.view(most, most, -1)[top : top + rows, left : left + columns]
    for start in range(0, grid[0], ROWS):
        end = min(start + ROWS, grid[0])
        tokens[:, start:end] += stretched_rows(table, grid, (start, end)).to(tokens.dtype)
    return tokens.flatten(1, 2)


HybridSD3Transformer2DModel = hybrid_class(SD3Transformer2DModel, _repeated_blocks=["JointTransformerBlock"])


COMMON = {"sample_size": 128, "in_channels": 16, "attention_head_dim": 64, "joint_attention_dim": 4096}
MEDIUM = {**COMMON, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
TEXT = T5_XXL + 123_650_304 + 694_659_840  # with CLIP's L and bigG
LARGE = {**COMMON, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5."""

    name = "Stable Diffusion 3"
    dense_class = SD3Transformer2DModel
    hybrid_class = HybridSD3Transformer2DModel
    layers = ("transformer_blocks.*.attn", "transformer_blocks.*.attn2")
    processors = (Processors(JointAttnProcessor2_0, HybridJointAttnProcessor, DenseJointAttnProcessor),)
    attention_kwargs = "joint_attention_kwargs"
    joint = True
    image_entrance = "pos_embed"
    image_exit = "proj_out"
    positions = ("plain", "interpolated")
    image_arguments = ("block_controlnet_hidden_states",)
    pipelines = {
        "text-to-image": StableDiffusion3Pipeline,
        "image-to-image": StableDiffusion3Img2ImgPipeline,
        "inpainting": StableDiffusion3InpaintPipeline,
    }
    text_encoders = ("text_encoder", "text_encoder_2")
    longest_text = 512
    scheduler = FlowMatchEulerDiscreteScheduler
    recipes = {"sd3": Recipe(shifted_logit_normal, 1.0, 0.5, 0.5, 0.1)}
    published = {
        "stabilityai/stable-diffusion-3-medium-diffusers": Published(
            {**MEDIUM, "pos_embed_max_size": 192}, "sd3", text_parameters=TEXT
        ),
        "stabilityai/stable-diffusion-3.5-medium": Published(
            {
                **MEDIUM,
                "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)),
                "qk_norm": "rms_norm",
            },
            "sd3.5-medium",
            text_parameters=TEXT,
        ),
        "stabilityai/stable-diffusion-3.5-large": Published(
            {**LARGE, "pos_embed_max_size": 192, "qk_norm": "rms_norm"}, "sd3.5-large", text_parameters=TEXT
        ),
    }

    def projections(self, attn: nn.Module) -> dict[str, nn.Linear]:
        found = super().projections(attn)
        if attn.context_pre_only:
            found.pop("add_q_proj", None)  # the last block drops the output of its text queries
        return found

    def layer_layout(self, model: nn.Module, layer: str, token_layout: TokenLayout) -> TokenLayout:
        if layer.endswith(".attn2"):  # 3.5-medium's second attention sees only the image
            return token_layout._replace(text_length=0)
        return token_layout

    def layer_outputs(self, attn: nn.Module, output: torch.Tensor | tuple) -> tuple[torch.Tensor, ...]:
        parts = super().layer_outputs(attn, output)
        return parts[:1] if attn.context_pre_only else parts  # the last block's text output is thrown away, unprojected

    def position_forwards(
        self, model: nn.Module, positions: str, native: tuple[int, int], grid: tuple[int, int]
    ) -> dict[nn.Module, Callable[..., Any]]:
        return {model.pos_embed: partial(embed_stretched, model.pos_embed, native)}

    def check_grid(self, config: Mapping[str, Any], grid: tuple[int, int]) -> None:
        most = config["pos_embed_max_size"]
        if most is not None and max(grid) > most:
            raise ValueError(
                f"an image of {grid[0]} x {grid[1]} tokens is too large: this model has positions for {most} x {most}"
            )

    def encode_prompts(self, pipeline: Any, prompts: list[str], **length: int) -> dict[str, torch.Tensor]:
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, **length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def example_text(
        self, config: Mapping[str, Any], count: int, length: int, make: Callable[..., torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        embeds = make(count, length, config["joint_attention_dim"])
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": make(count, config["pooled_projection_dim"])}

    def text_length(self, max_sequence_length: int | None = None, tokenizer_length: int = 77) -> int:
        return super().text_length(max_sequence_length) + tokenizer_length  # CLIP's tokens go before T5's

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
            "pooled_projections": text["pooled_prompt_embeds"].to(noisy),
            "timestep": times * 1000,
        }

    def latents_and_times(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        latents, timestep = super().latents_and_times(inputs)
        return latents, timestep / 1000
