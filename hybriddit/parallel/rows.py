"""The rows of an image that one of several processes holds, and what travels between them, by torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..attention.rows import Parcels, RankRows, Reach, parcels_of


class Rows(RankRows):
    """This process's rows of an image of `height` rows that the processes of a group share, in the order of their ranks.

    Raises ValueError for more processes than rows.
    """

    def __init__(self, group: dist.ProcessGroup, height: int):
        super().__init__(height, dist.get_world_size(group), dist.get_rank(group))
        self.group = group

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
    """Tensors on their way."""

    works: list[dist.Work]
    parcels: Parcels

    def finish(self, put: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Wait, and put what has arrived in its place."""
        _wait(self.works)
        for _, arrived, place in self.parcels.arrivals:
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
        outs, gives, takes = rows.widened(images, reach)
        begun.append(_exchange(rows, gives, takes))
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        rows, reach = ctx.rows, ctx.reach
        begin, _ = reach(rows.first, rows.count)
        own = slice(rows.first - begin, rows.first - begin + rows.count)
        outs = [grad[:, own].clone(memory_format=torch.contiguous_format) for grad in grads]
        gives = [(peer, grad[:, part]) for peer, part in rows.wanted(reach, begin) for grad in grads]
        takes = [(peer, out[:, part]) for peer, part in rows.asked(reach, rows.first) for out in outs]
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


def _exchange(rows: Rows, gives: list[tuple[int, Tensor]], takes: list[tuple[int, Tensor]]) -> _Exchange:
    """Begin to send tensors to other processes, (rank, tensor), and to receive some of theirs, (rank, place)."""
    parcels, ranks = parcels_of(gives, takes), dist.get_process_group_ranks(rows.group)
    operations = [dist.P2POp(dist.isend, x, ranks[peer], rows.group) for peer, x in parcels.sent]
    operations += [dist.P2POp(dist.irecv, x, ranks[peer], rows.group) for peer, x, _ in parcels.arrivals]
    with talking():
        return _Exchange(dist.batch_isend_irecv(operations) if operations else [], parcels)


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
