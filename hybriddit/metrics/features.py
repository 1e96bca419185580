"""Features of images for a Fréchet distance: Inception's, or a function of the user's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from .inception import load_inception

Features = Callable[[torch.Tensor], torch.Tensor]


def load_features(name: str, device: torch.device, setting: str = "metrics.features") -> Features:
    """Load a feature function, uint8 [B, 3, H, W] -> [B, F]: "inception" (pooled), or "package.module:function".

    setting: what messages call the name's place. Raises ModuleNotFoundError or ValueError where there is none; what is
    returned raises ValueError where a function of the user's own fails or gives something else.
    """
    if name == "inception":
        inception = load_inception(device=device)
        return lambda images: inception(images)["pooled"]
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{setting}: {error}; PYTHONPATH says where modules are") from error
    except AttributeError:
        raise ValueError(f"{setting}: {module} has no {function}") from None
    if not callable(found):
        raise ValueError(f"{setting}: {name} is no function")

    def checked(batch: torch.Tensor) -> torch.Tensor:
        try:
            features = found(batch)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{setting}: {name} fails on uint8 {list(batch.shape)} ({reason})") from error
        if not isinstance(features, torch.Tensor) or features.shape[:1] != batch.shape[:1] or features.ndim != 2:
            what = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise ValueError(f"{setting}: {name} gives {what} for {len(batch)} images, and not [B, F]")
        return features

    return checked
