"""Bria FIBO: FLUX's blocks, in each of which half of the text's channels are those of a layer of its encoder.

Sources, read in November 2026: diffusers 0.42's BriaFiboTransformer2DModel, BriaFiboPipeline and BriaFiboEditPipeline; the
code of github.com/Bria-AI/FIBO, with that of its fine-tuning; its report, arXiv 2511.06876; the configs of copies of
briaai/Fibo-Edit, for the numbers of blocks, 8 and 38, and the scheduler's, which are FLUX.1-dev's; that of Wan 2.2's
VAE. It is a flow model. The fine-tuning draws nine tenths of the times logit-normally, moved by the scheduler's formula of
the image's size, the others uniformly: a student learns as that does. How many images had the empty prompt is not
published (the fine-tuning gives it to none by default, and speaks of a tenth): a tenth has it here. The code samples 50
steps at a guidance of 5.

Prompts are JSON of a thousand words (FIBO "will not work" with others, as diffusers' page says). Fibo-lite, a distilled one,
has the same shape: it samples 8 steps without guidance. Nothing in it tells that: choose its recipe by name.

The encoder, SmolLM3-3B, has 37 hidden states and the model 46 blocks: block i reads state i, and those behind it the last.
The last two are its context. Padded text is hidden by a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLWan,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.models.transformers.transformer_bria import BriaAttnProcessor
from diffusers.models.transformers.transformer_bria_fibo import BriaFiboAttnProcessor
from torch import nn

from ..attention import TokenLayout
from .family import Processors, Published
from .film_vae import FilmVAE
from .flux import Flux, HidesText, HybridFluxAttnProcessor, position_ids
from .hybrid_model import hybrid_class
from .recipe import Recipe, sampled_few_steps, shifted_logit_normal
from .wrapping import with_method


class DenseBriaFiboAttnProcessor(HidesText, BriaFiboAttnProcessor):
    """BriaFiboAttnProcessor, of double blocks, for layers that stay dense."""


class DenseBriaAttnProcessor(HidesText, BriaAttnProcessor):
    """BriaAttnProcessor, of single blocks, for layers that stay dense."""


def mostly_logit_normal(count: int, tokens: int, scheduler: Any, generator: torch.Generator) -> torch.Tensor:
    """`shifted_logit_normal` times, and a tenth uniform ones."""
    times = shifted_logit_normal(count, tokens, scheduler, generator)
    uniform = torch.rand(count, generator=generator) < 0.1
    return torch.where(uniform, 1 - torch.rand(count, generator=generator), times)


HybridBriaFiboTransformer2DModel = hybrid_class(BriaFiboTransformer2DModel)
TEXT = ("prompt_embeds", "prompt_layers", "prompt_embeds_mask")  # what prompts are encoded to
SMOLLM3_3B = 3_075_098_624
SHAPE = {"in_channels": 48, "num_layers": 8, "num_single_layers": 38}  # the rest as diffusers' class has it
WAN_2_2 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "in_channels": 12,
    "out_channels": 12,
    "is_residual": True,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}


class BriaFibo(FilmVAE, Flux):
    """FIBO and Fibo-lite, and the transformers of Fibo-Edit, whose pipeline is not distilled for."""

    name = "FIBO"
    dense_class = BriaFiboTransformer2DModel
    hybrid_class = HybridBriaFiboTransformer2DModel
    processors = (
        Processors(BriaFiboAttnProcessor, HybridFluxAttnProcessor, DenseBriaFiboAttnProcessor),
        Processors(BriaAttnProcessor, HybridFluxAttnProcessor, DenseBriaAttnProcessor),
    )
    image_arguments = ("hidden_states", "img_ids")
    pipelines = {"text-to-image": BriaFiboPipeline}
    text_encoders = ("text_encoder",)
    longest_text = 3000
    vae_class = AutoencoderKLWan
    scheduler = FlowMatchEulerDiscreteScheduler
    guided = True
    recipes = {
        "fibo": Recipe(mostly_logit_normal, 1.0, 0.5, 0.5, 0.1),
        "fibo_lite": Recipe(sampled_few_steps, 0.0, 1.0, 0.5, 0.0, few_steps=True),
    }
    published = {"briaai/FIBO": Published(SHAPE, vae_scale_factor=16, shape="fibo", text_parameters=SMOLLM3_3B)}

    def check_config(self, config: Mapping[str, Any]) -> None:
        if config.get("guidance_embeds"):
            raise ValueError("guidance_embeds: diffusers' pipelines give FIBO no guidance to embed; none is published")

    def exact_inputs(self, inputs: dict[str, Any], token_layout: TokenLayout) -> dict[str, Any]:
        """With the text's part of the attention kwargs' mask, which the pipelines give as bool [B, 1, 1, text and image].

        Raises ValueError for another one.
        """
        inputs = super().exact_inputs(inputs, token_layout)
        kwargs = dict(inputs.get("joint_attention_kwargs") or {})
        mask = kwargs.pop("attention_mask", None)
        if mask is None:
            return inputs
        shape = len(inputs["hidden_states"]), 1, 1, token_layout.text_length + token_layout.image_length
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"attention_mask hides keys, as diffusers' pipelines have it: bool {shape}, not {mask.dtype} "
                f"{tuple(mask.shape)}"
            )
        kwargs["text_mask"] = mask[:, 0, 0, : token_layout.text_length]
        return {**inputs, "joint_attention_kwargs": kwargs}

    def latents_per_token(self, config: Mapping[str, Any]) -> int:
        return 1

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.flatten(2).transpose(1, 2)

    def unpack(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return latents.transpose(1, 2).unflatten(2, grid)

    def published_vae(self, channels: int) -> nn.Module:
        return AutoencoderKLWan(**WAN_2_2, z_dim=channels)

    def encode_prompts(self, pipeline: Any, prompts: list[str], **length: int) -> dict[str, torch.Tensor]:
        """All prompts are padded to one length; a row has a state of the encoder for each block, [text, blocks, width].

        One by one: diffusers would fill an empty prompt up with words to the length of others.
        """
        tokens, config = self.text_length(**length), pipeline.transformer.config
        blocks = config["num_layers"] + config["num_single_layers"]
        rows = []
        for prompt in prompts:
            embeds, _, _, _, _, layers, _ = pipeline.encode_prompt(
                [prompt], guidance_scale=1.0, max_sequence_length=tokens
            )
            layers = [*layers[-blocks:], *layers[-1:] * (blocks - len(layers))]
            padding = tokens - embeds.shape[1]
            mask = embeds.new_ones(embeds.shape[:2], dtype=torch.bool)
            rows.append(
                (
                    F.pad(embeds, (0, 0, 0, padding)),
                    F.pad(torch.stack(layers, 2), (0, 0, 0, 0, 0, padding)),
                    F.pad(mask, (0, padding)),
                )
            )
        return dict(zip(TEXT, map(torch.cat, zip(*rows, strict=True)), strict=True))

    def example_text(
        self, config: Mapping[str, Any], count: int, length: int, make: Callable[..., torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        embeds = make(count, length, config["joint_attention_dim"])
        blocks = config["num_layers"] + config["num_single_layers"]
        return {
            "prompt_embeds": embeds,
            "prompt_layers": make(count, length, blocks, config["text_encoder_dim"]),
            "prompt_embeds_mask": embeds.new_ones(count, length, dtype=torch.bool),
        }

    def sampler(self, pipeline: Any) -> Callable[..., Any]:
        """The pipeline takes no encoded prompts: it gets them where it would encode some."""

        def sample(**arguments: Any) -> Any:
            embeds, layers, mask = (arguments.pop(name) for name in TEXT)
            others = [arguments.pop(f"negative_{name}") for name in TEXT]
            ids = embeds.new_zeros(embeds.shape[1], 3)
            encoded = (embeds, others[0], ids, mask, others[2], list(layers.unbind(2)), list(others[1].unbind(2)))
            with with_method(pipeline, "encode_prompt", lambda **prompts: encoded):
                return pipeline(prompt=[""] * len(embeds), **arguments)

        return sample

    def sampling_from(self, scheduler: Any, sigmas: Sequence[float]) -> tuple[Any, dict[str, Any]]:
        """The pipeline's call takes no sigmas, but times, of which the scheduler would say that they may not fit."""
        scheduler, _ = super().sampling_from(scheduler, sigmas)
        most, set_timesteps = scheduler.config.num_train_timesteps, scheduler.set_timesteps
        scheduler.set_timesteps = lambda timesteps, device=None, mu=None: set_timesteps(
            sigmas=[time / most for time in timesteps], device=device
        )
        return scheduler, {"timesteps": [most * sigma for sigma in sigmas], "num_inference_steps": len(sigmas)}

    def default_recipe(self, config: Mapping[str, Any]) -> str:
        """Assume FIBO, whose transformer Fibo-lite's does not differ from; choose its recipe, "fibo_lite", by name."""
        return "fibo"

    def model_inputs(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        grid: tuple[int, int],
        guidance: float | None,
    ) -> dict[str, Any]:
        seen = text["prompt_embeds_mask"].bool()
        mask = torch.cat((seen, seen.new_ones(noisy.shape[:2])), 1)[:, None, None]
        return {
            "hidden_states": noisy,
            "encoder_hidden_states": text["prompt_embeds"],
            "text_encoder_layers": list(text["prompt_layers"].unbind(2)),
            "timestep": times * 1000,
            "joint_attention_kwargs": {"attention_mask": mask},
            **position_ids(noisy, seen.shape[1], grid),
        }

    def latents_and_times(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        latents, timestep = super().latents_and_times(inputs)
        return latents, timestep / 1000
