"""Krea 2, Raw and Turbo: one stream of text and then image, few heads of keys and values, a gate on attention's output.

Sources, read in November 2026: diffusers 0.42's Krea2Transformer2DModel and Krea2Pipeline; the README of
krea-ai/krea-2; the scheduler's config of krea/Krea-2-Raw, as mflux's pull request 465 quotes it; the config of
Qwen3-VL-4B-Instruct. Both are flow models of one shape. The pipeline moves times by the image's size, by exp(0.5) at
256 tokens and exp(1.15) at 6400, and for Turbo (`is_distilled` in its model_index.json) by exp(1.15) at any size, at
which it was distilled. Raw makes up to 1024 pixels, with 52 steps and a guidance of 3.5, Turbo 1024 to 2048 with 8
steps and none. Guidance is counted from 0: its 3.5 is 4.5 elsewhere. Neither source tells the times that Raw was
trained at: a student learns at SD3's, moved as the pipeline moves them. A student of Turbo learns at the steps of 1 to
8.

The model reads 12 layers of the text encoder. Its own blocks on these (`text_fusion`) have the same kind of attention,
of text alone or of one token's layers, and stay dense. Padding lies within the text, before its end, and is hidden by
a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from diffusers.models.transformers.transformer_krea2 import Krea2AttnProcessor
from torch import nn

from ..attention import TokenLayout
from .family import LayerShape, Part, Processors, Published
from .film_vae import FilmVAE
from .flux import Flux, rotations
from .hybrid_model import hybrid_class
from .processing import LayoutHolder, check_call, far_inputs, project
from .recipe import Recipe, few_steps, moved, sampled_logit_normal, sampling_shift

HybridKrea2Transformer2DModel = hybrid_class(Krea2Transformer2DModel)
QWEN3_VL_4B = 4_437_815_808  # with the part that reads images, which the pipeline loads, too
TURBO_SHIFT = 1.15  # the logarithm of the factor by which Turbo's times are moved


class HybridKrea2AttnProcessor:
    """Krea2AttnProcessor with hybrid attention in place of softmax over all tokens."""

    layout_holder: LayoutHolder

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        token_layout = self.layout_holder.token_layout
        check_call(token_layout)
        query, key, value = (
            project(attn, name, hidden_states).unflatten(-1, (-1, attn.head_dim))  # [B, S, heads or kv_heads, D]
            for name in ("to_q", "to_k", "to_v")
        )
        rotate, rotate_image = rotations(image_rotary_emb, token_layout)
        of_image = (token_layout.split(tokens)[1] for tokens in (hidden_states, query, key))
        far = far_inputs(attn, *of_image, rotate=rotate_image)

        query, key = attn.norm_q(query), attn.norm_k(key)
        if rotate is not None:
            query, key = rotate(query), rotate(key)
        # the model's mask is [B, 1, 1, S], of text and image
        text_mask = None if attention_mask is None else attention_mask[:, 0, 0, : token_layout.text_length]
        out = attn.hybrid(query, key, value, token_layout, text_mask=text_mask, **far).flatten(2).to(query.dtype)
        return project(attn, "to_out.0", out * project(attn, "to_gate", hidden_states).sigmoid())


def turbo_steps(count: int, tokens: int, scheduler: Any, generator: torch.Generator) -> torch.Tensor:
    """The times of Turbo's schedules of 1 to 8 steps."""
    steps = few_steps(count, tokens, scheduler, generator, most=8)
    fixed = {**scheduler.config, "base_shift": TURBO_SHIFT, "max_shift": TURBO_SHIFT}
    return moved(steps, sampling_shift(tokens, fixed))


