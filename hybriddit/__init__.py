"""Pretrained diffusion transformers, made linear in image tokens by hybrid attention. Names are imported on first use."""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "HybridConfig": ".config",
    "hybridize": ".models",
    "restore_dense": ".models",
    "dense_mode": ".models",
    "save_adapter": ".models",
    "load_adapter": ".models",
    "HybridPixArtTransformer2DModel": ".models",
    "HybridSD3Transformer2DModel": ".models",
    "HybridFluxTransformer2DModel": ".models",
    "SiTTransformer2DModel": ".models",
    "HybridPixArtSigmaPipeline": ".pipelines",
    "HybridStableDiffusion3Pipeline": ".pipelines",
    "HybridFluxPipeline": ".pipelines",
    "SiTPipeline": ".pipelines",
    "load_config": ".training.config",
    # diffusers loads a saved pipeline's component only from a module that exposes the component's base class
    "ModelMixin": "diffusers",
}

__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'hybriddit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
