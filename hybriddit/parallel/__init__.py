"""Sequence parallelism for hybrid attention: the rows of one image spread over processes."""

from .launch import together
from .rows import gathered_numbers, of_first
from .shard import shard
from .tiles import decoding_together, spread_tiles

__all__ = ["decoding_together", "gathered_numbers", "of_first", "shard", "spread_tiles", "together"]
