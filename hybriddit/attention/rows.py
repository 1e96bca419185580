"""What attention asks of an image whose rows lie with several processes; `hybriddit.parallel` has the processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

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
