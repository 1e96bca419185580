"""The tiles of a VAE spread over processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.wrapping import with_forward
from .rows import talking


def spread_tiles(vae: nn.Module, group: dist.ProcessGroup) -> None:
    """Let the processes of a group share the tiles of every later image that the VAE decodes in tiles, in place.

    vae: one of `family.TILED_VAES`. Each decodes some, and all get all of them and blend them: the image is the one that diffusers makes. Every process
    decodes the same latents.
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
    decoded = iter(_decode_together(vae, vae.decoder, tiles, group))
    with with_forward(vae.decoder, lambda tile: next(decoded)):
        return tiled_decode(z, **options)


def decoding_together(vae: nn.Module, group: dist.ProcessGroup) -> Callable[[list[Tensor]], list[Tensor]]:
    """The `decode` of `pipelines.memory.decode_in_strips` by which a group's processes share each row of tiles.

    Every process calls it with the same latents, and gets all tiles.
    """
    return partial(_decode_together, vae, lambda tile: vae.decode(tile, return_dict=False)[0], group=group)


def _decode_together(
    vae: nn.Module, decode: Callable[[Tensor], Tensor], tiles: list[Tensor], group: dist.ProcessGroup
) -> list[Tensor]:
    """All tiles, of which this process decodes every n-th."""
    ranks, scale = dist.get_process_group_ranks(group), 2 ** (len(vae.config.block_out_channels) - 1)
    own, found = dist.get_rank(group), []
    for number, tile in enumerate(tiles):
        place = number % len(ranks)
        if place == 0:  # all begin with their tile of this round, before any waits for another's
            mine = decode(tiles[number + own]).contiguous() if number + own < len(tiles) else None
        batch, _, height, width = tile.shape
        out = mine if place == own else tile.new_empty(batch, vae.config.out_channels, height * scale, width * scale)
        with talking():
            dist.broadcast(out, ranks[place], group=group)
        found.append(out)
    return found
