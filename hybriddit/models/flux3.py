"""FLUX.3 klein: blocks of text, image and reference images each alone, then blocks of all three in one sequence.

Sources, read in November 2026: diffusers 0.42's Flux3Transformer2DModel and modular_pipelines/flux3; the README of
github.com/black-forest-labs/flux-3-image-klein. It is a flow model. Base takes 50 steps and a guidance of 4; the
distilled model is a flow map of 16 steps without guidance, whose transformer is also told the time that a step leads
to. The README gives 5.6 billion parameters; the defaults of diffusers' class, taken for the published sizes here,
make 5.54.

diffusers has no pipeline for it, only blocks of its modular kind, which take one prompt a call: the text is as long
as the prompt, in 80s, and what fills it up is seen by all, without a mask. So prompts of several lengths make no
batch, and the transformer is served alone: there is no recipe to distill it by.

The image's blocks and those of the reference images are converted as those of the sequence are; the text's stay
dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux3Transformer2DModel
from diffusers.models.transformers.transformer_flux3 import Flux3AttnProcessor
from torch import nn

from ..attention import TokenLayout
from .family import Processors, Published
from .flux import Flux, rotations
from .flux2 import ids_along
from .hybrid_model import hybrid_class
from .processing import LayoutHolder, check_call, far_inputs, project

TEXT = 640  # tokens of a prompt in the benchmark: there is no usual length
ROTARY_SCALE = 0.5  # of rows and columns, as the pipelines have it


class HybridFlux3AttnProcessor:
    """Flux3AttnProcessor with hybrid attention in place of softmax over all tokens."""

    layout_holder: LayoutHolder

    @staticmethod
    def own_layout(token_layout: TokenLayout) -> TokenLayout:
        """What of the model's layout reaches the layer."""
        return token_layout

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        check_call(self.layout_holder.token_layout, attention_mask)
        token_layout = self.own_layout(self.layout_holder.token_layout)
        query, key, value = (
            project(attn, name, hidden_states).unflatten(-1, (attn.heads, -1))  # [B, S, heads, D]
            for name in ("to_q", "to_k", "to_v")
        )
        # the model's norms stay in float32, and so do queries and keys until they are rotated
        norms = [lambda heads, norm=norm: norm(heads.float()).to(value.dtype) for norm in (attn.norm_q, attn.norm_k)]
        rotate, rotate_image = rotations(image_rotary_emb, token_layout)
        of_image = (token_layout.split(tokens)[1] for tokens in (hidden_states, query, key))
        far = far_inputs(attn, *of_image, norms=norms, rotate=rotate_image)

        query, key = attn.norm_q(query.float()), attn.norm_k(key.float())
        if rotate is not None:
            query, key = rotate(query), rotate(key)
        query, key = query.to(value.dtype), key.to(value.dtype)
        out = attn.hybrid(query, key, value, token_layout, **far).flatten(2).to(query.dtype)
        return attn.to_out[1](project(attn, "to_out.0", out))


class HybridFlux3ImageAttnProcessor(HybridFlux3AttnProcessor):
    """The same for the image alone."""

    @staticmethod
    def own_layout(token_layout: TokenLayout) -> TokenLayout:
        return token_layout._replace(text_length=0, grids=token_layout.grids[:1])


class HybridFlux3ReferenceAttnProcessor(HybridFlux3AttnProcessor):
    """The same for the reference images alone."""

    @staticmethod
    def own_layout(token_layout: TokenLayout) -> TokenLayout:
        return token_layout._replace(text_length=0, grids=token_layout.grids[1:])


HybridFlux3Transformer2DModel = hybrid_class(Flux3Transformer2DModel)


