"""Interleaved timing and peak memory of calls on one device; returns measured values only.

The cases to compare are called in turns in one process: if the processor slows down, it slows all of them.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention.rates import clock
from ..machine import device_details, versions

PACKAGES = ("hybriddit", "torch", "triton", "natten", "diffusers")
MIN_REPEATS = 3
# a sample lasts about this long: a GPU's clock and queue need more than one short kernel
SAMPLE_SECONDS = {"cuda": 5e-3, "cpu": 2e-3}
MAX_CALLS = 200  # the most calls in one sample
SHORT_SECONDS = 0.1  # for shorter calls the profiler's overhead distorts the time
OUT_OF_MEMORY = "out of memory"


@dataclass
class Case:
    """One of the computations to compare.

    name: its variant. forward: computes the output. inputs: the tensors that the backward pass gives gradients to.
    steps: sampler steps in one call; times are per step. no_backward: why there is no backward pass, None if there is.
    gradients: the output's gradients, by the output's shape; cases that are compared share one dictionary.
    """

    name: str
    forward: Callable[[], Tensor]
    inputs: list[Tensor]
    steps: int = 1
    no_backward: str | None = None
    gradients: dict[torch.Size, Tensor] = field(default_factory=dict, repr=False)


class Outcome(NamedTuple):
    """The measurements of one case.

    samples: seconds per call (or step), by direction. calls: how many calls a sample is the mean of. peak_bytes: the
    most memory that a call held beyond its inputs and weights.
    """

    samples: dict[str, list[float]]
    calls: int
    peak_bytes: int


class Limits(NamedTuple):
    """The most samples of each case, and the most seconds for all its calls, compiling not counted."""

    repeats: int
    max_seconds: float


def device_to_measure() -> torch.device:
    """This machine's NVIDIA or AMD GPU, else its CPU: nothing here measures Apple's GPUs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the device and software that results depend on."""
    return {
        "device": device_details(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
    }


def sample(case: Case, backward: bool, calls: int, device: torch.device) -> dict[str, float]:
    """Mean seconds per call of `calls` calls, by direction.

    backward False: "forward", without autograd, or "step" for a sampler. True: "backward" and "forward + backward" of
    the same calls.
    """
    stamp, seconds_between, wait = clock(device)
    wait()
    begin, backward_spans = stamp(), []
    for _ in range(calls):
        if backward:
            out = case.forward()
            before = stamp()
            _gradients(case, out)
            backward_spans.append((before, stamp()))
            del out
        else:
            with torch.no_grad():
                case.forward()
    end = stamp()
    wait()
    whole = seconds_between(begin, end) / calls / case.steps
    if not backward:
        return {"step" if case.steps > 1 else "forward": whole}
    alone = sum(seconds_between(*span) for span in backward_spans) / calls
    return {"backward": alone, "forward + backward": whole}


def _gradients(case: Case, out: Tensor) -> None:
    if out.shape not in case.gradients:
        case.gradients[out.shape] = torch.randn_like(out)
    torch.autograd.grad(out, case.inputs, case.gradients[out.shape], allow_unused=True)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that a call holds at once, beyond those allocated before it, as torch's allocator counts them."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = top = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        top = max(top, held)
    return top


def measure(
    cases: Iterable[Case],
    backward: bool,
    device: torch.device,
    limits: Limits,
) -> dict[str, Outcome | str]:
    """Measure all cases in turns. Returns, by the case's name, its outcome or the reason why there is none.

    A case is called once unmeasured (it may compile), once to measure its memory and estimate its time, and then for
    `limits.repeats` samples, or fewer if those would take longer than `limits.max_seconds`.
    """
    outcomes: dict[str, Outcome | str] = {}
    running: list[tuple[Case, int, int]] = []
    for case in cases:
        if backward and case.no_backward:
            outcomes[case.name] = case.no_backward
            continue
        try:
            _call(case, backward)
            seconds = []

            def timed(case=case, seconds=seconds):
                seconds.extend(sample(case, backward, 1, device).values())

            peak = peak_bytes(timed, device)
        except torch.OutOfMemoryError:
            outcomes[case.name] = OUT_OF_MEMORY
        except Exception as error:  # the other cases are measured even if this one's kernel fails
            outcomes[case.name] = f"failed: {type(error).__name__}: {first_line(error)}"
        else:
            one = max(seconds) * case.steps
            if one < SHORT_SECONDS:  # measured again, without the profiler
                one = max(sample(case, backward, 1, device).values()) * case.steps
            affordable, least = int(limits.max_seconds / one) - 2, min(MIN_REPEATS, limits.repeats)
            if affordable < least:
                outcomes[case.name] = f"{2 + least} calls take longer than --max-seconds {limits.max_seconds:g}"
            else:
                calls = min(MAX_CALLS, max(1, math.ceil(SAMPLE_SECONDS[device.type] / one)))
                repeats = min(limits.repeats, max(affordable // calls, MIN_REPEATS))
                outcomes[case.name] = Outcome({}, calls, peak)
                running.append((case, calls, repeats))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for turn in range(max((repeats for _, _, repeats in running), default=0)):
        for case, calls, repeats in running:
            if turn < repeats and isinstance(outcomes[case.name], Outcome):
                try:
                    taken = sample(case, backward, calls, device)
                except torch.OutOfMemoryError:  # memory is fragmented by now
                    outcomes[case.name] = OUT_OF_MEMORY
                    continue
                for direction, seconds in taken.items():
                    outcomes[case.name].samples.setdefault(direction, []).append(seconds)
    return outcomes


def _call(case: Case, backward: bool) -> None:
    if backward:
        _gradients(case, case.forward())
    else:
        with torch.no_grad():
            case.forward()


def first_line(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if len(words) <= 160 else f"{words[:159]}…"
