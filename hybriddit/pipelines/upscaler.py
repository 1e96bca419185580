"""Upscaler modules, such as Real-ESRGAN's, for images in stages: read by spandrel, run in tiles."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..files import read_weights

TILE, AROUND = 256, 32  # pixels of the small image along a tile's sides, and what a module sees around it
ROUNDED = 1.05  # sizes of stages are rounded: by as much a stage may be larger than its upscaler makes it

Progress = Callable[..., AbstractContextManager[Any]]  # of a total, as a pipeline's progress_bar


class Upscaler:
    """A module that enlarges images, for `pipelines.cascade.repainting` in place of Lanczos' filter.

    module: makes of an image [1, 3, h, w] in [0, 1] one of [1, 3, scale h, scale w]. scale: how many times as large, on
    each side.
    """

    def __init__(self, module: nn.Module, scale: int):
        self.module, self.scale = module.eval(), scale

    def check(self, smaller: tuple[int, int], size: tuple[int, int]) -> None:
        """Raise ValueError where an image, (width, height) in pixels, is to become larger than this makes it."""
        ratio = max(size[0] / smaller[0], size[1] / smaller[1])
        if ratio > ROUNDED * self.scale:
            raise ValueError(
                f"the upscaler enlarges {self.scale} times, and a stage from {smaller[0]} x {smaller[1]} to "
                f"{size[0]} x {size[1]} pixels is {ratio:.3g} times as large: make stages smaller, by --stage-scale"
            )

    @torch.no_grad()
    def enlarge(
        self, image: Image.Image, size: tuple[int, int], device: torch.device | str, progress: Progress
    ) -> Image.Image:
        """The image, in RGB, enlarged to size: (width, height) in pixels. Held once, and its tiles' results.

        The module, which is on the device meanwhile and on the CPU again afterwards, sees tiles of the image with 32 pixels
        around each. What it makes larger than asked is made smaller by Lanczos' filter. progress: is given the number of
        tiles, as a pipeline's progress_bar. Raises ValueError for a size beyond the module's scale.
        """
        self.check(image.size, size)
        image, whole = image.convert("RGB"), np.empty((size[1], size[0], 3), np.uint8)
        tiles = list(_tiles(image.size, size))
        weight = next(self.module.parameters(), torch.empty(0))
        self.module.to(device)
        try:
            with progress(total=len(tiles)) as bar:
                bar.set_description("upscaler")
                for left, top, right, bottom in tiles:
                    across, down = image.width / size[0], image.height / size[1]
                    seen = (
                        max(0, math.floor(left * across) - AROUND),
                        max(0, math.floor(top * down) - AROUND),
                        min(image.width, math.ceil(right * across) + AROUND),
                        min(image.height, math.ceil(bottom * down) + AROUND),
                    )
                    pixels = torch.from_numpy(np.array(image.crop(seen))).to(device).permute(2, 0, 1)[None]
                    made = self._made(pixels.to(weight.dtype) / 255)
                    box = (
                        (left * across - seen[0]) * self.scale,
                        (top * down - seen[1]) * self.scale,
                        min((right * across - seen[0]) * self.scale, made.width),  # but for rounding
                        min((bottom * down - seen[1]) * self.scale, made.height),
                    )
                    part = made.resize((right - left, bottom - top), Image.Resampling.LANCZOS, box)
                    whole[top:bottom, left:right] = np.asarray(part)
                    bar.update()
        finally:
            self.module.to("cpu")
        return Image.fromarray(whole)

    def _made(self, pixels: torch.Tensor) -> Image.Image:
        """The image that the module makes of [1, 3, h, w] in [0, 1]."""
        made = self.module(pixels)
        expected = (1, 3, *(length * self.scale for length in pixels.shape[2:]))
        if made.shape != expected:
            raise ValueError(f"the upscaler makes {tuple(made.shape)} of {tuple(pixels.shape)}, not {expected}")
        if not made.isfinite().all():
            raise ValueError(f"the upscaler makes numbers that are not finite, in {pixels.dtype}")
        levels = (made[0].float().clamp(0, 1) * 255).round().byte()
        return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def _tiles(smaller: tuple[int, int], size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of parts of an enlarged image that together cover it, each TILE pixels of the smaller one."""
    steps = [max(1, TILE * large // small) for small, large in zip(smaller, size, strict=True)]
    for top in range(0, size[1], steps[1]):
        for left in range(0, size[0], steps[0]):
            yield left, top, min(left + steps[0], size[0]), min(top + steps[1], size[1])


class _Described(nn.Module):
    """A module as spandrel calls it: on images of any size."""

    def __init__(self, descriptor: Any):
        super().__init__()
        self.model, self.describes = descriptor.model, descriptor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.describes(images)


def load_upscaler(path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> Upscaler:
    """Read an upscaler's file, of any super-resolution architecture that spandrel knows, such as ESRGAN's or DAT's.

    path: of a .safetensors file, or another that torch.load reads with weights_only. dtype: of its weights; float32 where
    the architecture does not work in it. Raises FileNotFoundError; ModuleNotFoundError without spandrel; ValueError, in one
    line, for any other file.
    """
    state = read_weights(path)
    try:
        import spandrel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('an upscaler needs spandrel: pip install "hybriddit[upscaler]"') from error
    unknown = f"{path} is no upscaler that spandrel {spandrel.__version__} knows"
    if not isinstance(state, dict):
        raise ValueError(f"{unknown}: it holds no state dict")
    try:
        found = spandrel.ModelLoader().load_from_state_dict(spandrel.canonicalize_state_dict(state))
    except (spandrel.UnsupportedModelError, RuntimeError, KeyError, ValueError, AttributeError, TypeError) as error:
        reason = shorten(str(error), 200, placeholder=" …")
        raise ValueError(f"{unknown}" + (f" ({reason})" if reason else "")) from error
    channels = found.input_channels, found.output_channels
    if found.purpose != "SR" or found.scale < 2 or channels != (3, 3):
        what = (
            f"{found.architecture.name}: {found.purpose}, {found.scale} times, {channels[0]} to {channels[1]} channels"
        )
        raise ValueError(f"{path} is no upscaler of RGB images ({what})")
    supported = {torch.float16: found.supports_half, torch.bfloat16: found.supports_bfloat16}
    if supported.get(dtype, False):
        found.to(dtype)
    return Upscaler(_Described(found), found.scale)
