"""Thin subclasses of diffusers' pipelines: `from_pretrained(base, adapter=...)`, saved under diffusers' own names."""

from __future__ import annotations

import json
import os

from diffusers import FluxPipeline, PixArtSigmaPipeline, StableDiffusion3Pipeline

from ..models import load_adapter


class _AdapterPipelineMixin:
    """Goes before the diffusers class.

    For image-to-image and inpainting hand the components on: `FluxImg2ImgPipeline(**pipeline.components)`. diffusers'
    `from_pipe` looks for its own classes, and drops the hybrid transformer.
    """

    @classmethod
    def from_pretrained(cls, base: str | os.PathLike, adapter: str | os.PathLike | None = None, **kwargs):
        """As diffusers', from safetensors only; then `load_adapter(pipeline, adapter)` where one is given.

        base, adapter: folders or hub repositories; kwargs are diffusers'. Raises what load_adapter raises.
        """
        pipeline = super().from_pretrained(base, **{"use_safetensors": True, **kwargs})
        return pipeline if adapter is None else load_adapter(pipeline, adapter)

    def to_json_string(self) -> str:
        # what save_pretrained writes: DiffusionPipeline and AutoPipeline look the class up in diffusers
        config = json.loads(super().to_json_string())
        config["_class_name"] = next(c.__name__ for c in type(self).__mro__ if c.__module__.startswith("diffusers."))
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


class HybridPixArtSigmaPipeline(_AdapterPipelineMixin, PixArtSigmaPipeline):
    """PixArtSigmaPipeline over a hybrid transformer."""


class HybridStableDiffusion3Pipeline(_AdapterPipelineMixin, StableDiffusion3Pipeline):
    """StableDiffusion3Pipeline over a hybrid transformer."""


class HybridFluxPipeline(_AdapterPipelineMixin, FluxPipeline):
    """FluxPipeline over a hybrid transformer."""
