"""How fast a device moves and multiplies numbers, measured: what the least time of a computation is reckoned by."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from .work import Work


class Rates(NamedTuple):
    """Measured rates of a device: bytes per second (read and written) of a copy, and FLOP/s of matrix products."""

    bytes_per_second: float
    flops_per_second: float

    def floor(self, work: Work) -> float:
        """The least seconds the work takes at these rates: by memory or by arithmetic, whichever is longer."""
        return max(work.bytes / self.bytes_per_second, work.flops / self.flops_per_second)


def measure_rates(
    device: torch.device, dtype: torch.dtype, copy_bytes: int, matrix: int, seconds: float = 2.0
) -> Rates:
    """Measure the fastest of up to 30 copies of `copy_bytes` bytes, and of up to 30 products of square matrices.

    matrix: the number of rows of the matrices. seconds: after the third, no new copy or product starts after this long.
    """
    one, other = (torch.ones(copy_bytes // 4, device=device) for _ in range(2))
    copy = fastest(partial(one.copy_, other), device, seconds)
    one, other = (torch.randn(matrix, matrix, device=device).to(dtype) for _ in range(2))
    product = fastest(partial(torch.matmul, one, other), device, seconds)
    return Rates(2 * copy_bytes / copy, 2 * matrix**3 / product)


def probe_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates within about a second, for an estimate."""
    gpu = device.type != "cpu"
    return measure_rates(device, dtype, 2**28 if gpu else 2**26, 4096 if gpu else 512, seconds=0.2)


def fastest(call: Callable[[], Any], device: torch.device, limit: float, least: int = 3) -> float:
    """Seconds of the fastest of `least` to 30 calls. limit: after `least`, no call starts this many seconds on."""
    stamp, seconds_between, wait = clock(device)
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < least or (len(samples) < 30 and time.perf_counter() - begin < limit):
        wait()
        before = stamp()
        call()
        after = stamp()
        wait()
        samples.append(seconds_between(before, after))
    return min(samples)


def clock(
    device: torch.device,
) -> tuple[Callable[[], Any], Callable[[Any, Any], float], Callable[[], None]]:
    """Three functions: mark a moment; seconds between two marks; wait for the device, before seconds are asked for."""
    if device.type == "cpu":
        return time.perf_counter, lambda start, end: end - start, lambda: None
    module = torch.get_device_module(device)

    def stamp() -> Any:
        event = module.Event(enable_timing=True)
        event.record()
        return event

    return stamp, lambda start, end: start.elapsed_time(end) / 1e3, module.synchronize
