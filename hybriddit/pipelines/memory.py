"""Images larger than a device holds at once: how they are made within its memory, and a decoder that works in strips."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..models import family_of, in_strips
from ..models.peak import decoder_peak, forward_peak

LEAST_ROWS = 8  # of tokens in a strip: with fewer, most of the work is of the rows around it
MARGIN = 1.1  # for what libraries take inside their kernels, and what the allocator cannot use


@dataclass(frozen=True)
class MemoryPlan:
    """How an image is made within a device's memory.

    width, height: in pixels. rows: of tokens in each strip that the transformer sees, see `in_strips`; None: it sees the
    whole image. tiles: whether the VAE decodes in tiles. transformer, decoder: the bytes that they take at most besides
    the weights on the device; available: those there are for them.
    """

    width: int
    height: int
    rows: int | None
    tiles: bool
    transformer: int
    decoder: int
    available: int

    def __str__(self) -> str:
        parts = "the whole image at once" if self.rows is None else f"in strips of {self.rows} rows of tokens"
        tiles = "in tiles" if self.tiles else "the whole image at once"
        lines = [
            f"memory for {self.width} x {self.height} pixels: {_gib(self.available)} GiB are free",
            f"    transformer  {_gib(self.transformer):>7} GiB, {parts}",
            f"    VAE          {_gib(self.decoder):>7} GiB, {tiles}",
        ]
        return "\n".join(lines)


def plan_memory(pipeline: Any, width: int, height: int, *, images: int = 1, available: int) -> MemoryPlan:
    """Find how a hybrid pipeline makes an image of this size, in pixels, in so many bytes besides the weights.

    images: that go through the transformer together, 2 with guidance (in strips, they go one after another).

    The transformer sees the whole image if that fits, else the largest strips that fit, by halves. Raises ValueError,
    with the size that should fit, if none does. Found by counting tensors, not by running anything, in seconds.
    """
    model, vae = pipeline.transformer, pipeline.vae
    family, device = family_of(model), torch.device(pipeline._execution_device)
    side = family.token_pixels(model.config, pipeline.vae_scale_factor)
    grid = height // side, width // side
    family.check_grid(model.config, grid)
    text = family.example_text(model.config, images, family.text_length(), lambda *shape: torch.zeros(()).expand(shape))
    peak = partial(forward_peak, model, grid, text, device=device, dtype=model.dtype)
    moved = _moved(model)
    available, rows, transformer = available - moved, None, 0
    # the whole image needs at least its tokens, and an MLP's hidden layer: where that is too much, it is not tried,
    # because tables of positions are made in earnest
    least = 8 * images * grid[0] * grid[1] * family.layer_shape(_attention(model)).width * model.dtype.itemsize
    if least <= available:
        transformer = int(peak() * MARGIN)
    if not transformer or transformer > available:
        rows = grid[0]
        while transformer == 0 or transformer > available:
            if rows <= LEAST_ROWS:
                fits = int((available / transformer) ** 0.5 * min(width, height)) // side * side
                raise ValueError(
                    f"{width} x {height} pixels need {_gib(transformer)} GiB besides the weights, in strips of {rows} "
                    f"rows of tokens, and {_gib(available)} GiB are free: {fits} x {fits} should fit"
                )
            rows = max(LEAST_ROWS, -(-rows // 2))
            transformer = int(peak(rows=rows) * MARGIN)
    decoder, tiles = 0, False
    if vae is not None:
        count = partial(decoder_peak, vae, device=device, dtype=vae.dtype)
        latents = height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor
        decoder = int(count(latents) * MARGIN)
        if decoder > available and hasattr(vae, "tiled_decode"):
            tile, tiles = vae.tile_latent_min_size, True
            kept = (
                3 * 3 * vae.tile_sample_min_size * width * vae.dtype.itemsize
            )  # two rows of tiles, and a strip of them
            decoder = int((count((min(tile, latents[0]), min(tile, latents[1]))) + kept) * MARGIN)
    return MemoryPlan(width, height, rows, tiles, transformer, decoder, available)


def _moved(module: nn.Module) -> int:
    """Bytes of the weights that come to the device as a whole when the module runs, by accelerate's hook."""
    return sum(p.nbytes for p in module.parameters() if not p.is_meta) if hasattr(module, "_hf_hook") else 0


def _attention(model: nn.Module) -> nn.Module:
    family = family_of(model)
    return next(attn for name, attn in family.attentions(model).items() if family.converts(name))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, or can be freed by torch."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise ValueError("how much memory is free is not known on this system: say how much may be used")


def make_within(pipeline: Any, plan: MemoryPlan, **arguments: Any) -> Image.Image:
    """Call a text-to-image pipeline as planned, for one image. arguments: of the call."""
    strips = contextlib.nullcontext() if plan.rows is None else in_strips(pipeline.transformer, plan.rows)
    with strips:
        if not plan.tiles:
            return pipeline(**arguments).images[0]
        latents = pipeline(**arguments, output_type="latent").images
    family = family_of(pipeline.transformer)
    side = family.token_pixels(pipeline.transformer.config, pipeline.vae_scale_factor)
    latents = family.vae_latents(pipeline.vae, latents, (plan.height // side, plan.width // side))
    image, top = Image.new("RGB", (plan.width, plan.height)), 0
    for strip in decode_in_strips(pipeline.vae, latents.to(pipeline.vae.dtype)):
        image.paste(Image.fromarray(strip), (0, top))
        top += len(strip)
    pipeline.maybe_free_model_hooks()
    return image


@torch.no_grad()
def decode_in_strips(vae: nn.Module, latents: torch.Tensor) -> Iterator[np.ndarray]:
    """Decode latents [1, C, h, w], as the VAE takes them, to strips of the image: uint8 [rows, width, 3], from the top.

    The pixels are those of diffusers' own `tiled_decode`, of which two rows of tiles are held at a time.
    """
    size, pixels, overlap = vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor
    step, blended = int(size * (1 - overlap)), int(pixels * overlap)
    above: list[torch.Tensor] = []
    for top in range(0, latents.shape[2], step):
        row = [
            vae.decode(latents[:, :, top : top + size, left : left + size], return_dict=False)[0]
            for left in range(0, latents.shape[3], step)
        ]
        for i, tile in enumerate(row):  # both blend into their second argument
            if above:
                vae.blend_v(above[i], tile, blended)
            if i:
                vae.blend_h(row[i - 1], tile, blended)
        strip = torch.cat([tile[0, :, : pixels - blended, : pixels - blended] for tile in row], 2)
        strip = (strip / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).float().cpu()
        yield (strip * 255).round().numpy().astype(np.uint8)
        above = row


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}"
