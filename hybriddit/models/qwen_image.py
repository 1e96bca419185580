"""Qwen-Image: joint blocks with text first, padded text hidden by a mask, positions counted from the image's middle.

Sources, read in November 2026: diffusers 0.42's QwenImageTransformer2DModel, QwenImagePipeline and
AutoencoderKLQwenImage; the scheduler's config and the example on the card of Qwen/Qwen-Image; its report, arXiv
2508.02324. It is a flow model, trained at logit-normal times. Its scheduler shifts times by the image's size: by exp(0.5)
at 256 tokens, exp(0.9) at 8192. The card samples it with 50 steps, a guidance of 4 and a space as the negative prompt,
which stands for the empty prompt here. The shift of the times that it was trained at is not published: a student learns
at the scheduler's. Few-step versions (Lightning) are LoRAs of others, with other schedulers: there is no recipe of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    apply_rotary_emb_qwen,
)
from torch import nn

from ..attention import TokenLayout
from .family import Processors, Published
from .film_vae import FilmVAE
from .flux import PackedLatents
from .hybrid_model import hybrid_class
from .processing import check_call, far_inputs, norm, project
from .recipe import Recipe, shifted_logit_normal

Rotations = tuple[torch.Tensor, torch.Tensor]  # of the image's tokens and of the text's, complex [tokens, D / 2] each


class HybridQwenAttnProcessor:
    """QwenDoubleStreamAttnProcessor2_0 with hybrid attention in place of softmax over all tokens."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotations | None = None,
        token_layout: TokenLayout | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check_call(token_layout, attention_mask)

        def heads(name, tokens):
            return project(attn, name, tokens).unflatten(-1, (attn.heads, -1))  # [B, S, heads, D]

        query, key, value = (heads(name, hidden_states) for name in ("to_q", "to_k", "to_v"))
        text_query, text_key, text_value = (
            heads(name, encoder_hidden_states) for name in ("add_q_proj", "add_k_proj", "add_v_proj")
        )
        rotate = rotate_text = None
        if image_rotary_emb is not None:
            rotate, rotate_text = (
                partial(apply_rotary_emb_qwen, freqs_cis=table, use_real=False) for table in image_rotary_emb
            )
        far = far_inputs(attn, hidden_states, query, key, rotate=rotate)

        query, key = norm(attn.norm_q, query), norm(attn.norm_k, key)
        text_query, text_key = norm(attn.norm_added_q, text_query), norm(attn.norm_added_k, text_key)
        if rotate is not None:
            query, key, text_query, text_key = (
                rotate(query),
                rotate(key),
                rotate_text(text_query),
                rotate_text(text_key),
            )
        joint = (token_layout.join(*parts) for parts in ((text_query, query), (text_key, key), (text_value, value)))
        out = attn.hybrid(*joint, token_layout, text_mask=encoder_hidden_states_mask, **far)
        text, image = token_layout.split(out.flatten(2).to(query.dtype))
        return attn.to_out[1](project(attn, "to_out.0", image)), project(attn, "to_add_out", text)


