"""Group norms of a VAE that sees an image in tiles: by statistics of the whole image, so that tiles fit together.

A group norm's mean and variance are of all places that it is given. Given a tile they are the tile's own, so that tiles of
a sky and of leaves are brought to the same contrast, and differ where they meet. Here they are those of crops from all over
the image, which go through the VAE as one batch first, and all tiles share them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models.wrapping import with_forward

CROPS = 6  # along each side of the image
SHARE, LEAST = 4, 8  # how many of them are a tile's side, but for tiles of less than SHARE times LEAST latents


def crop_places(size: tuple[int, int], tile: int, unit: int = 1) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """(top, left) of CROPS x CROPS crops, evenly over an image of this size, (rows, columns), and the size of each.

    tile: a tile's side. unit: what all these are counted in, of which a latent has so many. Where crops are more than a part
    SHARE of a tile's side, there are fewer, which together are about as large.
    """
    side = max(tile // SHARE, min(tile, LEAST * unit))
    count = max(2, CROPS * (tile // SHARE) // side)
    crop = tuple(min(side, length) for length in size)
    tops, lefts = (
        [round(i * (length - own) / (count - 1)) for i in range(count)] for length, own in zip(size, crop, strict=True)
    )
    return [(top, left) for top in tops for left in lefts], crop


@contextlib.contextmanager
def norms_of_crops(vae: nn.Module, part: nn.Module, run: Callable[[], Any]) -> Iterator[None]:
    """Within the block, the group norms of a part of a VAE, its encoder or decoder, have the statistics of run's batch.

    run: gives crops to the VAE, as one batch. Of weights that are not in memory (sequential offloading) the norms stay as
    they are, each tile's own.
    """
    norms = [module for module in part.modules() if isinstance(module, nn.GroupNorm)]
    if any(norm.weight.is_meta for norm in norms):
        yield
        return
    found: dict[nn.GroupNorm, tuple[torch.Tensor, torch.Tensor]] = {}

    def of_batch(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        found[norm] = _statistics(x, norm.num_groups)
        return _normalized(norm, *found[norm], x)

    slicing, vae.use_slicing = vae.use_slicing, False  # which takes a batch apart
    try:
        with contextlib.ExitStack() as within:
            for norm in norms:
                within.enter_context(with_forward(norm, partial(of_batch, norm)))
            run()
    finally:
        vae.use_slicing = slicing
    with contextlib.ExitStack() as within:
        for norm, statistics in found.items():
            within.enter_context(with_forward(norm, partial(_normalized, norm, *statistics)))
        yield


def _statistics(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each group over a whole batch [B, C, ...]: [groups] each, in at least float32.

    Of crops [B, C, h, w], a quarter at each border is left out: the zeros that convolutions pad with reach into it.
    """
    if x.ndim == 4:
        (top, left), (height, width) = (length // 4 for length in x.shape[2:]), x.shape[2:]
        x = x[:, :, top : height - top, left : width - left]
    x = x.reshape(x.shape[0], groups, -1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean = x.mean((0, 2), dtype=dtype)
    square = torch.linalg.vector_norm(x, dim=(0, 2), dtype=dtype).square() / (x.shape[0] * x.shape[2])
    return mean, (square - mean.square()).clamp(min=0)


def _normalized(norm: nn.GroupNorm, mean: torch.Tensor, variance: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The group norm of [B, C, ...] by these statistics."""
    each = norm.num_channels // norm.num_groups
    mean, variance = (value.repeat_interleave(each) for value in (mean, variance))
    weight, bias = (value.to(mean) for value in (norm.weight, norm.bias))
    return F.batch_norm(x, mean, variance, weight, bias, eps=norm.eps)
