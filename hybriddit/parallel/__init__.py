"""Sequence parallelism for hybrid attention: the rows of one image spread over processes."""

from .shard import shard

__all__ = ["shard"]
