"""Sequence parallelism for hybrid attention: the rows of one image spread over processes."""

from .launch import image_of_first, together
from .rows import gathered_numbers
from .shard import shard
from .tiles import shared_tiles, spread_tiles

__all__ = [
    "gathered_numbers",
    "image_of_first",
    "shard",
    "shared_tiles",
    "spread_tiles",
    "together",
]
