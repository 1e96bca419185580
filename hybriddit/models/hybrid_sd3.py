"""Stable Diffusion 3 and 3.5: image first; 3.5-medium's dual attention adds a layer of the image alone."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import JointAttnProcessor2_0

from ..attention import TokenLayout
from .hybrid_model import HybridModelMixin
from .processing import check_call, far_inputs, norm, project


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

        if encoder_hidden_states is None:  # attn2 of a dual block sees the image alone
            image_layout = TokenLayout(0, token_layout.grids, token_layout.text_first)
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
    """The teacher's processor, for layers that stay dense: takes the layout that all layers are handed."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_layout: TokenLayout | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)


def sd3_token_layout(model: SD3Transformer2DModel, inputs: dict[str, Any]) -> TokenLayout:
    """Text length and image grid of one forward call's arguments; hidden_states are latents [B, C, height, width]."""
    height, width = (side // model.config.patch_size for side in inputs["hidden_states"].shape[-2:])
    return TokenLayout(inputs["encoder_hidden_states"].shape[1], ((height, width),), text_first=False)


class HybridSD3Transformer2DModel(HybridModelMixin, SD3Transformer2DModel):
    """SD3Transformer2DModel with hybrid attention; hybrid_config holds HybridConfig's fields (None: its defaults)."""

    _skip_layerwise_casting_patterns: ClassVar[list[str]] = [
        *SD3Transformer2DModel._skip_layerwise_casting_patterns,
        "gate",
    ]
    _repeated_blocks: ClassVar[list[str]] = ["JointTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        hybrid_config: dict[str, Any] | None = None,
    ):
        super().__init__(**self._dense_arguments())
        self._init_hybrid(hybrid_config)


# saved pipelines name the class by this module: the short name outlives the package's inner layout
HybridSD3Transformer2DModel.__module__ = "hybriddit"