class Krea2(FilmVAE, Flux):
    """Krea 2 Raw, and Turbo, made for 8 steps without guidance: one class of pipelines, which says what it is."""

    name = "Krea 2"
    dense_class = Krea2Transformer2DModel
    hybrid_class = HybridKrea2Transformer2DModel
    layers = ("transformer_blocks.*.attn",)
    processors = (Processors(Krea2AttnProcessor, HybridKrea2AttnProcessor),)
    attention_kwargs = None  # diffusers' are for LoRA's scale alone
    position_embedding = "rotary_emb"
    image_exit = "final_layer"
    image_arguments = ("hidden_states",)
    joint_arguments = ("position_ids",)
    pipelines = {"text-to-image": Krea2Pipeline}
    text_encoders = ("text_encoder",)
    longest_text = None
    scheduler = FlowMatchEulerDiscreteScheduler
    vae_class = AutoencoderKLQwenImage
    guided = True
    guided_together = False
    guides_above = 0.0
    usual_side = 1024
    recipes = {
        "krea2": Recipe(sampled_logit_normal, 1.0, 0.5, 0.5, 0.1),
        "krea2_turbo": Recipe(turbo_steps, 0.0, 1.0, 0.5, 0.0, few_steps=True),
    }
    published = {
        # the defaults of diffusers' class
        "krea/Krea-2-Raw": Published(shape="krea2", text_parameters=QWEN3_VL_4B, recipe="krea2"),
        "krea/Krea-2-Turbo": Published(text_parameters=QWEN3_VL_4B, recipe="krea2_turbo"),
    }

    def layer_shape(self, attn: nn.Module) -> LayerShape:
        return LayerShape(attn.hidden_size, attn.num_heads, attn.num_kv_heads, attn.head_dim)

    def projections(self, attn: nn.Module) -> dict[str, nn.Linear | Part]:
        return {**super().projections(attn), "to_gate": attn.to_gate}

    def token_layout(self, model: nn.Module, inputs: Mapping[str, Any]) -> TokenLayout:
        """The text's length, and the grids that the image's rows of `position_ids` describe.

        Raises ValueError for ids that are not those of all tokens, and for a mask that is not bool [B, text].
        """
        text, tokens = inputs["encoder_hidden_states"].shape[1], inputs["hidden_states"].shape[1]
        ids, mask = inputs["position_ids"], inputs.get("encoder_attention_mask")
        if len(ids) != text + tokens:
            raise ValueError(
                f"position_ids have a row for each of {text} text and {tokens} image tokens, not {len(ids)} rows"
            )
        shape = len(inputs["hidden_states"]), text
        if mask is not None and (mask.dtype, mask.shape) != (torch.bool, shape):
            raise ValueError(
                f"encoder_attention_mask is of bool, {shape}, True for text that is there: not {mask.dtype}, "
                f"{tuple(mask.shape)}"
            )
        return TokenLayout(text, self.grids("position_ids", ids, tokens, first=text), text_first=True)

    def encode_prompts(self, pipeline: Any, prompts: list[str], **length: int) -> dict[str, torch.Tensor]:
        embeds, mask = pipeline.encode_prompt(prompts, **length)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}

    def example_text(
        self, config: Mapping[str, Any], count: int, length: int, make: Callable[..., torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        embeds = make(count, length, config["num_text_layers"], config["text_hidden_dim"])
        return {"prompt_embeds": embeds, "prompt_embeds_mask": embeds.new_ones(count, length, dtype=torch.bool)}

    def default_recipe(self, config: Mapping[str, Any]) -> str:
        """Assume Turbo, whose transformer Raw's does not differ from."""
        return "krea2_turbo"

    def pipeline_recipe(self, config: Mapping[str, Any]) -> str | None:
        distilled = config.get("is_distilled")
        return None if distilled is None else "krea2_turbo" if distilled else "krea2"

    def model_inputs(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        grid: tuple[int, int],
        guidance: float | None,
    ) -> dict[str, Any]:
        embeds = text["prompt_embeds"]
        return {
            "hidden_states": noisy,
            "encoder_hidden_states": embeds,
            "encoder_attention_mask": text["prompt_embeds_mask"].bool(),
            "timestep": times,
            "position_ids": Krea2Pipeline.prepare_position_ids(embeds.shape[1], *grid, noisy.device),
        }
