"""FLUX.1: text first; double blocks with separate projections for text, single blocks over one joined sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..attention import TokenLayout
from .family import T5_XXL, Family, Processors, Published
from .hybrid_model import hybrid_class
from .positions import rotary_tables
from .processing import check_call, far_inputs, project
from .recipe import Recipe, few_steps, shifted_logit_normal

Rotate = Callable[[torch.Tensor], torch.Tensor]


def rotations(
    tables: tuple[torch.Tensor, torch.Tensor] | None, token_layout: TokenLayout
) -> tuple[Rotate, Rotate] | tuple[None, None]:
    """What rotates all tokens, and the image's, [B, tokens, heads, D], by (cos, sin), [S, D] each; None without tables."""
    if tables is None:
        return None, None
    of_image = [token_layout.split(table[None])[1][0] for table in tables]  # [N, D] each
    return tuple(partial(apply_rotary_emb, freqs_cis=chosen, sequence_dim=1) for chosen in (tables, of_image))


def shown(
    attention_mask: torch.Tensor | None, text_mask: torch.Tensor | None, token_layout: TokenLayout | None
) -> torch.Tensor | None:
    """The mask of keys, [B, 1, 1, S], that a dense processor needs for a text's mask; attention_mask without one."""
    if text_mask is None:
        return attention_mask
    image_mask = text_mask.new_ones(len(text_mask), token_layout.image_length)
    return token_layout.join(text_mask, image_mask)[:, None, None]


class HybridFluxAttnProcessor:
    """FluxAttnProcessor with hybrid attention in place of softmax over all tokens."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        token_layout: TokenLayout | None = None,
        text_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        check_call(token_layout, attention_mask)

        def heads(name, tokens):
            return project(attn, name, tokens).unflatten(-1, (attn.heads, -1))  # [B, S, heads, D]

        query, key, value = (heads(name, hidden_states) for name in ("to_q", "to_k", "to_v"))
        image = (hidden_states, query, key)
        if encoder_hidden_states is None:  # a single block, where text and image are already one sequence
            image = (token_layout.split(tokens)[1] for tokens in image)
        rotate, rotate_image = rotations(image_rotary_emb, token_layout)
        far = far_inputs(attn, *image, rotate=rotate_image)

        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            text_query, text_key, text_value = (
                heads(name, encoder_hidden_states) for name in ("add_q_proj", "add_k_proj", "add_v_proj")
            )
            query = token_layout.join(attn.norm_added_q(text_query), query)
            key = token_layout.join(attn.norm_added_k(text_key), key)
            value = token_layout.join(text_value, value)
        if rotate is not None:
            query, key = rotate(query), rotate(key)

        out = attn.hybrid(query, key, value, token_layout, text_mask=text_mask, **far).flatten(2).to(query.dtype)
        if encoder_hidden_states is None:
            return out
        text, image = token_layout.split(out)
        return attn.to_out[1](project(attn, "to_out.0", image)), project(attn, "to_add_out", text)


class HidesText:
    """What makes a processor of FLUX's kind one for layers that stay dense: it needs the layout only to hide padded text."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        token_layout: TokenLayout | None = None,
        text_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        attention_mask = shown(attention_mask, text_mask, token_layout)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


class DenseFluxAttnProcessor(HidesText, FluxAttnProcessor):
    """FluxAttnProcessor for layers that stay dense."""


Grids = tuple[tuple[int, int], ...]  # (height, width) in tokens


