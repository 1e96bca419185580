"""PixArt-Sigma: self-attention of the image alone (attn1); the text's cross-attention (attn2) stays as it is."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import AttnProcessor2_0

from ..attention import TokenLayout
from .hybrid_model import HybridModelMixin
from .processing import check_call, far_inputs, norm, project


class HybridAttnProcessor:
    """AttnProcessor2_0 for self-attention, with hybrid attention in place of softmax over all tokens."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_layout: TokenLayout | None = None,
    ) -> torch.Tensor:
        check_call(token_layout, attention_mask)
        query, key, value = (
            project(attn, name, hidden_states).unflatten(-1, (attn.heads, -1))  # [B, N, heads, D]
            for name in ("to_q", "to_k", "to_v")
        )
        far = far_inputs(attn, hidden_states, query, key)
        query, key = norm(attn.norm_q, query), norm(attn.norm_k, key)
        out = attn.hybrid(query, key, value, token_layout, **far).flatten(2).to(query.dtype)
        return attn.to_out[1](project(attn, "to_out.0", out))


class DenseAttnProcessor(AttnProcessor2_0):
    """The teacher's processor, for layers that stay dense: takes the layout that all layers are handed."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_layout: TokenLayout | None = None,
    ) -> torch.Tensor:
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)


def pixart_token_layout(model: PixArtTransformer2DModel, inputs: dict[str, Any]) -> TokenLayout:
    """The image grid of one forward call's arguments; hidden_states are latents [B, C, height, width]."""
    height, width = (side // model.config.patch_size for side in inputs["hidden_states"].shape[-2:])
    return TokenLayout(0, ((height, width),), text_first=False)


class HybridPixArtTransformer2DModel(HybridModelMixin, PixArtTransformer2DModel):
    """PixArtTransformer2DModel with hybrid attention; hybrid_config holds HybridConfig's fields (None: its defaults)."""

    _skip_layerwise_casting_patterns: ClassVar[list[str]] = [
        *PixArtTransformer2DModel._skip_layerwise_casting_patterns,
        "gate",
    ]
    _repeated_blocks: ClassVar[list[str]] = ["BasicTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = 1152,
        attention_bias: bool = True,
        sample_size: int = 128,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: int | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int | None = None,
        attention_type: str | None = "default",
        hybrid_config: dict[str, Any] | None = None,
    ):
        super().__init__(**self._dense_arguments())
        self._init_hybrid(hybrid_config)


# saved pipelines name the class by this module: the short name outlives the package's inner layout
HybridPixArtTransformer2DModel.__module__ = "hybriddit"
