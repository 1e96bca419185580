"""Divide work among the processes of torch.distributed; every process gets the whole result."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..machine import device_of_this_machine


@contextmanager
def process_group() -> Iterator[tuple[int, bool, torch.device]]:
    """Join torchrun's other processes, if any. Yields this one's rank, whether there are others, and its device."""
    gpu = torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, False, device_of_this_machine()
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield dist.get_rank(), True, device
    finally:
        dist.destroy_process_group()


def rank_and_size(distributed: bool) -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) if the work is not shared."""
    if not distributed:
        return 0, 1
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("distributed=True needs torch.distributed.init_process_group in every process first")
    return dist.get_rank(), dist.get_world_size()


def share(count: int, distributed: bool) -> range:
    """This process's share of `count` rows: consecutive rows, in the order of the ranks."""
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
    padded = rows.new_zeros(max(lengths), *rows.shape[1:], device=_device())  # all_gather needs equal shapes
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).to(rows.device)


def _device() -> torch.device:
    """Where tensors must be to be exchanged: NCCL takes GPU tensors only, gloo CPU tensors for all operations."""
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