class DenseQwenAttnProcessor(QwenDoubleStreamAttnProcessor2_0):
    """The teacher's processor, for layers that stay dense: it does not heed `token_layout`.

    It names all arguments: diffusers drops those that a processor's signature does not.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotations | None = None,
        token_layout: TokenLayout | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
        )


def _shapes(inputs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """(frames, rows, columns) of each image of a call, the same for all of the batch."""
    shapes = inputs.get("img_shapes")
    if not shapes:
        raise ValueError("img_shapes is needed: for each image of the batch, [(1, rows, columns)] in tokens")
    if any(other != shapes[0] for other in shapes[1:]):
        raise ValueError(f"img_shapes differ within the batch, and diffusers rotates all by the first's: {shapes}")
    return list(shapes[0]) if isinstance(shapes[0], list) else [shapes[0]]


HybridQwenImageTransformer2DModel = hybrid_class(QwenImageTransformer2DModel)
QWEN2_5_VL_7B = 8_292_166_656


class QwenImage(FilmVAE, PackedLatents):
    """Qwen-Image, and the transformers of its edit and layered models, whose pipelines are not distilled for."""

    name = "Qwen-Image"
    dense_class = QwenImageTransformer2DModel
    hybrid_class = HybridQwenImageTransformer2DModel
    layers = ("transformer_blocks.*.attn",)
    processors = (Processors(QwenDoubleStreamAttnProcessor2_0, HybridQwenAttnProcessor, DenseQwenAttnProcessor),)
    attention_kwargs = "attention_kwargs"
    block_kwargs = "joint_attention_kwargs"
    joint = True
    text_first = True
    rotary = True
    image_entrance = "pos_embed"
    image_exit = "proj_out"
    positions = ("plain", "interpolated")
    image_arguments = ("hidden_states", "controlnet_block_samples")
    image_lists = ("img_shapes",)
    pipelines = {
        "text-to-image": QwenImagePipeline,
        "image-to-image": QwenImageImg2ImgPipeline,
        "inpainting": QwenImageInpaintPipeline,
    }
    longest_text = 1024
    scheduler = FlowMatchEulerDiscreteScheduler
    vae_class = AutoencoderKLQwenImage
    guidance_argument = "true_cfg_scale"
    empty_prompt = " "
    guided_together = False
    recipes = {"qwen_image": Recipe(shifted_logit_normal, 1.0, 0.5, 0.5, 0.1)}
    published = {
        # the defaults of diffusers' class
        "Qwen/Qwen-Image": Published(shape="qwen-image", text_parameters=QWEN2_5_VL_7B),
    }

    def check_config(self, config: Mapping[str, Any]) -> None:
        if config.get("guidance_embeds"):
            raise ValueError(
                "guidance_embeds: diffusers' class takes a guidance that it cannot embed; none is published"
            )

    def check_shared(self, config: Mapping[str, Any]) -> None:
        if config.get("zero_cond_t"):
            raise ValueError(
                "zero_cond_t: each token of this Qwen-Image has a time, which is not spread over processes"
            )

    def idle_projections(self, model: nn.Module, layer: str) -> tuple[str, ...]:
        """The text ends in the last block: its queries there are for nothing."""
        last = len(model.transformer_blocks) - 1
        return ("add_q_proj", "to_add_out") if layer.startswith(f"transformer_blocks.{last}.") else ()

    def layer_outputs(self, attn: nn.Module, output: torch.Tensor | tuple) -> tuple[torch.Tensor, ...]:
        return output[:1] if "to_add_out" in attn.hybrid.idle else output

    def token_layout(self, model: nn.Module, inputs: Mapping[str, Any]) -> TokenLayout:
        """Text length, and the grids of `img_shapes`: of the image, then of reference images (edit models).

        Raises ValueError for shapes that are not those of the tokens, or differ within the batch.
        """
        shapes, tokens = _shapes(inputs), inputs["hidden_states"].shape[1]
        grids = tuple((height, width) for _, height, width in shapes)
        layout = TokenLayout(inputs["encoder_hidden_states"].shape[1], grids, text_first=True)
        if layout.image_length != tokens or any(frames != 1 for frames, *_ in shapes):
            raise ValueError(f"img_shapes are of one frame each, and together of {tokens} tokens: not {shapes}")
        return layout

    def strip(self, arguments: Mapping[str, Any], token_layout: TokenLayout, rows: tuple[int, int]) -> dict[str, Any]:
        found, columns = super().strip(arguments, token_layout, rows), token_layout.grids[0][1]
        place = slice(rows[0] * columns, rows[1] * columns)
        if arguments.get("image_rotary_emb") is not None:
            image, text = arguments["image_rotary_emb"]
            found["image_rotary_emb"] = image[place], text
        if arguments.get("modulate_index") is not None:
            found["modulate_index"] = arguments["modulate_index"][:, place]
        return found

    def position_forwards(
        self, model: nn.Module, positions: str, native: tuple[int, int], grid: tuple[int, int]
    ) -> dict[nn.Module, Callable[..., Any]]:
        """Interpolated: the image's rows and columns are spread over the native ones, and the text is where it is there."""
        own = model.pos_embed
        if model.config.use_layer3d_rope:
            raise ValueError(f"a layered Qwen-Image has its own positions alone, not {positions!r}")

        def table(*axes: torch.Tensor) -> torch.Tensor:  # positions along each axis, [n] each
            angles = [
                torch.outer(place, own.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim))
                for place, dim in zip(axes, own.axes_dim, strict=True)
            ]
            return torch.polar(torch.ones(()).double(), torch.cat(angles, 1)).to(torch.complex64)

        def forward(img_shapes, device=None, max_txt_seq_len=None) -> Rotations:
            found = []
            for index, (_, *sides) in enumerate(_shapes({"img_shapes": img_shapes})):
                axes = [
                    (torch.arange(side, dtype=torch.float64) - (side - side // 2)) * min(1.0, known / side)
                    for side, known in zip(sides, native, strict=True)
                ]
                found.append(table(*torch.cartesian_prod(torch.tensor([index]).double(), *axes).unbind(1)))
            start = max(min(side, known) // 2 for side, known in zip(grid, native, strict=True))
            text = torch.arange(start, start + int(max_txt_seq_len), dtype=torch.float64)
            return torch.cat(found).to(device), table(text, text, text).to(device)

        return {own: forward}

    def make_tables(self, model: nn.Module) -> None:
        own = model.pos_embed
        if own.pos_freqs.is_meta:
            with torch.device("cpu"):
                model.pos_embed = type(own)(own.theta, own.axes_dim, own.scale_rope)

    def encode_prompts(self, pipeline: Any, prompts: list[str], **length: int) -> dict[str, torch.Tensor]:
        """All prompts are padded to one length, and so may be of one batch: the mask hides the rest.

        The empty prompt is a space, as on the model's card.
        """
        tokens = self.text_length(**length)
        embeds, mask = pipeline.encode_prompt(
            [prompt or self.empty_prompt for prompt in prompts], max_sequence_length=tokens
        )
        if mask is None:  # diffusers' way to say that nothing is padded
            mask = embeds.new_ones(embeds.shape[:2])
        padding = tokens - embeds.shape[1]
        return {
            "prompt_embeds": F.pad(embeds, (0, 0, 0, padding)),
            "prompt_embeds_mask": F.pad(mask.bool(), (0, padding)),
        }

    def example_text(
        self, config: Mapping[str, Any], count: int, length: int, make: Callable[..., torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        embeds = make(count, length, config["joint_attention_dim"])
        return {"prompt_embeds": embeds, "prompt_embeds_mask": embeds.new_ones(count, length, dtype=torch.bool)}

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
            "encoder_hidden_states_mask": text["prompt_embeds_mask"].bool(),
            "timestep": times,
            "img_shapes": [[(1, *grid)]] * len(noisy),
        }
