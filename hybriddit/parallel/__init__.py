"""Sequence parallelism for hybrid attention: the rows of one image spread over processes."""

from .launch import together
from .rows import gathered_numbers
from .shard import shard

__all__ = ["gathered_numbers", "shard", "together"]
