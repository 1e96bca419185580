"""Hybrid attention makes pretrained diffusion transformers linear in image tokens. Names are imported on first use."""

import importlib
import sys

__version__ = "0.1.0"

_HOMES = {
    "HybridConfig": ".config",
    "hybridize": ".models",
    "restore_dense": ".models",
    "dense_mode": ".models",
    "in_strips": ".models",
    "save_adapter": ".models",
    "HeldAdapters": ".models",
    "load_adapter": ".models",
    "load_clear": ".models",
    "load_linfusion": ".models",
    "push_adapter": ".push",
    "SiTTransformer2DModel": ".models",
    "SiTPipeline": ".pipelines",
    "load_config": ".training.run_config",
    # diffusers loads a pipeline's component only from a module that also exposes the component's base class
    "ModelMixin": "diffusers",
}


__all__ = list(_HOMES)


def _family_classes():
    """The hybrid models and pipelines of all families, by name: public too, but listing them imports diffusers."""
    from .models import families
    from .pipelines import hybrid_pipeline

    models = [family.hybrid_class for family in families()]
    kinds = [kind for family in families() for kind in family.pipeline_classes("text-to-image")]
    pipelines = [hybrid_pipeline(kind) for kind in kinds]
    # of families that share a pipeline, the first gives the class: the last of equal names would win
    return {made.__name__: made for made in reversed((*models, *pipelines))}


def __getattr__(name):
    if name == "parallel":
        return importlib.import_module(".parallel", __name__)
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name], __name__), name)
        globals()[name] = value
        return value
    found = _family_classes() if name.startswith("Hybrid") else {}
    if name not in found:
        raise AttributeError(f"module 'hybriddit' has no attribute {name!r}")
    return found[name]


def __dir__():
    classes = _family_classes() if f"{__name__}.models" in sys.modules else ()
    return sorted({*globals(), *__all__, *classes})
