"""What the hybrid model classes of all families share."""

from __future__ import annotations

from typing import Any, ClassVar

from ..config import HybridConfig


class HybridModelMixin:
    """Goes before the diffusers class; the attention layers are replaced when the dense model has been built."""

    # the gates are few, and near zero: bf16 would round their steps away
    _keep_in_fp32_modules: ClassVar[list[str]] = ["gate"]

    def _init_hybrid(self, hybrid_config: HybridConfig | dict[str, Any] | None) -> None:
        from .surgery import insert_hybrid  # it knows the table of families, which names the class being built

        if not isinstance(hybrid_config, HybridConfig):
            hybrid_config = HybridConfig.from_dict(hybrid_config or {})
        insert_hybrid(self, hybrid_config)

    def _dense_arguments(self) -> dict[str, Any]:
        """The diffusers class's arguments, as @register_to_config has just stored them."""
        return {k: v for k, v in self.config.items() if not k.startswith("_") and k != "hybrid_config"}

    def set_attn_processor(self, processor) -> None:
        """As diffusers', for hybrid processors. Raises ValueError, and changes none, for what would replace them."""
        from .surgery import check_processors

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
        """Go back to hybrid attention, after a feature (PAG, say) has left its own processors behind."""
        from .surgery import reset_processors

        reset_processors(self)

    def fuse_qkv_projections(self) -> None:
        raise ValueError("hybrid models use the separate projections: leave fuse_qkv_projections out")

    def _load_ip_adapter_weights(self, *args, **kwargs) -> None:
        raise ValueError(
            "hybrid models do not take IP-Adapters: restore_dense(model), and load it into the dense model"
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As diffusers', from safetensors only. Raises ValueError where the folder has no hybrid weights."""
        if kwargs.get("use_safetensors") is False:
            raise ValueError(f"{cls.__name__} loads safetensors only: leave use_safetensors out")
        kwargs["use_safetensors"] = True
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # diffusers leaves weights that the file lacks on the meta device, with a warning
        offloaded = getattr(model, "hf_device_map", None)  # whose weights wait elsewhere, on meta too
        missing = [] if offloaded else [name for name, p in model.named_parameters() if p.is_meta]
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of {cls.__name__} (first: {missing[0]}): "
                "load a dense model with its own class, then hybridize it or load_adapter"
            )
        return loaded
