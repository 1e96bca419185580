"""The Fréchet distance between a model's images and reference images, measured while the model trains."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..data.image_files import say
from ..data.image_set import FolderImages
from ..metrics import frechet_distance, load_inception, read_images
from ..metrics.adm import collect_statistics, read_reference
from ..metrics.images import Images
from ..metrics.processes import rank_and_size
from .run_config import MetricsConfig

Features = Callable[[torch.Tensor], torch.Tensor]


class FrechetDistance:
    """Measures the distance to the reference images of `config`, whose moments are computed once.

    images: the reference if the config names no file or folder. blank: two images, uint8 [2, H, W, 3], of the size of
    the model's images. processes: how many share the work; each of them must construct and call this.

    The constructor finds all errors, before any training. Raises ValueError, FileNotFoundError or ModuleNotFoundError.
    """

    def __init__(
        self,
        config: MetricsConfig,
        images: Images,
        blank: np.ndarray,
        device: torch.device,
        processes: int = 1,
        progress: bool = True,
    ):
        check_samples(config, processes)
        self.config, self.processes = config, processes
        self.features = load_features(config.features, device)
        self.mean, self.covariance = self._reference(images, blank.shape[1:3], progress)
        width = self._moments(blank, "blank images", shared=False)[0].shape[0]
        if width != len(self.mean):
            raise ValueError(
                f"metrics.features are {width} wide for the model's images and {len(self.mean)} for the reference's: "
                "give a metrics.reference of these features, and of images of this size"
            )

    def __call__(self, make: Callable[[range], np.ndarray]) -> float:
        """Measure the distance. make: (range of samples) -> the model's images, uint8 [B, H, W, 3].

        Every process must call this.
        """
        return frechet_distance(
            *self._moments(Images(self.config.samples, make), "samples"), self.mean, self.covariance
        )

    def _reference(self, images: Images, size: tuple[int, int], progress: bool) -> tuple[torch.Tensor, torch.Tensor]:
        path = self.config.reference
        if path is None:
            return self._moments(images, "reference", progress)
        if Path(path).is_dir():
            says = progress and rank_and_size(self.processes > 1)[0] == 0
            return self._moments(_open_folder(Path(path), *size, says), "reference", progress)
        if self.config.features == "inception":  # a file may hold statistics of Inception's features only
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
            lambda batch: {"pooled": self._pooled(batch)},
            name,
            batch_size=self.config.batch_size,
            distributed=shared and self.processes > 1,
            progress=progress,
            keep=False,
        )
        return seen.moments["pooled"].mean, seen.moments["pooled"].covariance

    def _pooled(self, batch: torch.Tensor) -> torch.Tensor:
        """[B, features]. Raises ValueError where a function of the user's own fails or gives something else."""
        name = self.config.features
        if name == "inception":
            return self.features(batch)
        try:
            found = self.features(batch)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"metrics.features: {name} fails on uint8 {list(batch.shape)} ({reason})") from error
        if not isinstance(found, torch.Tensor) or found.shape[:1] != batch.shape[:1] or found.ndim != 2:
            what = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise ValueError(f"metrics.features: {name} gives {what} for {len(batch)} images, and not [B, F]")
        return found


def _open_folder(folder: Path, height: int, width: int, says: bool) -> FolderImages:
    """The images under a folder, cropped as ADM does. says: print what is passed over.

    Raises ValueError for a size that is no square.
    """
    if height != width:
        raise ValueError(
            f"metrics.reference: images of a folder are cropped to squares, and the model's are {height} x {width}: give "
            "an npz file"
        )
    images = FolderImages(folder, height)
    if images.note and says:
        say(images.note)
    return images


def check_samples(config: MetricsConfig, processes: int) -> None:
    """Raise ValueError where the samples cannot be divided evenly among the processes."""
    if config.samples % processes:
        raise ValueError(f"metrics.samples {config.samples} does not divide into {processes} processes")


def as_rgb(images) -> np.ndarray:
    """Convert PIL images of one size to uint8 [B, H, W, 3]; grey ones get three equal channels."""
    return np.stack([np.asarray(image.convert("RGB")) for image in images])


def load_features(name: str, device: torch.device) -> Features:
    """Load a feature function, uint8 [B, 3, H, W] -> [B, F]: "inception" (pooled), or "package.module:function"."""
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
