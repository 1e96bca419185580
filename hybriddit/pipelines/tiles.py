"""The tiles of a large image: made one after another, or shared by several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

# (functions that make a tile each; a tensor of the tiles' dtype and number of dimensions, on their device) -> the tiles
Share = Callable[[Sequence[Callable[[], Tensor]], Tensor], Iterator[Tensor]]


def one_by_one(makes: Sequence[Callable[[], Tensor]], like: Tensor) -> Iterator[Tensor]:
    """All tiles, each made when it is asked for. Several processes have `parallel.shared_tiles` in its place."""
    return (make() for make in makes)
