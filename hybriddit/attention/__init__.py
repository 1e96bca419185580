"""Tensors in, tensors out: the attention branches. Imports torch, never diffusers."""

from .hybrid import HybridAttention
from .layout import TokenLayout
from .linear import linear_attention
from .window import aligned_window, neighborhood_attention

__all__ = ["HybridAttention", "TokenLayout", "aligned_window", "linear_attention", "neighborhood_attention"]
