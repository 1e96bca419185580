"""Choose and prepare the samples of each step. They depend on the seed and the step, not on the number of processes."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
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


def bucket_turn(counts: Sequence[int], step: int) -> tuple[int, int]:
    """Which bucket a step takes all its samples from, and how many steps before it took theirs from there.

    counts: images in each bucket. They share the steps in proportion.
    """
    for bucket in range(len(counts)):
        turns = range(step + 1)
        turn = bisect_left(turns, step, key=lambda turn, bucket=bucket: step_of_turn(counts, bucket, turn))
        if turn in turns and step_of_turn(counts, bucket, turn) == step:
            return bucket, turn
    raise AssertionError("every step is the turn of one bucket")


def step_of_turn(counts: Sequence[int], bucket: int, turn: int) -> int:
    """The step that is turn number `turn` of a bucket.

    Bucket b of K, with n images, takes its turns at the times (turn + (b + 1/2) / K) / n: buckets of one size alternate.
    Steps are the turns of all buckets in order, those of one time in the order of the buckets.
    """
    parts = 2 * len(counts)  # of the time between two turns of a bucket, to count in whole numbers
    time = parts * turn + 2 * bucket + 1
    until = ((time * count - (other >= bucket)) // counts[bucket] for other, count in enumerate(counts))
    return sum((times - 2 * other - 1) // parts + 1 for other, times in enumerate(until))


@lru_cache(maxsize=4)
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
