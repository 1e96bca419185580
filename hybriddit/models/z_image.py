"""Z-Image and Z-Image-Turbo: one stream of image and then caption, each filled up with tokens of its own to 32s.

Sources, read in November 2026: diffusers 0.42's ZImageTransformer2DModel and ZImagePipeline; the cards and configs of
Tongyi-MAI/Z-Image and Z-Image-Turbo; their report, arXiv 2511.22699. Both are flow models of one shape. diffusers' class
takes 1 - t and gives the negative of the velocity, for lists of latents and captions. The report trains at logit-normal
times that move with the image's size, and does not say by how much; both schedulers move them by a shift that no size
changes: 6 (Z-Image) and 3 (Turbo), at which a student learns. The card of Z-Image samples it with 28 to 50 steps and a
guidance of 3 to 5, which diffusers' pipeline counts from 0: its 4 is 5 elsewhere. Turbo is distilled to 8 steps without
guidance; how its teacher's times were drawn is not published. A student of Turbo learns at the steps of 1 to 8.

The tokens that fill up the image's (none where their number is a multiple of 32) see and are seen by all, as text is, so
to hybrid attention they are the first of the text. The first blocks (`noise_refiner`) see image alone, and are converted
as those of the stream are; those of the caption alone (`context_refiner`) do not grow with the image, and stay dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZSingleStreamAttnProcessor
from torch import nn

from ..attention import TokenLayout
from .family import Family, Processors, Published
from .flux2 import QWEN3_4B
from .hybrid_model import hybrid_class
from .positions import rotary_tables
from .processing import LayoutHolder, check_call, far_inputs, norm, project
from .recipe import Recipe, sampled_few_steps, sampled_logit_normal

PATCH = 2  # of forward and of the pipelines, whatever other sizes a model has weights for


def rotated(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [B, S, heads, D] with each pair of their channels turned by the table, complex [B, S, D / 2]."""
    pairs = torch.view_as_complex(tokens.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, :, None]).flatten(3).type_as(tokens)


class HybridZSingleStreamAttnProcessor:
    """ZSingleStreamAttnProcessor with hybrid attention in place of softmax over all tokens."""

    layout_holder: LayoutHolder

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        token_layout = self.layout_holder.token_layout
        check_call(token_layout)
        # what is not image here: the tokens that fill it up, and in the stream the caption
        image_length = token_layout.image_length
        token_layout = token_layout._replace(text_length=hidden_states.shape[1] - image_length)

        query, key, value = (
            project(attn, name, hidden_states).unflatten(-1, (attn.heads, -1))  # [B, S, heads, D]
            for name in ("to_q", "to_k", "to_v")
        )
        rotate = None if freqs_cis is None else partial(rotated, freqs_cis)
        rotate_image = None if freqs_cis is None else partial(rotated, freqs_cis[:, :image_length])
        of_image = (token_layout.split(tokens)[1] for tokens in (hidden_states, query, key))
        far = far_inputs(attn, *of_image, rotate=rotate_image)

        query, key = norm(attn.norm_q, query), norm(attn.norm_k, key)
        if rotate is not None:
            query, key = rotate(query), rotate(key)
        text_mask = None if attention_mask is None else attention_mask[:, image_length:]
        out = attn.hybrid(query, key, value, token_layout, text_mask=text_mask, **far).flatten(2).to(query.dtype)
        return attn.to_out[1](project(attn, "to_out.0", out))


def _filled(length: int) -> int:
    """The number of tokens that diffusers makes of so many."""
    return length + -length % SEQ_MULTI_OF


HybridZImageTransformer2DModel = hybrid_class(ZImageTransformer2DModel)
SHAPE = {"axes_lens": [1536, 512, 512]}  # the rest as diffusers' class has it


