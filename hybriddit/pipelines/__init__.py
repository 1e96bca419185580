"""Pipelines: subclasses of diffusers' that load a base model and an adapter in one call, and SiT's pipeline."""

from .hybrid import hybrid_pipeline
from .sit import SiTPipeline

__all__ = ["SiTPipeline", "hybrid_pipeline"]
