"""LongCat-Image: FLUX's blocks, text and image on one diagonal, no pooled text, guidance with a negative prompt.

Sources, read in November 2026: diffusers 0.42's LongCatImageTransformer2DModel, LongCatImagePipeline and
LongCatImageEditPipeline; the training code, its config and the examples of github.com/meituan-longcat/LongCat-Image; its
report, arXiv 2512.07584. It is a flow model. The training code draws logit-normal times, moves them by the scheduler's
formula of the image's size, and gives a tenth of the images the empty prompt: a student learns as that does. The
numbers of blocks, 10 and 20, and the scheduler's, which are FLUX.1-dev's, are those that ports of the checkpoint give; they
add up to the report's 6 billion parameters. The encoder is Qwen2.5-VL 7B, the VAE FLUX's.

The examples sample 50 steps at a guidance of 4 to 4.5, of prompts that the pipeline lets its text encoder write anew; here
prompts stay as they are given. With guidance the pipeline makes no token's prediction longer than the prompt's own is
(`enable_cfg_renorm`), in the teacher's images too. Edit-Turbo, of 8 steps, is an edit model: no few-step model that reads
text alone is published.

The text has 512 tokens, whose padding is not hidden. Token i of it is at row and column i, and the image's first token at
row and column 512 (in the edit pipeline: as many as the prompt has), so that bfloat16 cannot hold its places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImagePipeline, LongCatImageTransformer2DModel
from diffusers.models.transformers.transformer_longcat_image import LongCatImageAttnProcessor
from torch import nn

from ..attention import TokenLayout
from .family import Processors, Published
from .flux import Flux, HybridFluxAttnProcessor, position_ids
from .hybrid_model import hybrid_class
from .processing import LayoutHolder
from .qwen_image import QWEN2_5_VL_7B
from .recipe import Recipe, shifted_logit_normal
from .wrapping import with_method

LENGTH = 512  # of the text in tokens


class HybridLongCatImageAttnProcessor(HybridFluxAttnProcessor):
    """LongCatImageAttnProcessor with hybrid attention in place of softmax over all tokens."""

    layout_holder: LayoutHolder

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        token_layout = self.layout_holder.token_layout
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, token_layout
        )


HybridLongCatImageTransformer2DModel = hybrid_class(LongCatImageTransformer2DModel)
SHAPE = {"num_layers": 10, "num_single_layers": 20}  # the rest as diffusers' class has it


class LongCatImage(Flux):
    """LongCat-Image and -Dev, and the transformers of the edit models, whose pipeline is not distilled for."""

    name = "LongCat-Image"
    dense_class = LongCatImageTransformer2DModel
    hybrid_class = HybridLongCatImageTransformer2DModel
    processors = (Processors(LongCatImageAttnProcessor, HybridLongCatImageAttnProcessor),)
    attention_kwargs = None  # diffusers' model has none
    rows_from_zero = False
    positions = ("plain", "interpolated")  # others would move the text's places with the image's
    image_arguments = ("hidden_states", "img_ids")
    pipelines = {"text-to-image": LongCatImagePipeline}
    text_encoders = ("text_encoder",)
    scheduler = FlowMatchEulerDiscreteScheduler
    guided = True
    guided_together = False
    recipes = {"longcat_image": Recipe(shifted_logit_normal, 1.0, 0.5, 0.5, 0.1)}
    published = {
        "meituan-longcat/LongCat-Image": Published(SHAPE, shape="longcat-image", text_parameters=QWEN2_5_VL_7B),
        "meituan-longcat/LongCat-Image-Dev": Published(SHAPE, text_parameters=QWEN2_5_VL_7B),
    }

    def token_layout(self, model: nn.Module, inputs: Mapping[str, Any]) -> TokenLayout:
        """As FLUX's. Raises ValueError for ids of a dtype that does not tell the rows of an image apart, too."""
        dtype = inputs["img_ids"].dtype
        if dtype.is_floating_point and 2 / torch.finfo(dtype).eps < 2 * LENGTH:
            raise ValueError(f"img_ids in {dtype} do not tell rows from {LENGTH} on apart: pass float32 ones")
        return super().token_layout(model, inputs)

    def position_forwards(
        self, model: nn.Module, positions: str, native: tuple[int, int], grid: tuple[int, int]
    ) -> dict[nn.Module, Callable[..., Any]]:
        """Interpolated: the image's places are spread over the native ones from its first on; the text stays."""
        own = model.pos_embed.forward
        spread = [min(1.0, known / side) for known, side in zip(native, grid, strict=True)]

        def forward(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            ids = ids.float()
            text = ids[:, :1] == 0
            first = text.sum()  # the image's place, as row and as column
            places = first + (ids[:, 1:] - first) * ids.new_tensor(spread)
            return own(torch.cat((ids[:, :1], torch.where(text, ids[:, 1:], places)), 1))

        return {model.pos_embed: forward}

    def text_length(self, max_sequence_length: int | None = None, tokenizer_length: int = 77) -> int:
        if max_sequence_length is not None:
            raise ValueError(f"{self.name} reads {LENGTH} tokens: leave max_sequence_length out")
        return LENGTH

    def encode_prompts(self, pipeline: Any, prompts: list[str], **length: int) -> dict[str, torch.Tensor]:
        self.text_length(**length)
        return {"prompt_embeds": pipeline.encode_prompt(prompts)[0]}

    def example_text(
        self, config: Mapping[str, Any], count: int, length: int, make: Callable[..., torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": make(count, length, config["joint_attention_dim"])}

    def sampling_arguments(
        self, text: Mapping[str, torch.Tensor], empty: Mapping[str, torch.Tensor], count: int
    ) -> dict[str, Any]:
        return {**super().sampling_arguments(text, empty, count), "enable_prompt_rewrite": False}

    def sampler(self, pipeline: Any) -> Callable[..., Any]:
        def encode_prompt(prompt=None, num_images_per_prompt=1, prompt_embeds=None):
            # diffusers' counts the prompts even so
            prompts = [""] * len(prompt_embeds)
            return type(pipeline).encode_prompt(pipeline, prompts, num_images_per_prompt, prompt_embeds)

        def sample(**arguments: Any) -> Any:
            with with_method(pipeline, "encode_prompt", encode_prompt):
                return pipeline(**arguments)

        return sample

    def default_recipe(self, config: Mapping[str, Any]) -> str:
        return "longcat_image"

    def model_inputs(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        grid: tuple[int, int],
        guidance: float | None,
    ) -> dict[str, Any]:
        embeds = text["prompt_embeds"]
        length = embeds.shape[1]
        place = torch.arange(length, device=noisy.device)
        image = position_ids(place, 0, grid)["img_ids"]  # whole numbers
        return {
            "hidden_states": noisy,
            "encoder_hidden_states": embeds,
            "timestep": times,
            "img_ids": image + image.new_tensor([1, length, length]),
            "txt_ids": torch.stack((torch.zeros_like(place), place, place), dim=1),
        }
