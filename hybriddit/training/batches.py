"""Which samples a step has, and how its batch is made: the same for a seed and a step, however a run is divided."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, drawn for the whole batch.

    They depend on nothing else: a resumed run, and one on another number of processes, sees the same samples.
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

    On a CPU the batch's thread would take the cores from the model's: half its speed on two of them.
    """
    return (in_turn if device.type == "cpu" else one_ahead)(make, steps)


def in_turn(make: Callable[[int], list], steps: range) -> Iterator[tuple[int, list]]:
    """(step, make(step)) for every step."""
    return ((step, make(step)) for step in steps)


def one_ahead(make: Callable[[int], list], steps: range) -> Iterator[tuple[int, list]]:
    """As `in_turn`, with the next batch made in a thread meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(make, steps[0]) if steps else None
        for step in steps:
            made = following.result()
            following = thread.submit(make, step + 1) if step + 1 in steps else None
            yield step, made


def loader_rate(make: Callable[[int], list], step: int, count: int, seconds: float = 0.2) -> float:
    """Data-loading rate in images/s, of batches of `count`; the first call, which opens files, is not timed."""
    make(step)
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        calls += 1
        make(step + calls)
    return calls * count / (time.perf_counter() - start)
