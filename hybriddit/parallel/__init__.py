"""Sequence parallelism for hybrid attention: the rows of one image spread over processes."""

from .launch import together
from .rows import gathered_numbers
from .shard import shard
from .tiles import spread_tiles

__all__ = ["gathered_numbers", "shard", "spread_tiles", "together"]