def _grids(ids: torch.Tensor, tokens: int, columns: tuple[int, int], from_zero: bool) -> Grids | None:
    """The image grids that the first `tokens` of ids [N, …] describe, see `Flux.grids`; None where they do not."""
    index, row = ids.reshape(-1, ids.shape[-1])[:tokens, list(columns)].cpu().unbind(1)
    rows = [row[index == i] for i in index.unique_consecutive().tolist()]  # of each image
    widths = [int((own == (0 if from_zero else own[0])).sum()) for own in rows]
    grids = tuple((len(own) // max(width, 1), width) for own, width in zip(rows, widths, strict=True))
    return grids if sum(height * width for height, width in grids) == tokens else None


def position_ids(like: torch.Tensor, text_length: int, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The ids of one image's tokens and of its text, as FLUX's pipelines pass them, in the dtype of a tensor."""
    rows, columns = torch.meshgrid(*(torch.arange(n, device=like.device) for n in grid), indexing="ij")
    return {
        "img_ids": torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).view(-1, 3).to(like),
        "txt_ids": like.new_zeros(text_length, 3),
    }


class PackedLatents(Family):
    """A family whose pipelines pack 2 x 2 latents to a token; the transformer's patch is one packed latent."""

    def latents_per_token(self, config: Mapping[str, Any]) -> int:
        return 2

    def latents_shape(self, config: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, ...]:
        return (grid[0] * grid[1], config["in_channels"])

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        return FluxPipeline._pack_latents(latents, *latents.shape)

    def unpack(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        latents = latents.unflatten(2, (-1, 2, 2)).unflatten(1, grid)  # [B, h / 2, w / 2, C, 2, 2]
        return latents.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


HybridFluxTransformer2DModel = hybrid_class(FluxTransformer2DModel)
TEXT = T5_XXL + 123_060_480  # with CLIP's L


class Flux(PackedLatents):
    """FLUX.1: dev, whose guidance scale is an input, and schnell, made for 1 to 4 steps.

    position_embedding: the model's name for what makes its rotary tables of ids. id_columns: where the ids of image tokens
    have the image's index, and the row. rows_from_zero: whether these count an image's rows from 0 on.
    """

    name = "FLUX"
    dense_class = FluxTransformer2DModel
    hybrid_class = HybridFluxTransformer2DModel
    layers = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")
    processors = (Processors(FluxAttnProcessor, HybridFluxAttnProcessor, DenseFluxAttnProcessor),)
    attention_kwargs = "joint_attention_kwargs"
    joint = True
    text_first = True
    rotary = True
    reads_positions = True
    image_exit = "proj_out"
    positions = ("plain", "interpolated", "ntk", "yarn", "dominant", "clear")
    image_arguments = ("hidden_states", "img_ids", "controlnet_block_samples", "controlnet_single_block_samples")
    pipelines = {
        "text-to-image": FluxPipeline,
        "image-to-image": FluxImg2ImgPipeline,
        "inpainting": FluxInpaintPipeline,
    }
    text_encoders = ("text_encoder", "text_encoder_2")
    longest_text = 512
    scheduler = FlowMatchEulerDiscreteScheduler
    guided = False  # the guidance scale is distilled into the model
    recipes = {
        "flux_dev": Recipe(shifted_logit_normal, 1.0, 0.5, 0.5, 0.0, task_needs_teacher_images=True),
        "flux_schnell": Recipe(few_steps, 0.0, 1.0, 0.5, 0.0, few_steps=True),
    }
    published = {
        "black-forest-labs/FLUX.1-dev": Published({"guidance_embeds": True}, "flux", text_parameters=TEXT),
        "black-forest-labs/FLUX.1-schnell": Published({"guidance_embeds": False}, text_parameters=TEXT),
    }

    position_embedding: ClassVar[str] = "pos_embed"
    id_columns: ClassVar[tuple[int, int]] = (0, 1)
    rows_from_zero: ClassVar[bool] = True

    def __init__(self):
        # what ids have been found to hold, with their version: on a GPU every reading waits for all work before it
        self._grids_of: MutableMapping[torch.Tensor, tuple[int, tuple[int, int], Grids | None]]
        self._grids_of = WeakTensorKeyDictionary()

    def token_layout(self, model: FluxTransformer2DModel, inputs: Mapping[str, Any]) -> TokenLayout:
        """Text length and image grids of one call. Raises ValueError as `grids` does."""
        grids = self.grids("img_ids", inputs["img_ids"], inputs["hidden_states"].shape[1])
        return TokenLayout(inputs["encoder_hidden_states"].shape[1], grids, text_first=True)

    def grids(self, name: str, ids: torch.Tensor, tokens: int, first: int = 0) -> Grids:
        """The image grids that the ids of so many image tokens describe, from `first` on. name: of the argument.

        ids [N, 3] hold (image index, row, column): 0 for the image, more for reference images (Kontext); in FLUX.2
        a fourth number follows, and there may be ids for each image of the batch, of which the first's count. The width
        is the number of tokens in the first row: ids come in bf16, which cannot tell large rows or columns apart.
        Pipelines pass the same tensor at every step, and it is read once. Raises ValueError if the ids are not a sequence
        of whole grids.
        """
        place = first, tokens
        if ids.is_inference():  # a change in place would not show
            found = _grids(ids[first:], tokens, self.id_columns, self.rows_from_zero)
        else:
            version, known, found = self._grids_of.get(ids, (None, None, None))
            if (version, known) != (ids._version, place):
                found = _grids(ids[first:], tokens, self.id_columns, self.rows_from_zero)
                self._grids_of[ids] = ids._version, place, found
        if found is None:
            argument = self.attention_kwargs
            hint = f": pass {argument}={{'token_layout': TokenLayout(...)}}" if argument else ""
            raise ValueError(f"{name} do not describe whole image grids of {tokens} tokens together{hint}")
        return found

    def strip(self, arguments: Mapping[str, Any], token_layout: TokenLayout, rows: tuple[int, int]) -> dict[str, Any]:
        found, columns = super().strip(arguments, token_layout, rows), token_layout.grids[0][1]
        if arguments.get("image_rotary_emb") is None:
            return found
        text = token_layout.text_length
        place = slice(text + rows[0] * columns, text + rows[1] * columns)
        tables = tuple(torch.cat((table[:text], table[place])) for table in arguments["image_rotary_emb"])
        return {**found, "image_rotary_emb": tables}

    def position_forwards(
        self, model: nn.Module, positions: str, native: tuple[int, int], grid: tuple[int, int]
    ) -> dict[nn.Module, Callable[..., Any]]:
        own = model.get_submodule(self.position_embedding)
        return {own: lambda ids: rotary_tables(ids, own.axes_dim, own.theta, positions, native, grid)}

    def exact_inputs(self, inputs: dict[str, Any], token_layout: TokenLayout) -> dict[str, Any]:
        """With exact `img_ids` where their dtype does not tell all rows and columns apart: in bfloat16, beyond 256."""
        ids = inputs["img_ids"]
        if not ids.is_floating_point() or max(map(max, token_layout.grids)) <= 2 / torch.finfo(ids.dtype).eps:
            return inputs
        grids = [
            torch.cartesian_prod(*(torch.arange(n, device=ids.device) for n in (1, *grid)))
            for grid in token_layout.grids
        ]
        for index, grid in enumerate(grids):
            grid[:, 0] = index
        return {**inputs, "img_ids": torch.cat(grids).float(), "txt_ids": inputs["txt_ids"].float()}

    def encode_prompts(self, pipeline: Any, prompts: list[str], **length: int) -> dict[str, torch.Tensor]:
        embeds, pooled, _ = pipeline.encode_prompt(prompts, **length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def example_text(
        self, config: Mapping[str, Any], count: int, length: int, make: Callable[..., torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        embeds = make(count, length, config["joint_attention_dim"])
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": make(count, config["pooled_projection_dim"])}

    def default_recipe(self, config: Mapping[str, Any]) -> str:
        """Assume that a model without a guidance embedding is a few-step model; if not, choose "flux_dev" by name."""
        return "flux_dev" if config["guidance_embeds"] else "flux_schnell"

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
            "timestep": times,
            "guidance": None if guidance is None else torch.full_like(times, guidance),
            **position_ids(noisy, text["prompt_embeds"].shape[1], grid),
        }
