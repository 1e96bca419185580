"""The tiles of an image spread over processes: of a VAE, both ways, and of an upscaler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.wrapping import with_forward
from .rows import backends, gathered_numbers, talking


def shared_tiles(makes: Sequence[Callable[[], Tensor]], like: Tensor, group: dist.ProcessGroup) -> Iterator[Tensor]:
    """All tiles, on every process of a group, each of which makes every n-th.

    makes: a function for each tile; every process has equally many, for the same tiles. like: a tensor of the tiles' dtype
    and number of dimensions, on their device. With its group given, this is the `share` of `pipelines.cascade.repainting` and
    of `pipelines.memory.decode_in_strips`.
    """
    ranks, own = dist.get_process_group_ranks(group), dist.get_rank(group)
    travels = like.device if like.device.type in backends(group) else "cuda"
    for first in range(0, len(makes), len(ranks)):
        # all make their tile of this round before any waits for another's
        mine = makes[first + own]() if first + own < len(makes) else None
        shapes = gathered_numbers([0] * like.ndim if mine is None else mine.shape, group)
        for place, shape in enumerate(shapes[: len(makes) - first]):
            if place == own:
                tile = mine.to(travels, like.dtype).contiguous()
            else:
                tile = torch.empty(shape, dtype=like.dtype, device=travels)
            with talking():
                dist.broadcast(tile, ranks[place], group=group)
            yield tile.to(like.device)


def spread_tiles(vae: nn.Module, group: dist.ProcessGroup) -> None:
    """Let the processes of a group share the tiles of every later image that the VAE decodes in tiles, in place.

    vae: one of `family.TILED_VAES`. Each decodes some, and all get all of them and blend them: the image is the one that
    diffusers makes. Every process decodes the same latents.
    """
    vae.tiled_decode = partial(_decode, vae, vae.tiled_decode, group)


@torch.no_grad()
def _decode(vae: nn.Module, tiled_decode: Callable, group: dist.ProcessGroup, z: Tensor, **options: Any) -> Any:
    """diffusers' tiled_decode, called twice: to see which tiles it wants decoded, and to give it these."""
    tiles: list[Tensor] = []

    def note(tile: Tensor) -> Tensor:
        tiles.append(tile)
        return tile.new_zeros(len(tile), 1, 1, 1)

    with with_forward(vae.decoder, note):
        tiled_decode(z, **options)
    decoded = iter([*shared_tiles([partial(vae.decoder, tile) for tile in tiles], tiles[0], group)])
    with with_forward(vae.decoder, lambda tile: next(decoded)):
        return tiled_decode(z, **options)
