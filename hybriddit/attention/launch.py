"""What the launches of Triton kernels share. They take microseconds, so what does not change is worked out once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
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


def laid_out(
    *tensors: Tensor | None, largest: int | None = None
) -> tuple[Sequence[Tensor | None], int, tuple[tuple[int, ...], ...]]:
    """The tensors with a contiguous last dimension, the unit of their strides (8 if it divides them all, else 1), and each
    one's strides in that unit, of all dimensions but the last; three zeros for None.

    Kernels are given strides in that unit: the compiler detects divisibility by 16 only, and would give up wide loads
    where the head width is 72. A stride of tokens (dimension 1) that is not below `largest` is made contiguous too.
    """
    given = tuple([x if x is None else x.stride() for x in tensors])
    copied, unit, strides = _strides(given, largest)
    if copied:
        tensors = [x.contiguous() if number in copied else x for number, x in enumerate(tensors)]
        given = tuple([x if x is None else x.stride() for x in tensors])
        _, unit, strides = _strides(given, None)
    if unit == 8:
        for x in tensors:
            if x is not None and x.data_ptr() % 16:
                return tensors, 1, _strides(given, None, 1)[2]
    return tensors, unit, strides


@lru_cache(maxsize=512)
def _strides(
    given: tuple[tuple[int, ...] | None, ...], largest: int | None, unit: int = 8
) -> tuple[frozenset[int], int, tuple[tuple[int, ...], ...]]:
    """Which tensors of these strides have to be copied, the unit of at most `unit`, and the strides in it."""
    known = [(number, strides) for number, strides in enumerate(given) if strides is not None]
    copied = frozenset(
        number for number, strides in known if strides[-1] != 1 or (largest is not None and strides[1] >= largest)
    )
    if any(stride % unit for _, strides in known for stride in strides[:-1]):
        unit = 1
    in_unit = ((0, 0, 0) if strides is None else tuple(n // unit for n in strides[:-1]) for strides in given)
    return copied, unit, tuple(in_unit)


def on_device(x: Tensor):
    """A context in which Triton launches where x is: it launches on the current device, wherever the tensors are."""
    if x.device.type == "cpu" or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)
