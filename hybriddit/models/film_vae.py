"""VAEs of films, of which an image is one of one frame: Qwen-Image's and Wan's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .family import Family


class _Decoding(nn.Module):
    """A VAE's way from latents [B, C, h, w] to pixels as a module, with what it keeps for frames that do not come."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return _decoded(self.vae, sample)


class _Encoding(_Decoding):
    """The same from pixels to latents."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return _encoded(self.vae, sample)


def _decoded(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    return vae.decode(latents[:, :, None], return_dict=False)[0][:, :, 0]  # a film of one frame


def _encoded(vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]


class FilmVAE(Family):
    """A family whose VAE is one of films, with a mean and a std for each channel."""

    def latent_pixels(self, vae_config: Mapping[str, Any]) -> int:
        if "temperal_downsample" not in vae_config:
            return super().latent_pixels(vae_config)
        return 2 ** len(vae_config["temperal_downsample"]) * (vae_config.get("patch_size") or 1)

    def latents_scale(self, vae: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        return mean, 1 / std

    def vae_encode(self, vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        return _encoded(vae, pixels)

    def vae_decode(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        return _decoded(vae, latents)

    def encoder(self, vae: nn.Module) -> nn.Module:
        return _Encoding(vae)

    def decoder(self, vae: nn.Module) -> nn.Module:
        return _Decoding(vae)

    def published_vae(self, channels: int) -> nn.Module:
        return self.vae_class(z_dim=channels)
