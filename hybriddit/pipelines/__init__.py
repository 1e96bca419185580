"""diffusers' pipelines that load a base model and an adapter in one call."""

from .hybrid import HybridFluxPipeline, HybridPixArtSigmaPipeline, HybridStableDiffusion3Pipeline

__all__ = ["HybridFluxPipeline", "HybridPixArtSigmaPipeline", "HybridStableDiffusion3Pipeline"]
