"""Cost that is linear in image tokens: FLOPs, memory and time of whole tiny models at 32², 64² and 128² tokens."""

import time

import pytest
import torch
from tiny_models import make, make_inputs, perturb_hybrid, run
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hybriddit import HybridConfig, hybridize

SIDES = (32, 64, 128)
# every way through the processors: image alone, joint and dual attention, double and single blocks
CHEAP = {
    "pixart": {"layers": 1},
    "sd35-medium": {"layers": 1},
    "flux-dev": {"layers": 1, "single_layers": 1},
    "chroma": {},
    "qwen-image": {"layers": 1},
}


def hybrid(kind):
    return perturb_hybrid(hybridize(make(kind, dtype=torch.float32, **CHEAP[kind]), HybridConfig(window=7)))


def attention_flops(model, side):
    """FLOPs of the attention proper, counted as torch runs it: inside the layers' `hybrid`, or in dense SDPA."""
    counter = FlopCounterMode(display=False)
    with counter:
        run(model, make_inputs(model, (side, side)))
    counts = counter.get_flop_counts()
    layers = [sum(ops.values()) for name, ops in counts.items() if name.endswith(".hybrid")]
    dense = sum(flops for op, flops in counts["Global"].items() if "attention" in str(op))
    return sum(layers) or dense


@pytest.mark.parametrize("kind", CHEAP)
def test_attention_flops_are_linear(kind):
    model = hybrid(kind)
    small, middle, large = (attention_flops(model, side) for side in SIDES)
    assert 0 < middle < 4.4 * small and large < 4.4 * middle
    dense = attention_flops(make(kind, dtype=torch.float32, **CHEAP[kind]), 64)
    assert dense > 8 * middle


def allocations(model, side):
    """Bytes of the largest tensor ever made, and of the peak, in one forward pass; inside our operators too."""
    inputs = make_inputs(model, (side, side))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(model, inputs)
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    largest = held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak, largest = max(peak, held), max(largest, event.nbytes())
    return largest, peak


@pytest.mark.parametrize("kind", CHEAP)
def test_memory_is_linear_and_no_tensor_is_quadratic(kind):
    model = hybrid(kind)
    (_, small), (most, middle), (largest, large) = (allocations(model, side) for side in SIDES)
    assert middle < 4.8 * small and large < 4.8 * middle
    tokens = SIDES[-1] ** 2
    # a byte per pair would be a boolean mask of one head
    assert largest < tokens**2 / 4 and most < SIDES[1] ** 4 / 4


def test_the_memory_probe_sees_a_quadratic_tensor():
    """The dense model's explicit mask, as one would write a window naively."""
    model = make("pixart", dtype=torch.float32, layers=1)
    run(model, make_inputs(model, (32, 32)))

    class Masked(torch.nn.Module):
        dtype, config = model.dtype, model.config

        def forward(self, hidden_states, **inputs):
            return model(hidden_states, attention_mask=torch.ones(1, 1024, 1024), **inputs)

    largest, _ = allocations(Masked(), 32)
    assert largest >= 1024**2


@pytest.mark.parametrize("kind", CHEAP)
def test_time_is_roughly_linear(kind):
    """CPU time of a whole model, all threads together, so that a busy machine does not count."""
    model = hybrid(kind)

    def seconds(side):
        inputs = make_inputs(model, (side, side))
        run(model, inputs)
        times = []
        for _ in range(3):
            start = time.process_time()
            run(model, inputs)
            times.append(time.process_time() - start)
        return min(times)

    middle, large = seconds(64), seconds(128)
    assert large < 7 * middle, (middle, large)  # dense takes 12 to 16 times as long
