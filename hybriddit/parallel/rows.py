"""The rows of an image that one of several processes holds, and what travels between them, by torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..attention.rows import Reach, RowShard


class Rows(RowShard):
    """This process's rows of an image of `height` rows that the processes of a group share, in the order of their ranks.

    Raises ValueError for more processes than rows.
    """

    def __init__(self, group: dist.ProcessGroup, height: int):
        self.group, self.height = group, height
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if height < self.size:
            raise ValueError(
                f"{self.size} processes cannot share an image of {height} rows of tokens: start at most {height}"
            )
        self.shares = shares_of(height, self.size)
        self.first, self.count = self.shares[self.rank]
        self.leads = self.rank == 0

    @torch.compiler.disable
    def total(self, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        works: list[dist.Work] = []
        flat = _Total.apply(self.group, works, torch.cat([x.flatten() for x in tensors]))

        def finish() -> tuple[Tensor, ...]:
            _wait(works)
            parts = flat.split([x.numel() for x in tensors])
            return tuple(part.view(x.shape) for part, x in zip(parts, tensors, strict=True))

        return finish

    @torch.compiler.disable
    def largest(self, x: Tensor) -> Tensor:
        x = x.detach().clone(memory_format=torch.contiguous_format)
        with talking():
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    @torch.compiler.disable
    def extended(self, images: Sequence[Tensor], reach: Reach) -> Callable[[], tuple[Tensor, ...]]:
        begun: list[_Exchange] = []
        outs = _Extended.apply(self, reach, begun, *images)

        def finish() -> tuple[Tensor, ...]:
            with torch.no_grad():  # the rows on their way are part of what autograd knows already
                begun[0].finish(Tensor.copy_)
            return outs

        return finish

    def gathered(self, image: Tensor) -> Tensor:
        """All rows of an image, from each process's own [B, count, ...]: [B, height, ...], on every process.

        Its gradient is what all processes hold alike: they go on to compute one and the same loss.
        """
        return _Gathered.apply(self, image)


def shared(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What all processes hold alike, such that its gradient is the sum of theirs."""
    return _Shared.apply(group, x)


def add_up(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the processes, without a gradient."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    with talking():
        dist.all_reduce(x, group=group)
    return x


def backends(group: dist.ProcessGroup) -> dict[str, str]:
    """The library by which tensors travel, such as "gloo", by the type of device that they are on."""
    return dict(pair.split(":") for pair in str(dist.get_backend_config(group)).split(","))


def gathered_numbers(numbers: Sequence[int], group: dist.ProcessGroup) -> list[list[int]]:
    """The numbers of every process, of 64 bits; each gives equally many."""
    device = "cpu" if "cpu" in backends(group) else "cuda"
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    with talking():
        dist.all_gather(found, own, group=group)
        return [x.tolist() for x in found]


def of_first(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensor of the first process, on the CPU; those of the others, of its shape and dtype, are written over."""
    sent = x if "cpu" in backends(group) else x.cuda()
    with talking():
        dist.broadcast(sent, dist.get_global_rank(group, 0), group=group)
        return sent.cpu()


class _Exchange(NamedTuple):
    """Tensors on their way: sent ones, and what arrives with the place that it is for."""

    works: list[dist.Work]
    sent: list[Tensor]
    arrivals: list[tuple[Tensor, Tensor]]

    def finish(self, put: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Wait, and put what has arrived in its place."""
        _wait(self.works)
        for arrived, place in self.arrivals:
            put(place, arrived)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, works, x):
        ctx.group, out = group, x.clone()
        with talking():
            works.append(dist.all_reduce(out, group=group, async_op=True))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, None, add_up(grad, ctx.group)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, x):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, add_up(grad, ctx.group)


class _Extended(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, reach, begun, *images):
        ctx.rows, ctx.reach = rows, reach
        begin, end = reach(rows.first, rows.count)
        outs = [image.new_empty(len(image), end - begin, *image.shape[2:]) for image in images]
        for image, out in zip(images, outs, strict=True):
            out[:, rows.first - begin : rows.first - begin + rows.count] = image
        gives = [(peer, image[:, part]) for peer, part in _asked(rows, reach, rows.first) for image in images]
        takes = [(peer, out[:, part]) for peer, part in _wanted(rows, reach, begin) for out in outs]
        begun.append(_exchange(rows, gives, takes))
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        rows, reach = ctx.rows, ctx.reach
        begin, _ = reach(rows.first, rows.count)
        own = slice(rows.first - begin, rows.first - begin + rows.count)
        outs = [grad[:, own].clone(memory_format=torch.contiguous_format) for grad in grads]
        gives = [(peer, grad[:, part]) for peer, part in _wanted(rows, reach, begin) for grad in grads]
        takes = [(peer, out[:, part]) for peer, part in _asked(rows, reach, rows.first) for out in outs]
        _exchange(rows, gives, takes).finish(Tensor.add_)
        return None, None, None, *outs


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, image):
        ctx.rows = rows
        return rows.extended([image], rows.whole)()[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, grad[:, ctx.rows.first : ctx.rows.first + ctx.rows.count]


def shares_of(height: int, size: int) -> list[tuple[int, int]]:
    """The (first, count) of the rows of each of `size` processes."""
    ends = [height * rank // size for rank in range(size + 1)]
    return [(first, end - first) for first, end in zip(ends[:-1], ends[1:], strict=True)]


def _wanted(rows: Rows, reach: Reach, origin: int) -> list[tuple[int, slice]]:
    """The rows that this process wants of each other, counted from the row `origin`."""
    own = rows.shares[rows.rank]
    return [(peer, _common(reach(*own), share, origin)) for peer, share in enumerate(rows.shares) if peer != rows.rank]


def _asked(rows: Rows, reach: Reach, origin: int) -> list[tuple[int, slice]]:
    """The rows of this process that each other wants, counted from the row `origin`."""
    own = rows.shares[rows.rank]
    return [(peer, _common(reach(*share), own, origin)) for peer, share in enumerate(rows.shares) if peer != rows.rank]


def _common(wanted: tuple[int, int], share: tuple[int, int], origin: int) -> slice:
    first, end = max(wanted[0], share[0]), min(wanted[1], share[0] + share[1])
    return slice(first - origin, max(first, end) - origin)


def _exchange(rows: Rows, gives: list[tuple[int, Tensor]], takes: list[tuple[int, Tensor]]) -> _Exchange:
    """Begin to send tensors to other processes, (rank, tensor), and to receive some of theirs, (rank, place)."""
    sent = [(peer, x.contiguous()) for peer, x in gives if x.numel()]
    arrivals = [(peer, torch.empty_like(x, memory_format=torch.contiguous_format), x) for peer, x in takes if x.numel()]
    ranks = dist.get_process_group_ranks(rows.group)
    operations = [dist.P2POp(dist.isend, x, ranks[peer], rows.group) for peer, x in sent]
    operations += [dist.P2POp(dist.irecv, x, ranks[peer], rows.group) for peer, x, _ in arrivals]
    with talking():
        works = dist.batch_isend_irecv(operations) if operations else []
    return _Exchange(works, [x for _, x in sent], [(arrived, place) for _, arrived, place in arrivals])


def _wait(works: list[dist.Work]) -> None:
    with talking():
        for work in works:
            work.wait()
    works.clear()


@contextmanager
def talking() -> Iterator[None]:
    """Raises ConnectionError, in one line, where other processes do not answer."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(
            f"rank {dist.get_rank()} lost the other processes, of which one has ended or hangs: {reason}"
        ) from error
