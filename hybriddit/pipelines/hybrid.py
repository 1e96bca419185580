"""Each family's text-to-image pipeline, loaded with an adapter in one call, and saved under its own class's name."""

from __future__ import annotations

import functools
import json
import os

from diffusers import DiffusionPipeline

from ..models import load_adapter
from ..models.family import Family


class _AdapterPipelineMixin:
    """What the hybrid pipelines of all families share; it goes before the family's own class, `_dense_pipeline`.

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
        # what save_pretrained writes: DiffusionPipeline and AutoPipeline look for the class in diffusers
        config = json.loads(super().to_json_string())
        config["_class_name"] = self._dense_pipeline.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


@functools.cache
def hybrid_pipeline(family: Family) -> type[DiffusionPipeline]:
    """The class `Hybrid<pipeline>`: the family's text-to-image pipeline over a hybrid transformer."""
    dense = family.pipelines["text-to-image"]
    doc = f"{dense.__name__} over a hybrid transformer."
    members = {"__doc__": doc, "__module__": "hybriddit", "_dense_pipeline": dense}
    return type(f"Hybrid{dense.__name__}", (_AdapterPipelineMixin, dense), members)
