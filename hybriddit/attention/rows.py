"""What attention asks of an image whose rows lie with several processes, and which rows travel between them.

`hybriddit.parallel` has the processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Reach = Callable[[int, int], tuple[int, int]]


class RowShard(ABC):
    """The rows of an image that this process holds; other processes hold the rows above and below.

    What belongs to no row, such as text and weights, all processes hold alike. The methods have gradients, by this rule:
    a process's gradient of its own rows is whole, and its gradient of what all hold alike is a share, to be added up.
    All processes call the same methods in the same order.

    first, count: this process's rows. height: rows of the whole image. leads: whether this is the one process that
    counts what all hold alike.
    """

    first: int
    count: int
    height: int
    leads: bool

    @abstractmethod
    def total(self, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Begin to add up tensors of one dtype over the processes. Returns a function that waits for the sums."""

    @abstractmethod
    def largest(self, x: Tensor) -> Tensor:
        """The largest of each element over the processes, without gradients."""

    @abstractmethod
    def extended(self, images: Sequence[Tensor], reach: Reach) -> Callable[[], tuple[Tensor, ...]]:
        """Begin to fetch rows of others, and give them theirs. Returns a function that waits for the images.

        images: this process's rows [B, count, W, ...]. reach: (first, count) of a process's rows -> the (first row, end)
        that it wants, of which its own are part. Returned are those, [B, end - first, W, ...].
        """

    def whole(self, first: int, count: int) -> tuple[int, int]:
        """The `reach` that wants all rows."""
        return 0, self.height

    def near(self, margin: int) -> Reach:
        """The `reach` that wants `margin` rows above and below, as far as there are any."""
        return lambda first, count: (max(first - margin, 0), min(first + count + margin, self.height))

    def gathered(self, image: Tensor) -> Tensor:
        """All rows of an image, from each process's own [B, count, ...]: [B, height, ...], on every process."""
        return self.extended([image], self.whole)()[0]


def shares_of(height: int, size: int) -> list[tuple[int, int]]:
    """The (first, count) of the rows of each of `size` processes."""
    ends = [height * rank // size for rank in range(size + 1)]
    return [(first, end - first) for first, end in zip(ends[:-1], ends[1:], strict=True)]


class Parcels(NamedTuple):
    """What travels between processes at once: (rank, tensor) to send; (rank, tensor, place) of what arrives, and whither."""

    sent: list[tuple[int, Tensor]]
    arrivals: list[tuple[int, Tensor, Tensor]]


def parcels_of(gives: list[tuple[int, Tensor]], takes: list[tuple[int, Tensor]]) -> Parcels:
    """Parcels of the tensors (rank, tensor) that others get, and for the places (rank, place) of what they give."""
    sent = [(peer, x.contiguous()) for peer, x in gives if x.numel()]
    arrivals = [(peer, torch.empty_like(x, memory_format=torch.contiguous_format), x) for peer, x in takes if x.numel()]
    return Parcels(sent, arrivals)


class RankRows(RowShard):
    """The rows of the process `rank`, of an image of `height` rows that `size` processes share in the order of ranks.

    Raises ValueError for more processes than rows.
    """

    def __init__(self, height: int, size: int, rank: int):
        if height < size:
            raise ValueError(
                f"{size} processes cannot share an image of {height} rows of tokens: start at most {height}"
            )
        self.height, self.size, self.rank = height, size, rank
        self.shares = shares_of(height, size)
        self.first, self.count = self.shares[rank]
        self.leads = rank == 0

    def wanted(self, reach: Reach, origin: int) -> list[tuple[int, slice]]:
        """The rows that this process wants of each other, counted from the row `origin`."""
        own = reach(self.first, self.count)
        return [(peer, _common(own, share, origin)) for peer, share in enumerate(self.shares) if peer != self.rank]

    def asked(self, reach: Reach, origin: int) -> list[tuple[int, slice]]:
        """The rows of this process that each other wants, counted from the row `origin`."""
        own = self.first, self.count
        return [
            (peer, _common(reach(*share), own, origin)) for peer, share in enumerate(self.shares) if peer != self.rank
        ]

    def widened(
        self, images: Sequence[Tensor], reach: Reach
    ) -> tuple[list[Tensor], list[tuple[int, Tensor]], list[tuple[int, Tensor]]]:
        """The results of `extended` with this process's rows in place, and what it gives and takes, see `parcels_of`."""
        begin, end = reach(self.first, self.count)
        outs = [image.new_empty(len(image), end - begin, *image.shape[2:]) for image in images]
        for image, out in zip(images, outs, strict=True):
            out[:, self.first - begin : self.first - begin + self.count] = image
        gives = [(peer, image[:, part]) for peer, part in self.asked(reach, self.first) for image in images]
        takes = [(peer, out[:, part]) for peer, part in self.wanted(reach, begin) for out in outs]
        return outs, gives, takes


class SilentRows(RankRows):
    """The rows of one of several processes that are not there: it makes the tensors that travel, and sends none.

    For counting what a process holds; results are of the right shapes alone. Without gradients.
    """

    def total(self, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        flat = torch.cat([x.flatten() for x in tensors]).clone()

        def finish() -> tuple[Tensor, ...]:
            parts = flat.split([x.numel() for x in tensors])
            return tuple(part.view(x.shape) for part, x in zip(parts, tensors, strict=True))

        return finish

    def largest(self, x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    def extended(self, images: Sequence[Tensor], reach: Reach) -> Callable[[], tuple[Tensor, ...]]:
        outs, gives, takes = self.widened(images, reach)
        parcels = parcels_of(gives, takes)  # which are held as long as the function below

        def finish() -> tuple[Tensor, ...]:
            for _, arrived, place in parcels.arrivals:
                place.copy_(arrived)
            return tuple(outs)

        return finish


def _common(wanted: tuple[int, int], share: tuple[int, int], origin: int) -> slice:
    first, end = max(wanted[0], share[0]), min(wanted[1], share[0] + share[1])
    return slice(first - origin, max(first, end) - origin)
