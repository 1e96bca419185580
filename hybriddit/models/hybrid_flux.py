"""FLUX.1: text first; double blocks with projections of their own for text, single blocks with one joined sequence."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from ..attention import TokenLayout
from .hybrid_model import HybridModelMixin
from .processing import check_call, far_inputs, project


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
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        check_call(token_layout, attention_mask)

        def heads(name, tokens):
            return project(attn, name, tokens).unflatten(-1, (-1, attn.head_dim))  # [B, S, heads, D]

        query, key, value = (heads(name, hidden_states) for name in ("to_q", "to_k", "to_v"))
        image = (hidden_states, query, key)
        if encoder_hidden_states is None:  # a single block: text and image are one sequence already
            image = (token_layout.split(tokens)[1] for tokens in image)
        far = far_inputs(attn, *image)

        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            text_query, text_key, text_value = (
                heads(name, encoder_hidden_states) for name in ("add_q_proj", "add_k_proj", "add_v_proj")
            )
            query = token_layout.join(attn.norm_added_q(text_query), query)
            key = token_layout.join(attn.norm_added_k(text_key), key)
            value = token_layout.join(text_value, value)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)

        out = attn.hybrid(query, key, value, token_layout, **far).flatten(2).to(query.dtype)
        if encoder_hidden_states is None:
            return out
        text, image = token_layout.split(out)
        return attn.to_out[1](project(attn, "to_out.0", image)), project(attn, "to_add_out", text)


class DenseFluxAttnProcessor(FluxAttnProcessor):
    """The teacher's processor, for layers that stay dense: takes the layout that all layers are handed."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        token_layout: TokenLayout | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


def flux_token_layout(model: FluxTransformer2DModel, inputs: dict[str, Any]) -> TokenLayout:
    """Text length and image grids of one forward call's arguments.

    img_ids [N, 3] hold (image index, row, column): 0 for the image, 1 and up for reference images (Kontext). The
    width is the number of tokens in row 0: ids come in bf16, which cannot tell large rows or columns apart.
    Raises ValueError where the ids are no sequence of whole grids.
    """
    img_ids = inputs["img_ids"]
    index, row = img_ids.reshape(-1, img_ids.shape[-1])[: inputs["hidden_states"].shape[1], :2].cpu().unbind(1)
    counts = [(int((index == i).sum()), int(((index == i) & (row == 0)).sum())) for i in index.unique().tolist()]
    grids = tuple((count // max(width, 1), width) for count, width in counts)
    layout = TokenLayout(inputs["encoder_hidden_states"].shape[1], grids, text_first=True)
    if layout.image_length != inputs["hidden_states"].shape[1] or index.diff().lt(0).any():
        raise ValueError(
            f"img_ids do not describe whole image grids (found {grids} for {inputs['hidden_states'].shape[1]} tokens): "
            "pass joint_attention_kwargs={'token_layout': TokenLayout(...)}"
        )
    return layout


class HybridFluxTransformer2DModel(HybridModelMixin, FluxTransformer2DModel):
    """FluxTransformer2DModel with hybrid attention; hybrid_config holds HybridConfig's fields (None: its defaults)."""

    _skip_layerwise_casting_patterns: ClassVar[list[str]] = [
        *FluxTransformer2DModel._skip_layerwise_casting_patterns,
        "gate",
    ]

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        hybrid_config: dict[str, Any] | None = None,
    ):
        super().__init__(**self._dense_arguments())
        self._init_hybrid(hybrid_config)


# saved pipelines name the class by this module: the short name outlives the package's inner layout
HybridFluxTransformer2DModel.__module__ = "hybriddit"
