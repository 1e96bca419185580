"""Make model classes with hybrid attention from diffusers' classes: one mixin, and one function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..config import HybridConfig
from .surgery import NOT_IN_PARALLEL, check_processors, insert_hybrid, reset_processors, with_what_it_drops
from .wrapping import SavesPlain


def hybrid_class(dense_class: type[nn.Module], **attributes: Any) -> type[nn.Module]:
    """Make the class `Hybrid<dense_class>`: diffusers' class with hybrid attention, saved and loaded as diffusers' are.

    The class takes the arguments of `dense_class`, and hybrid_config: HybridConfig's fields (None: its defaults).
    attributes: class attributes that diffusers' class lacks, such as `_repeated_blocks`.
    """

    def __init__(self, *arguments: Any, **keywords: Any):
        # @register_to_config has put all arguments into the config by now
        values = {name: value for name, value in self.config.items() if not name.startswith("_")}
        hybrid_config = values.pop("hybrid_config")
        dense_class.__init__(self, **values)
        if not isinstance(hybrid_config, HybridConfig):
            hybrid_config = HybridConfig.from_saved(hybrid_config or {})
        insert_hybrid(self, hybrid_config)

    # register_to_config keeps the arguments that the signature names
    parameters = list(inspect.signature(dense_class.__init__).parameters.values())
    added = inspect.Parameter("hybrid_config", inspect.Parameter.KEYWORD_ONLY, default=None)
    __init__.__signature__ = inspect.Signature([*parameters, added])
    # gates stay in fp32: they are near zero, and bf16 would round their steps away. Layerwise casting heeds this too
    attributes["_dense_in_fp32"] = tuple(dense_class._keep_in_fp32_modules or ())
    attributes["_keep_in_fp32_modules"] = [*attributes["_dense_in_fp32"], "gate"]
    name = f"Hybrid{dense_class.__name__}"
    members = {
        "__init__": register_to_config(__init__),
        "__doc__": f"{dense_class.__name__} with hybrid attention; hybrid_config holds HybridConfig's fields.",
        # saved pipelines find the class in this module, whatever the package's inner layout
        "__module__": "hybriddit",
        "__qualname__": name,
    }
    return type(name, (HybridModelMixin, dense_class), {**attributes, **members})


def stays_in_fp32(model: nn.Module, name: str) -> bool:
    """Whether the weight of this name is in fp32 in a model loaded in another dtype: gates, and what its class says."""
    parts = name.split(".")
    if "hybrid" in parts:
        return "gate" in parts
    kept = getattr(model, "_dense_in_fp32", getattr(model, "_keep_in_fp32_modules", None))
    return not set(parts).isdisjoint(kept or ())


class HybridModelMixin(SavesPlain):
    """The behaviour that the hybrid model classes of all families share; put it before the diffusers class."""

    def set_attn_processor(self, processor) -> None:
        """Set hybrid processors, as in diffusers. Raises ValueError for others, and then changes none."""
        before = self.attn_processors
        super().set_attn_processor(processor)
        if self._dense_mode:
            return
        try:
            check_processors(self)
        except ValueError:
            super().set_attn_processor(before)
            raise

    def set_default_attn_processor(self) -> None:
        """Go back to hybrid attention, after a feature (such as PAG) has left its own processors behind."""
        reset_processors(self)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint
    ) -> None:
        if enable:
            gradient_checkpointing_func = with_what_it_drops(self, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)

    def enable_layerwise_casting(self, *args, **kwargs) -> None:
        # diffusers looks for "gate" anywhere in a name: the dense model's own gates are stored low, as without hybrids
        self._keep_in_fp32_modules = [*self._dense_in_fp32, r"\.hybrid\.gate"]
        try:
            super().enable_layerwise_casting(*args, **kwargs)
        finally:
            del self._keep_in_fp32_modules

    def enable_parallelism(self, **kwargs) -> None:
        raise ValueError(NOT_IN_PARALLEL)

    def fuse_qkv_projections(self) -> None:
        raise ValueError("hybrid models use the separate projections: leave fuse_qkv_projections out")

    def _load_ip_adapter_weights(self, *args, **kwargs) -> None:
        raise ValueError(
            "hybrid models do not take IP-Adapters: restore_dense(model), and load it into the dense model"
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load as diffusers does, from safetensors only. Raises ValueError where the folder has no hybrid weights."""
        if kwargs.get("use_safetensors") is False:
            raise ValueError(f"{cls.__name__} loads safetensors only: leave use_safetensors out")
        kwargs["use_safetensors"] = True
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # diffusers matches any part of a name: it has also kept the dense model's own layers called "gate" in fp32, and
        # parts of hybrid attention that are called as what the dense model keeps so, such as "norm"
        for name, parameter in model.named_parameters():
            if set(name.split(".")) & set(cls._keep_in_fp32_modules) and not stays_in_fp32(model, name):
                parameter.data = parameter.data.to(model.dtype)
        # diffusers leaves weights that the file lacks on the meta device, with a warning
        offloaded = getattr(model, "hf_device_map", None)  # offloaded weights are on meta too, and kept elsewhere
        missing = [] if offloaded else [name for name, p in model.named_parameters() if p.is_meta]
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of {cls.__name__} (first: {missing[0]}): "
                "load a dense model with its own class, then hybridize it or load_adapter"
            )
        return loaded
