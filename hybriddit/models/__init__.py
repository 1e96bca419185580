"""Conversion of diffusers transformers: one table of families, one surgery."""

from .families import FAMILIES, family_of, is_hybrid
from .hybrid_flux import HybridFluxTransformer2DModel
from .hybrid_pixart import HybridPixArtTransformer2DModel
from .hybrid_sd3 import HybridSD3Transformer2DModel
from .processing import LowRankDelta
from .sit import SiTTransformer2DModel
from .surgery import dense_mode, hybridize, load_adapter, read_adapter_config, restore_dense, save_adapter

__all__ = [
    "FAMILIES",
    "HybridFluxTransformer2DModel",
    "HybridPixArtTransformer2DModel",
    "HybridSD3Transformer2DModel",
    "LowRankDelta",
    "SiTTransformer2DModel",
    "dense_mode",
    "family_of",
    "hybridize",
    "is_hybrid",
    "load_adapter",
    "read_adapter_config",
    "restore_dense",
    "save_adapter",
]
