"""Conversion of diffusers transformers (a file for each family, and surgery.py, which all share), adapters; and SiT."""

from .adapters import HeldAdapters, load_adapter, read_adapter_config, save_adapter
from .clear import load_clear
from .families import (
    BRIA_FIBO,
    CHROMA,
    FLUX,
    FLUX_2,
    FLUX_2_KLEIN,
    FLUX_3_KLEIN,
    KREA_2,
    LONGCAT_IMAGE,
    OVIS_IMAGE,
    PIXART_SIGMA,
    QWEN_IMAGE,
    STABLE_DIFFUSION_3,
    STABLE_DIFFUSION_UNET,
    Z_IMAGE,
)
from .family import families, family_of, is_hybrid, register
from .linfusion import load_linfusion
from .positions import scaled_positions
from .processing import LowRankDelta
from .sit import SiTTransformer2DModel
from .strips import in_strips
from .surgery import dense_mode, hybridize, restore_dense

__all__ = [
    "HeldAdapters",
    "BRIA_FIBO",
    "CHROMA",
    "FLUX",
    "FLUX_2",
    "FLUX_2_KLEIN",
    "FLUX_3_KLEIN",
    "KREA_2",
    "LONGCAT_IMAGE",
    "OVIS_IMAGE",
    "PIXART_SIGMA",
    "QWEN_IMAGE",
    "STABLE_DIFFUSION_3",
    "STABLE_DIFFUSION_UNET",
    "Z_IMAGE",
    "LowRankDelta",
    "SiTTransformer2DModel",
    "dense_mode",
    "families",
    "family_of",
    "hybridize",
    "in_strips",
    "is_hybrid",
    "load_adapter",
    "load_clear",
    "load_linfusion",
    "read_adapter_config",
    "register",
    "restore_dense",
    "save_adapter",
    "scaled_positions",
]
