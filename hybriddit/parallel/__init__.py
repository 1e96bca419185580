"""Sequence parallelism for hybrid attention: the rows of one image spread over processes."""

from .launch import together
from .rows import gathered_numbers
from .shard import shard
from .tiles import decoding_together, spread_tiles

__all__ = ["decoding_together", "gathered_numbers", "shard", "spread_tiles", "together"]
