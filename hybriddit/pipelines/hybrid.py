"""Each family's text-to-image pipeline, loaded with an adapter in one call, and saved under its own class's name."""

from __future__ import annotations

import functools
import json
import os

from diffusers import DiffusionPipeline

from ..models import load_adapter


class _AdapterPipelineMixin:
    """The behaviour that all hybrid pipelines share; put it before diffusers' class, `_dense_pipeline`.

    For image-to-image and inpainting pass the components on: `FluxImg2ImgPipeline(**pipeline.components)`. diffusers'
    `from_pipe` looks for diffusers' own classes, and drops the hybrid transformer.
    """

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike,
        adapter: str | os.PathLike | None = None,
        *,
        check_base: bool = True,
        **kwargs,
    ):
        """Load the base as diffusers does, from safetensors only; then `load_adapter(pipeline, adapter)` if given.

        base, adapter: folders or hub repositories; check_base is load_adapter's, kwargs are diffusers'. Raises what
        load_adapter raises.
        """
        pipeline = super().from_pretrained(base, **{"use_safetensors": True, **kwargs})
        return pipeline if adapter is None else load_adapter(pipeline, adapter, check_base=check_base)

    def to_json_string(self) -> str:
        # save_pretrained writes this; DiffusionPipeline and AutoPipeline look for the class in diffusers
        config = json.loads(super().to_json_string())
        config["_class_name"] = self._dense_pipeline.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


@functools.cache
def hybrid_pipeline(dense: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """Make the class `Hybrid<pipeline>` of a family's text-to-image pipeline: it has a hybrid transformer."""
    doc = f"{dense.__name__} over a hybrid transformer."
    members = {"__doc__": doc, "__module__": "hybriddit", "_dense_pipeline": dense}
    return type(f"Hybrid{dense.__name__}", (_AdapterPipelineMixin, dense), members)
