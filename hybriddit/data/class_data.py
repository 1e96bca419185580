"""Images with class labels, as pixels or as latents, for training from scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torchvision.transforms.v2.functional import horizontal_flip

from ..files import checksum
from .shards import ShardedDataset


@dataclass(frozen=True)
class ClassInfo:
    """Describes the rows of a set.

    shape: (C, H, W) of the model's input. classes: the classes' names, in the order of the labels.
    vae: folder or repository of the VAE that made the latents; None for images. vae_sha256: of its weights.
    scaling_factor, shift_factor: the model sees (latent - shift_factor) * scaling_factor.
    """

    shape: tuple[int, int, int]
    classes: list[str] = field(default_factory=list)
    vae: str | None = None
    vae_sha256: str | None = None
    scaling_factor: float = 1.0
    shift_factor: float = 0.0


class ClassData(ShardedDataset):
    """Images or latents with their labels.

    shards: tables of "labels" [N] and either "images", uint8 [N, C, H, W], or "moments" and "flipped", fp16
        [N, 2 C, H, W]: mean and log-variance of the latents of the image and of its mirror image.
    """

    def __init__(self, shards: Sequence[Mapping], info: ClassInfo):
        super().__init__(shards)
        self.info = info

    def draw(
        self, indices: list[int], mirrored: torch.Tensor, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's inputs from these rows, fp32 [B, C, H, W], and their labels, int64 [B].

        mirrored: bool [B]. noise: standard normal [B, C, H, W], with which latents are drawn from their distribution;
        None for images.
        """
        rows = self.rows(indices)
        mirrored = mirrored.view(-1, 1, 1, 1)
        if "images" in rows:
            images = torch.where(mirrored, horizontal_flip(rows["images"]), rows["images"])
            return to_model_range(images), rows["labels"].long()
        moments = torch.where(mirrored, rows["flipped"], rows["moments"]).float()
        posterior = DiagonalGaussianDistribution(moments)
        latents = posterior.mean + posterior.std * noise
        return (latents - self.info.shift_factor) * self.info.scaling_factor, rows["labels"].long()

    def content(self) -> str:
        """SHA-256 of all labels and of 64 rows from all over the set, by which a run that is resumed knows its set."""
        rows = self.rows(range(0, len(self), max(1, len(self) // 64)))
        return checksum({**rows, "labels": self.labels()})

    def labels(self) -> torch.Tensor:
        """All labels, int64 [N]."""
        return torch.cat([shard["labels"][:] for shard in self.shards]).long()


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 pixels as fp32 in [-1, 1]. (v2's normalize(0.5, 0.5) rounds 43 % of the levels to another last bit.)"""
    return images.float() / 127.5 - 1
