"""The memory that a call takes on a CPU, as torch's allocator has it."""

import torch
from torch.profiler import ProfilerActivity, profile


def allocated(call):
    """The most bytes that the call holds, from the allocator's own events. It is called before, for what is kept."""
    with torch.no_grad():
        call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, torch.no_grad():
        call()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
