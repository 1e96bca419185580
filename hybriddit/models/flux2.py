"""FLUX.2: FLUX's blocks with four numbers for a place, no pooled text, and q, k, v and the MLP of single blocks in one.

Sources, read in November 2026: diffusers 0.42's Flux2Transformer2DModel, AutoencoderKLFlux2, Flux2Pipeline and
Flux2KleinPipeline; the sampling code of github.com/black-forest-labs/flux2; the scheduler's config of
diffusers/flux2-bnb-4bit-modular. klein's sizes are those that ports of its checkpoints give; they add up to the 4 and 9
billion parameters of its names. All are flow models. The pipelines pad text to its full length and hide nothing of it.
They shift times by a formula of image size and steps: at 4096 tokens by exp(2.02) with 50 steps, exp(2.29) with 4.

dev is sampled with 50 steps and an embedded guidance of 4; klein is distilled to 4 steps without guidance; klein-base
takes 50 steps and real guidance of 4. The times that they were trained at are not published: students of dev and
klein-base learn at logit-normal times with the shift that 50 steps have, those of klein at the steps that 1 to 4 make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinInpaintPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import nn

from ..attention import TokenLayout
from .family import LayerShape, Part, Processors, Published
from .flux import Flux, HybridFluxAttnProcessor, rotations, shown
from .hybrid_model import hybrid_class
from .processing import check_call, far_inputs, updated
from .recipe import Recipe, few_steps, moved

Tables = tuple[torch.Tensor, torch.Tensor]  # (cos, sin) of text and image, [S, D] each


class HybridFlux2ParallelSelfAttnProcessor:
    """Flux2ParallelSelfAttnProcessor with hybrid attention; the low-rank updates are of attention's parts alone."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Tables | None = None,
        token_layout: TokenLayout | None = None,
        text_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        check_call(token_layout, attention_mask)
        fused = attn.to_qkv_mlp_proj(hidden_states)
        *parts, hidden = fused.split((*3 * (attn.inner_dim,), fused.shape[-1] - 3 * attn.inner_dim), dim=-1)
        query, key, value = (
            updated(attn, name, part, hidden_states).unflatten(-1, (-1, attn.head_dim))  # [B, S, heads, D]
            for name, part in zip(("to_q", "to_k", "to_v"), parts, strict=True)
        )
        rotate, rotate_image = rotations(image_rotary_emb, token_layout)
        of_image = (token_layout.split(tokens)[1] for tokens in (hidden_states, query, key))
        far = far_inputs(attn, *of_image, rotate=rotate_image)

        query, key = attn.norm_q(query), attn.norm_k(key)
        if rotate is not None:
            query, key = rotate(query), rotate(key)
        out = attn.hybrid(query, key, value, token_layout, text_mask=text_mask, **far).flatten(2).to(query.dtype)
        return updated(attn, "to_out", attn.to_out(torch.cat((out, attn.mlp_act_fn(hidden)), -1)), out)


class DenseFlux2AttnProcessor(Flux2AttnProcessor):
    """The teacher's processor, for double blocks that stay dense: it needs `token_layout` only to hide padded text."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Tables | None = None,
        token_layout: TokenLayout | None = None,
        text_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attention_mask = shown(attention_mask, text_mask, token_layout)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


class DenseFlux2ParallelSelfAttnProcessor(Flux2ParallelSelfAttnProcessor):
    """The same for single blocks."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Tables | None = None,
        token_layout: TokenLayout | None = None,
        text_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return super().__call__(attn, hidden_states, shown(attention_mask, text_mask, token_layout), image_rotary_emb)


def _shift(tokens: int, steps: int, config: Mapping[str, Any]) -> float:
    """The factor on sigma / (1 - sigma) by which the pipelines move the times of so many steps towards noise."""
    if not config.get("use_dynamic_shifting"):
        return config.get("shift", 1.0)
    mu = compute_empirical_mu(tokens, steps)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def sampled_logit_normal(count: int, tokens: int, scheduler: Any, generator: torch.Generator) -> torch.Tensor:
    """Logit-normal times, moved towards noise as the pipelines move those of 50 steps."""
    sigma = torch.randn(count, generator=generator).sigmoid()
    return moved(sigma, _shift(tokens, 50, scheduler.config))


def sampled_few_steps(count: int, tokens: int, scheduler: Any, generator: torch.Generator) -> torch.Tensor:
    """The times of the pipelines' schedules of 1 to 4 steps, moved by as much as those of 4."""
    return moved(few_steps(count, tokens, scheduler, generator), _shift(tokens, 4, scheduler.config))


def ids_along(*counts: int, device: torch.device) -> torch.Tensor:
    """Whole numbers along each of the axes, [tokens, axes], the last axis running fastest."""
    return torch.cartesian_prod(*(torch.arange(count, device=device) for count in counts))


HybridFlux2Transformer2DModel = hybrid_class(Flux2Transformer2DModel)
MISTRAL_SMALL = 24_011_361_280  # with its eyes
QWEN3_4B, QWEN3_8B = 4_022_468_096, 8_190_735_360
KLEIN_4B, KLEIN_9B = (
    {
        "num_layers": double,
        "num_single_layers": single,
        "num_attention_heads": heads,
        "joint_attention_dim": text,
        "guidance_embeds": False,
    }
    for double, single, heads, text in ((5, 20, 24, 7680), (8, 24, 32, 12288))
)


