"""diffusers' pipelines that load a base model and an adapter in one call, and the pipeline of SiT."""

from .hybrid import hybrid_pipeline
from .sit import SiTPipeline

__all__ = ["SiTPipeline", "hybrid_pipeline"]