class Flux3(Flux):
    """FLUX.3 klein, base and distilled."""

    name = "FLUX.3 klein"
    dense_class = Flux3Transformer2DModel
    hybrid_class = HybridFlux3Transformer2DModel
    layers = ("mode_blocks.image.*.attn", "mode_blocks.image_cond.*.attn", "single_transformer_blocks.*.attn")
    processors = (
        Processors(Flux3AttnProcessor, HybridFlux3ImageAttnProcessor, layers="mode_blocks.image.*"),
        Processors(Flux3AttnProcessor, HybridFlux3ReferenceAttnProcessor, layers="mode_blocks.image_cond.*"),
        Processors(Flux3AttnProcessor, HybridFlux3AttnProcessor),
    )
    id_columns = (3, 1)
    attention_kwargs = None  # diffusers' are for LoRA's scale alone
    positions = ("plain",)
    image_arguments = ("hidden_states", "img_ids")
    pipelines = {}
    longest_text = None
    scheduler = FlowMatchEulerDiscreteScheduler
    guided = True
    guided_together = False
    recipes = {}
    published = {
        # the defaults of diffusers' class
        "black-forest-labs/flux-3-image-klein-base": Published(shape="flux3"),
        "black-forest-labs/flux-3-image-klein": Published({"flow_map": True}),
    }

    def token_layout(self, model: nn.Module, inputs: Mapping[str, Any]) -> TokenLayout:
        """Text, the image, and after it the reference images: places in `img_ids` and `image_cond_ids` are (time, row,
        column, number), the number being 0 for the image, and another for each reference image.

        Raises ValueError where they are not those of whole grids, and of one image.
        """
        grids = self.grids("img_ids", inputs["img_ids"], inputs["hidden_states"].shape[1])
        if len(grids) > 1:
            raise ValueError(f"img_ids are of one image, not of {len(grids)}: others are image_cond_hidden_states")
        references, ids = (inputs.get(f"image_cond_{name}") for name in ("hidden_states", "ids"))
        if references is not None and ids is not None:  # the model itself refuses one without the other
            grids += self.grids("image_cond_ids", ids, references.shape[1])
        return TokenLayout(inputs["encoder_hidden_states"].shape[1], grids, text_first=True)

    def layer_layout(self, model: nn.Module, layer: str, token_layout: TokenLayout) -> TokenLayout:
        return self.kind_of(layer, Flux3AttnProcessor).hybrid.own_layout(token_layout)

    def strip(self, arguments: Mapping[str, Any], token_layout: TokenLayout, rows: tuple[int, int]) -> dict[str, Any]:
        if "encoder_hidden_states" not in arguments:
            token_layout = HybridFlux3ImageAttnProcessor.own_layout(token_layout)
        columns = token_layout.grids[0][1]
        modulation = arguments["temb_mod"][:, rows[0] * columns : rows[1] * columns]
        return {**super().strip(arguments, token_layout, rows), "temb_mod": modulation}

    def text_length(self, max_sequence_length: int | None = None, tokenizer_length: int = 77) -> int:
        return TEXT if max_sequence_length is None else max_sequence_length

    def encode_prompts(self, pipeline: Any, prompts: list[str], **length: int) -> dict[str, torch.Tensor]:
        raise ValueError(f"{self.name} reads one prompt at a time, by its modular pipeline alone")

    def example_text(
        self, config: Mapping[str, Any], count: int, length: int, make: Callable[..., torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": make(count, length, config["joint_attention_dim"])}

    def model_inputs(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        grid: tuple[int, int],
        guidance: float | None,
    ) -> dict[str, Any]:
        """Of base: a flow map takes `target_timestep` besides."""
        embeds = text["prompt_embeds"]
        scale = torch.tensor((1.0, ROTARY_SCALE, ROTARY_SCALE, 1.0), device=noisy.device)
        return {
            "hidden_states": noisy,
            "encoder_hidden_states": embeds,
            "timestep": times,
            "img_ids": ids_along(1, *grid, 1, device=noisy.device) * scale,
            "txt_ids": ids_along(1, 1, 1, embeds.shape[1], device=noisy.device).float(),
        }