class Flux2(Flux):
    """FLUX.2-dev, whose guidance scale is an input. An image to start from is a reference image, which it edits."""

    name = "FLUX.2"
    dense_class = Flux2Transformer2DModel
    hybrid_class = HybridFlux2Transformer2DModel
    processors = (
        Processors(Flux2AttnProcessor, HybridFluxAttnProcessor, DenseFlux2AttnProcessor),
        Processors(
            Flux2ParallelSelfAttnProcessor, HybridFlux2ParallelSelfAttnProcessor, DenseFlux2ParallelSelfAttnProcessor
        ),
    )
    image_arguments = ("hidden_states", "img_ids")
    pipelines = {"text-to-image": Flux2Pipeline, "image-to-image": Flux2Pipeline}
    text_encoders = ("text_encoder",)
    longest_text = None
    vae_class = AutoencoderKLFlux2
    scheduler = FlowMatchEulerDiscreteScheduler
    guided = False  # the guidance scale is distilled into the model
    recipes = {"flux2_dev": Recipe(sampled_logit_normal, 1.0, 0.5, 0.5, 0.0, task_needs_teacher_images=True)}
    published = {
        # the defaults of diffusers' class
        "black-forest-labs/FLUX.2-dev": Published(shape="flux2", text_parameters=MISTRAL_SMALL),
    }

    def serves(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("guidance_embeds", True))  # as the class has it

    def layer_shape(self, attn: nn.Module) -> LayerShape:
        return LayerShape(attn.query_dim, attn.heads, attn.heads, attn.head_dim)

    def projections(self, attn: nn.Module) -> dict[str, nn.Linear | Part]:
        """In single blocks, of the layers that the MLP shares, the parts of attention alone."""
        if not hasattr(attn, "to_qkv_mlp_proj"):
            return super().projections(attn)
        into = Part(attn.query_dim, attn.inner_dim)
        return {"to_q": into, "to_k": into, "to_v": into, "to_out": Part(attn.inner_dim, attn.out_dim)}

    def exact_inputs(self, inputs: dict[str, Any], token_layout: TokenLayout) -> dict[str, Any]:
        """As they are: the pipelines' ids are whole numbers.

        Raises ValueError for ids that do not tell all rows and columns apart, and for calls with cached references.
        """
        if inputs.get("kv_cache_mode") is not None:
            raise ValueError(
                "hybrid models keep no keys and values of reference images (kv_cache_mode): use Flux2KleinPipeline in place "
                "of Flux2KleinKVPipeline, or restore_dense(model)"
            )
        ids = inputs["img_ids"]
        if ids.is_floating_point() and max(map(max, token_layout.grids)) > 2 / torch.finfo(ids.dtype).eps:
            raise ValueError(
                f"img_ids in {ids.dtype} do not tell all rows and columns apart: pass whole numbers, as diffusers' pipelines do"
            )
        return inputs

    def latents_scale(self, vae: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Of packed latents, [4 C] each: those of the VAE's batch norm."""
        return vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).rsqrt()

    def model_latents(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        shift, factor = (value.to(latents) for value in self.latents_scale(vae))
        return (self.pack(latents) - shift) * factor

    def vae_latents(self, vae: nn.Module, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        shift, factor = (value.to(latents) for value in self.latents_scale(vae))
        return self.unpack(latents / factor + shift, grid)

    def given_latents(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return latents.transpose(1, 2).unflatten(2, grid)

    def published_vae(self, channels: int) -> nn.Module:
        return AutoencoderKLFlux2(latent_channels=channels)

    def encode_prompts(self, pipeline: Any, prompts: list[str], **length: int) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": pipeline.encode_prompt(prompts, **length)[0]}

    def example_text(
        self, config: Mapping[str, Any], count: int, length: int, make: Callable[..., torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": make(count, length, config["joint_attention_dim"])}

    def default_recipe(self, config: Mapping[str, Any]) -> str:
        return "flux2_dev"

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
            "timestep": times,
            "guidance": None if guidance is None else torch.full_like(times, guidance),
            "img_ids": ids_along(1, *grid, 1, device=noisy.device),
            "txt_ids": ids_along(1, 1, 1, embeds.shape[1], device=noisy.device),
        }


class Flux2Klein(Flux2):
    """FLUX.2-klein, made for 4 steps without guidance, and klein-base: one class of pipelines, which says what it is."""

    name = "FLUX.2 klein"
    pipelines = {
        "text-to-image": Flux2KleinPipeline,
        "image-to-image": Flux2KleinPipeline,
        "inpainting": Flux2KleinInpaintPipeline,
    }
    samples_with_vae = True
    guided = True
    guided_together = False
    unguided_if_distilled = True
    recipes = {
        "flux2_klein": Recipe(sampled_few_steps, 0.0, 1.0, 0.5, 0.0, few_steps=True),
        "flux2_klein_base": Recipe(sampled_logit_normal, 1.0, 0.5, 0.5, 0.1),
    }
    published = {
        "black-forest-labs/FLUX.2-klein-4B": Published(KLEIN_4B, text_parameters=QWEN3_4B),
        "black-forest-labs/FLUX.2-klein-9B": Published(KLEIN_9B, text_parameters=QWEN3_8B),
        "black-forest-labs/FLUX.2-klein-base-4B": Published(
            KLEIN_4B, shape="flux2-klein", text_parameters=QWEN3_4B, recipe="flux2_klein_base"
        ),
    }

    def serves(self, config: Mapping[str, Any]) -> bool:
        return not super().serves(config)

    def sampled_latents(self, vae: nn.Module | None, latents: torch.Tensor) -> torch.Tensor:
        """The pipeline gives what the VAE decodes."""
        return self.model_latents(vae, latents)

    def default_recipe(self, config: Mapping[str, Any]) -> str:
        """Assume the few-step model: klein-base's transformer does not differ from it."""
        return "flux2_klein"

    def pipeline_recipe(self, config: Mapping[str, Any]) -> str | None:
        distilled = config.get("is_distilled")
        return None if distilled is None else "flux2_klein" if distilled else "flux2_klein_base"
