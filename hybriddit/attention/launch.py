"""What the launches of Triton kernels share. They take microseconds, so what does not change is worked out once."""

from __future__ import annotations

import contextlib
from functools import lru_cache

import torch
from torch import Tensor

INTERPRETED_SMS = 3
_HERE = contextlib.nullcontext()


def over(n: int, size: int) -> int:
    """n / size, rounded up; many times faster than Triton's function."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The least power of two of at least n; likewise."""
    return 1 << (n - 1).bit_length()


@lru_cache(maxsize=64)
def target_of(device: torch.device, interpreted: bool) -> int | str:
    """What `launch_options` calls a device: 10 * major + minor of its CUDA compute capability, "hip", "interpreter"."""
    if interpreted:
        return "interpreter"
    if torch.version.hip:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device, interpreted: bool) -> int:
    """How many a GPU has; the interpreter, which has no chip to fill, as many as there are several shares to add with."""
    return INTERPRETED_SMS if interpreted else torch.cuda.get_device_properties(device).multi_processor_count


def in_force(overrides: dict[str, dict], kernel: str) -> tuple:
    """A kernel's overrides, as part of the key by which its launches are kept."""
    return tuple(overrides[kernel].items()) if kernel in overrides else ()


def with_unit(*tensors: Tensor | None, largest: int | None = None) -> tuple[list[Tensor | None], int]:
    """The tensors with a contiguous last dimension, and the unit of their strides: 8 if it divides all others, else 1.

    Kernels are given strides in that unit: the compiler detects divisibility by 16 only, and would give up wide loads
    where the head width is 72. A stride of tokens (dimension 1) that is not below `largest` is made contiguous too.
    """
    made, unit = [], 8
    for x in tensors:
        if x is not None:
            strides = x.stride()
            if strides[-1] != 1 or (largest is not None and strides[1] >= largest):
                x = x.contiguous()
                strides = x.stride()
            if unit == 8 and (x.data_ptr() % 16 or any(stride % 8 for stride in strides[:-1])):
                unit = 1
        made.append(x)
    return made, unit


def strides_of(x: Tensor, unit: int) -> list[int]:
    """Strides in this unit, of all dimensions but the last."""
    return [stride // unit for stride in x.stride()[:-1]]


def on_device(x: Tensor):
    """A context in which Triton launches where x is: it launches on the current device, wherever the tensors are."""
    if x.device.type == "cpu" or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)
