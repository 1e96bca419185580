"""A Fréchet distance of what the model makes, measured while it trains."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
import torch

from ..data.class_data import ClassData
from ..metrics import frechet_distance, load_inception, read_images, to_uint8
from ..metrics.adm import collect_statistics, read_reference
from .config import MetricsConfig

Features = Callable[[torch.Tensor], torch.Tensor]


class FrechetDistance:
    """Measures the distance to the reference of `config`, whose moments are taken once, by every process its share.

    decode: from what the model makes to pixels in [-1, 1]. data: the training set, the reference where none is named.
    All that can be wrong is found here, before any training: ValueError, FileNotFoundError or ModuleNotFoundError.
    """

    def __init__(
        self,
        config: MetricsConfig,
        data: ClassData,
        decode: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
        processes: int = 1,
        progress: bool = True,
    ):
        if config.samples % processes:
            raise ValueError(f"metrics.samples {config.samples} does not divide into {processes} processes")
        self.config, self.decode, self.processes = config, decode, processes
        self.features = load_features(config.features, device)
        self.mean, self.covariance = self._reference(data, progress)
        # two images as the model will make them: what cannot be done with them is better known now
        blank = torch.zeros(2, *data.info.shape, device=device)
        width = self._moments(Images(2, lambda rows: self._pixels(blank)), "blank images", shared=False)[0].shape[0]
        if width != len(self.mean):
            raise ValueError(
                f"metrics.features are {width} wide for the model's images and {len(self.mean)} for the reference's: "
                "give a metrics.reference of these features, and of images of this size"
            )

    def __call__(self, draw: Callable[[range], torch.Tensor]) -> float:
        """draw: what the model makes of these rows of the samples, [B, C, H, W]. Every process takes part."""
        made = Images(self.config.samples, lambda rows: self._pixels(draw(rows)))
        return frechet_distance(*self._moments(made, "samples"), self.mean, self.covariance)

    def _reference(self, data: ClassData, progress: bool) -> tuple[torch.Tensor, torch.Tensor]:
        path = self.config.reference
        if path is None:
            if data.info.vae_sha256 is not None:
                raise ValueError("metrics.reference is needed, an npz file: the training set holds latents, not images")
            pixels = Images(len(data), lambda rows: as_rows(data.rows(rows)["images"]))
            return self._moments(pixels, "reference", progress)
        if self.config.features == "inception":  # whose statistics such a file may hold, and only these
            found = read_reference(path)
            if "pooled" in found.precomputed:
                return found.precomputed["pooled"]
            if found.images is None:
                raise ValueError(f"{path} has neither images (arr_0) nor mu and sigma")
            return self._moments(found.images, "reference", progress)
        return self._moments(read_images(path), "reference", progress)

    @torch.no_grad()
    def _moments(self, images, name: str, progress: bool = False, shared: bool = True):
        """Mean and covariance of the features."""
        seen = collect_statistics(
            images,
            lambda batch: {"pooled": self.features(batch)},
            name,
            batch_size=self.config.batch_size,
            distributed=shared and self.processes > 1,
            progress=progress,
            keep=False,
        )
        return seen.moments["pooled"].mean, seen.moments["pooled"].covariance

    def _pixels(self, made: torch.Tensor) -> np.ndarray:
        return as_rows(to_uint8(self.decode(made).float()))


class Images:
    """`count` images, uint8 [N, H, W, 3], that `make` makes when a slice of them is read."""

    def __init__(self, count: int, make: Callable[[range], np.ndarray]):
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.make(range(self.count)[rows])


def as_rows(images: torch.Tensor) -> np.ndarray:
    """uint8 [B, 1 or 3, H, W] as [B, H, W, 3]."""
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def load_features(name: str, device: torch.device) -> Features:
    """uint8 [B, 3, H, W] -> [B, F]: Inception's pooled features, or the function that "package.module:function" names."""
    if name == "inception":
        inception = load_inception(device=device)
        return lambda images: inception(images)["pooled"]
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"metrics.features: {error}; PYTHONPATH says where modules are") from error
    except AttributeError:
        raise ValueError(f"metrics.features: {module} has no {function}") from None
    if not callable(found):
        raise ValueError(f"metrics.features: {name} is no function")
    return found
