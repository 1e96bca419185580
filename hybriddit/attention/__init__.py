"""Tensors in, tensors out: the attention branches. Imports torch, never diffusers."""

from .hybrid import HybridAttention
from .layout import TokenLayout
from .linear import linear_attention
from .window import neighborhood_attention

__all__ = ["HybridAttention", "TokenLayout", "linear_attention", "neighborhood_attention"]
