"""The supported transformers, one row each. A new family is one file, and one row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn

from ..attention import TokenLayout
from .hybrid_flux import (
    DenseFluxAttnProcessor,
    HybridFluxAttnProcessor,
    HybridFluxTransformer2DModel,
    flux_token_layout,
)
from .hybrid_pixart import (
    DenseAttnProcessor,
    HybridAttnProcessor,
    HybridPixArtTransformer2DModel,
    pixart_token_layout,
)
from .hybrid_sd3 import (
    DenseJointAttnProcessor,
    HybridJointAttnProcessor,
    HybridSD3Transformer2DModel,
    sd3_token_layout,
)


@dataclass(frozen=True)
class Family:
    """One kind of transformer.

    dense_class, hybrid_class: the diffusers class and ours over it.
    layers: fnmatch patterns of the attention modules whose cost is quadratic in image tokens.
    teacher_processor: what diffusers puts on every attention module; the other two replace it, the hybrid one on
        converted layers and the dense one, which accepts the layout and ignores it, on the rest.
    attention_kwargs: the argument of forward that reaches the processors.
    token_layout: (model, arguments of forward) -> TokenLayout.
    """

    dense_class: type[nn.Module]
    hybrid_class: type[nn.Module]
    layers: tuple[str, ...]
    teacher_processor: type
    hybrid_processor: type
    dense_processor: type
    attention_kwargs: str
    token_layout: Callable[[nn.Module, dict[str, Any]], TokenLayout]

    def attentions(self, model: nn.Module) -> dict[str, nn.Module]:
        """Every attention module of the model, by name."""
        return {name: module for name, module in model.named_modules() if hasattr(module, "set_processor")}

    def converts(self, layer: str) -> bool:
        """Whether an attention module of this name is one that hybrid attention can replace."""
        return any(fnmatchcase(layer, pattern) for pattern in self.layers)


FAMILIES = (
    Family(
        dense_class=PixArtTransformer2DModel,
        hybrid_class=HybridPixArtTransformer2DModel,
        layers=("transformer_blocks.*.attn1",),
        teacher_processor=AttnProcessor2_0,
        hybrid_processor=HybridAttnProcessor,
        dense_processor=DenseAttnProcessor,
        attention_kwargs="cross_attention_kwargs",
        token_layout=pixart_token_layout,
    ),
    Family(
        dense_class=SD3Transformer2DModel,
        hybrid_class=HybridSD3Transformer2DModel,
        layers=("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
        teacher_processor=JointAttnProcessor2_0,
        hybrid_processor=HybridJointAttnProcessor,
        dense_processor=DenseJointAttnProcessor,
        attention_kwargs="joint_attention_kwargs",
        token_layout=sd3_token_layout,
    ),
    Family(
        dense_class=FluxTransformer2DModel,
        hybrid_class=HybridFluxTransformer2DModel,
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        teacher_processor=FluxAttnProcessor,
        hybrid_processor=HybridFluxAttnProcessor,
        dense_processor=DenseFluxAttnProcessor,
        attention_kwargs="joint_attention_kwargs",
        token_layout=flux_token_layout,
    ),
)


def family_of(model: nn.Module) -> Family:
    """The row of this model's class, dense or hybrid. Raises ValueError for any other class, subclasses included."""
    for family in FAMILIES:
        if type(model) in (family.dense_class, family.hybrid_class):
            return family
    supported = ", ".join(family.dense_class.__name__ for family in FAMILIES)
    hint = ": pass its .transformer" if hasattr(model, "transformer") else ""
    raise ValueError(f"{type(model).__name__} is not supported{hint}: hybridize one of {supported}")


def is_hybrid(model: nn.Module) -> bool:
    """Whether the model has been converted."""
    return any(type(model) is family.hybrid_class for family in FAMILIES)