class ZImage(Family):
    """Z-Image, and Z-Image-Turbo, whose transformer does not differ from it."""

    name = "Z-Image"
    dense_class = ZImageTransformer2DModel
    hybrid_class = HybridZImageTransformer2DModel
    layers = ("noise_refiner.*.attention", "layers.*.attention")
    processors = (Processors(ZSingleStreamAttnProcessor, HybridZSingleStreamAttnProcessor),)
    attention_kwargs = None  # diffusers' joint_attention_kwargs are for LoRA's scale alone
    joint = True
    rotary = True
    image_lists = ("x", "cap_feats")
    block_arguments = ("n_layers",)
    positions = ("plain", "interpolated", "ntk", "yarn", "dominant")
    pipelines = {
        "text-to-image": ZImagePipeline,
        "image-to-image": ZImageImg2ImgPipeline,
        "inpainting": ZImageInpaintPipeline,
    }
    scheduler = FlowMatchEulerDiscreteScheduler
    guides_above = 0.0
    usual_side = 1024
    recipes = {
        "z_image": Recipe(sampled_logit_normal, 1.0, 0.5, 0.5, 0.1),
        "z_image_turbo": Recipe(sampled_few_steps, 0.0, 1.0, 0.5, 0.0, few_steps=True),
    }
    published = {
        "Tongyi-MAI/Z-Image": Published(SHAPE, "z-image", text_parameters=QWEN3_4B),
        "Tongyi-MAI/Z-Image-Turbo": Published(SHAPE, text_parameters=QWEN3_4B),
    }

    def check_config(self, config: Mapping[str, Any]) -> None:
        if config.get("siglip_feat_dim") is not None:
            raise ValueError(
                "siglip_feat_dim: a Z-Image that reads images (omni) is not served, only those that read text alone"
            )
        if PATCH not in config["all_patch_size"] or 1 not in config["all_f_patch_size"]:
            raise ValueError(
                f"all_patch_size {list(config['all_patch_size'])}, all_f_patch_size {list(config['all_f_patch_size'])}: "
                f"diffusers' pipelines run Z-Image with patches of {PATCH} and 1, which this model has no weights for"
            )

    def check_shared(self, config: Mapping[str, Any]) -> None:
        raise ValueError(
            "images of Z-Image are not spread over processes: its model joins image and text of each sample by itself"
        )

    def layer_layout(self, model: nn.Module, layer: str, token_layout: TokenLayout) -> TokenLayout:
        if layer.startswith("noise_refiner."):  # the image, filled up
            return token_layout._replace(text_length=-token_layout.image_length % SEQ_MULTI_OF)
        return token_layout

    def token_layout(self, model: nn.Module, inputs: Mapping[str, Any]) -> TokenLayout:
        """Image first; the tokens that fill it up count as text, and captions as the longest, filled up.

        Raises ValueError for calls with several images a sample (omni), images of several sizes or frames, and captions
        that are longer than the model's table of positions.
        """
        images, patch = inputs["x"], inputs.get("patch_size", PATCH)
        if isinstance(images[0], list):
            raise ValueError(
                "hybrid Z-Image makes one image a sample of text alone: for omni calls, restore_dense(model)"
            )
        sizes = sorted({tuple(image.shape[1:]) for image in images})  # (frames, height, width)
        if len(sizes) > 1 or sizes[0][0] != 1:
            raise ValueError(f"hybrid Z-Image takes images of one frame and one size in a call, not {sizes}")
        rows, columns = (side // patch for side in sizes[0][1:])
        caption, most = _filled(max(map(len, inputs["cap_feats"]))), model.config.axes_lens[0]
        if caption + 1 >= most:
            raise ValueError(f"captions of {caption} tokens are too long: this model has positions for {most - 2}")
        return TokenLayout(-rows * columns % SEQ_MULTI_OF + caption, ((rows, columns),), text_first=False)

    def strip(self, arguments: Mapping[str, Any], token_layout: TokenLayout, rows: tuple[int, int]) -> dict[str, Any]:
        image, columns = token_layout.image_length, token_layout.grids[0][1]

        def cut(tokens: torch.Tensor) -> torch.Tensor:  # [B, S, …]
            return torch.cat((tokens[:, rows[0] * columns : rows[1] * columns], tokens[:, image:]), 1)

        names = [name for name in ("x", "attn_mask", "freqs_cis") if arguments.get(name) is not None]
        return {**arguments, **{name: cut(arguments[name]) for name in names}}

    def position_forwards(
        self, model: nn.Module, positions: str, native: tuple[int, int], grid: tuple[int, int]
    ) -> dict[nn.Module, Callable[..., Any]]:
        """What gives the positions is no module: the model's own forward puts another in its place."""
        own, forward = model.rope_embedder, model.forward

        def table(ids: torch.Tensor) -> torch.Tensor:
            tables = rotary_tables(ids, own.axes_dims, own.theta, positions, native, grid)
            return torch.complex(*(part[:, ::2].contiguous() for part in tables))

        def scaled(*args: Any, **kwargs: Any) -> Any:
            model.rope_embedder = table
            try:
                return forward(*args, **kwargs)
            finally:
                model.rope_embedder = own

        return {model: scaled}

    def check_grid(self, config: Mapping[str, Any], grid: tuple[int, int]) -> None:
        most = config["axes_lens"][1:]
        if any(side > length for side, length in zip(grid, most, strict=True)):
            raise ValueError(
                f"an image of {grid[0]} x {grid[1]} tokens is too large: this model has positions for {most[0]} x {most[1]}"
            )

    def latents_per_token(self, config: Mapping[str, Any]) -> int:
        return PATCH

    def text_length(self, max_sequence_length: int | None = None, tokenizer_length: int = 77) -> int:
        """The most: captions are as long as they are, filled up."""
        return _filled(super().text_length(max_sequence_length))

    def encode_prompts(self, pipeline: Any, prompts: list[str], **length: int) -> dict[str, torch.Tensor]:
        """All captions are padded to one length, for a cache; the model gets none of that."""
        # a copy: the pipeline writes its template into the list
        embeds, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, **length)
        tokens = self.text_length(**length)
        lengths = torch.tensor([len(caption) for caption in embeds], device=embeds[0].device)
        return {
            "prompt_embeds": torch.stack([F.pad(caption, (0, 0, 0, tokens - len(caption))) for caption in embeds]),
            "prompt_embeds_mask": torch.arange(tokens, device=lengths.device) < lengths[:, None],
        }

    def example_text(
        self, config: Mapping[str, Any], count: int, length: int, make: Callable[..., torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        embeds = make(count, length, config["cap_feat_dim"])
        # in memory, whatever `make` does: the prompts' lengths are read from it
        mask = torch.ones(count, length, dtype=torch.bool, device="cpu")
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}

    def sampling_arguments(
        self, text: Mapping[str, torch.Tensor], empty: Mapping[str, torch.Tensor], count: int
    ) -> dict[str, Any]:
        return {"prompt_embeds": _captions(text), "negative_prompt_embeds": _captions(empty) * count}

    def default_recipe(self, config: Mapping[str, Any]) -> str:
        """Assume Turbo, whose transformer Z-Image's does not differ from; choose its recipe, "z_image", by name."""
        return "z_image_turbo"

    def model_inputs(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        grid: tuple[int, int],
        guidance: float | None,
    ) -> dict[str, Any]:
        return {"x": list(noisy[:, :, None]), "t": 1 - times, "cap_feats": _captions(text)}

    def latents_and_times(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack(list(inputs["x"]))[:, :, 0], 1 - inputs["t"]

    def prediction(self, output: list[torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
        return -torch.stack(list(output))[:, :, 0]


def _captions(text: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The prompts' tensors, [tokens, width] each, of as many tokens as they have."""
    lengths = text["prompt_embeds_mask"].sum(1).tolist()
    return [caption[:length] for caption, length in zip(text["prompt_embeds"], lengths, strict=True)]
