"""diffusers' pipelines that load a base model and an adapter in one call, and the pipeline of SiT."""

from .hybrid import HybridFluxPipeline, HybridPixArtSigmaPipeline, HybridStableDiffusion3Pipeline
from .sit import SiTPipeline

__all__ = ["HybridFluxPipeline", "HybridPixArtSigmaPipeline", "HybridStableDiffusion3Pipeline", "SiTPipeline"]
