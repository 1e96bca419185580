"""Choose and prepare the samples of each step. They depend on the seed and the step, not on the number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator for the random numbers of one step, which are drawn for the whole batch.

    It depends on nothing else, so a resumed run and a run on another number of processes see the same samples.
    """
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def epoch_order(count: int, seed: int, start: int, length: int) -> list[int]:
    """Positions start, ..., start + length - 1 of an endless stream of shuffled epochs over `count` items."""
    positions = range(start, start + length)
    return [_permutation(count, seed, position // count)[position % count] for position in positions]


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=step_generator(seed, epoch)).tolist()


def batches(make: Callable[[int], list], steps: range, device: torch.device) -> Iterator[tuple[int, list]]:
    """(step, make(step)) for every step; for a GPU, the next batch is made while the step runs.

    On a CPU that thread would take processor time from the model: on two cores, training would be half as fast.
    """
    return (in_turn if device.type == "cpu" else one_ahead)(make, steps)


def in_turn(make: Callable[[int], list], steps: range) -> Iterator[tuple[int, list]]:
    """(step, make(step)) for every step."""
    return ((step, make(step)) for step in steps)


def one_ahead(make: Callable[[int], list], steps: range) -> Iterator[tuple[int, list]]:
    """Like `in_turn`, but a thread makes the next batch meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(make, steps[0]) if steps else None
        for step in steps:
            made = following.result()
            following = thread.submit(make, step + 1) if step + 1 in steps else None
            yield step, made


def loader_rate(make: Callable[[int], list], step: int, count: int, seconds: float = 0.2) -> float:
    """Data-loading rate in images/s, for batches of `count`; the first call, which opens files, is not timed."""
    make(step)
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        calls += 1
        make(step + calls)
    return calls * count / (time.perf_counter() - start)
