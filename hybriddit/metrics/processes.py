"""One share of the work each, and the whole result everywhere: torch.distributed, where it is asked for."""

from __future__ import annotations

import torch
import torch.distributed as dist


def rank_and_size(distributed: bool) -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) where the work is not shared."""
    if not distributed:
        return 0, 1
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("distributed=True needs torch.distributed.init_process_group in every process first")
    return dist.get_rank(), dist.get_world_size()


def share(count: int, distributed: bool) -> range:
    """The rows of `count` that are this process's: one run of them, so that shares in order are the whole in order."""
    rank, size = rank_and_size(distributed)
    return range(count * rank // size, count * (rank + 1) // size)


def total(tensor: torch.Tensor, distributed: bool) -> torch.Tensor:
    """The sum over all processes, on each of them."""
    if not distributed:
        return tensor
    summed = tensor.to(_device(), copy=True)
    dist.all_reduce(summed)
    return summed.to(tensor.device)


def gather(rows: torch.Tensor, count: int, distributed: bool) -> torch.Tensor:
    """All `count` rows, [count, ...], in order, from every process's share of them."""
    if not distributed:
        return rows
    _, size = rank_and_size(distributed)
    lengths = [count * (rank + 1) // size - count * rank // size for rank in range(size)]
    padded = rows.new_zeros(max(lengths), *rows.shape[1:], device=_device())  # all_gather wants one shape
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).to(rows.device)


def _device() -> torch.device:
    """What the processes can exchange: NCCL takes GPU tensors only, gloo not all of its operations for them."""
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
