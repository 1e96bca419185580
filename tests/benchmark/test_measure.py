import time

import pytest
import torch
from small_benchmarks import CPU

from hybriddit.attention.rates import Rates, measure_rates, probe_rates
from hybriddit.attention.work import Work
from hybriddit.benchmark import measure as measuring
from hybriddit.benchmark.measure import Case, Limits, Outcome, measure, peak_bytes, sample


def sleeper(clock, name, seconds, log=None, **kwargs):
    def forward():
        clock.sleep(seconds)
        if log is not None:
            log.append(name)
        return torch.ones(2, requires_grad=torch.is_grad_enabled())

    return Case(name, forward, [], **kwargs)


def test_times_are_those_of_the_call(clock):
    log = []
    cases = [sleeper(clock, "one", 0.004, log), sleeper(clock, "two", 0.008, log)]
    outcomes = measure(cases, False, CPU, Limits(4, 10.0))
    assert outcomes["one"].samples == {"forward": pytest.approx([0.004] * 4, rel=1e-3)}
    assert outcomes["two"].samples == {"forward": pytest.approx([0.008] * 4, rel=1e-3)}
    # to compile, for memory, and a first idea of the time; then in turns
    assert log == ["one"] * 3 + ["two"] * 3 + ["one", "two"] * 4


def test_the_clock_is_the_machines():
    begin = time.perf_counter()
    [seconds] = sample(sleeper(time, "real", 0.02), False, 1, CPU).values()
    assert 0.02 <= seconds <= time.perf_counter() - begin


def test_short_calls_are_repeated_within_a_sample(clock):
    log = []
    outcome = measure([sleeper(clock, "short", 0.0001, log)], False, CPU, Limits(2, 10.0))["short"]
    assert outcome.calls == 20 and len(log) == 3 + 2 * 20
    assert outcome.samples["forward"] == pytest.approx([0.0001] * 2, rel=1e-3)
    tiny = measure([sleeper(clock, "tiny", 1e-7)], False, CPU, Limits(1, 10.0))["tiny"]
    assert tiny.calls == measuring.MAX_CALLS


def test_slow_calls_are_repeated_less_often(clock):
    cases = [sleeper(clock, "a", 0.99), sleeper(clock, "b", 2.5), sleeper(clock, "c", 0.1)]
    outcomes = measure(cases, False, CPU, Limits(20, 10.0))
    assert [len(outcomes[name].samples["forward"]) for name in ("a", "c")] == [8, 20]
    assert outcomes["b"] == "5 calls take longer than --max-seconds 10"


def test_steps_of_a_sampler_share_its_time(clock):
    assert sample(sleeper(clock, "sampler", 0.02, steps=4), False, 3, CPU) == {"step": pytest.approx(0.005, rel=1e-3)}


def test_the_backward_pass_is_timed_apart(clock):
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            clock.sleep(0.005)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            clock.sleep(0.01)
            return grad

    x = torch.ones(3, requires_grad=True)
    times = sample(Case("slow", lambda: Slow.apply(x), [x]), True, 2, CPU)
    assert times == {"backward": pytest.approx(0.01, rel=1e-3), "forward + backward": pytest.approx(0.015, rel=1e-3)}


def test_on_a_gpu_the_times_are_those_of_its_events(clock, monkeypatch):
    """The CUDA calls are stood in for: an event is reached when the device is waited for."""
    waited = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock.now

        def elapsed_time(self, end):
            assert waited[-1] >= end.at, "read before the device was there"
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(clock.now))
    gpu = torch.device("cuda")
    assert sample(sleeper(clock, "a", 0.02), False, 3, gpu) == {"forward": pytest.approx(0.02)}
    x = torch.ones(2, requires_grad=True)
    times = sample(Case("b", lambda: (clock.sleep(0.01), x * 2)[1], [x]), True, 3, gpu)
    assert times == {"backward": pytest.approx(0.0), "forward + backward": pytest.approx(0.01)}

    held = iter([100, 175])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(held))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(held))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    assert peak_bytes(lambda: None, gpu) == 75


def test_a_case_that_cannot_run_says_why_and_leaves_the_others(clock):
    def broken():
        raise RuntimeError("no kernel\nfor this")

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    cases = [Case("broken", broken, []), Case("full", full, []), sleeper(clock, "fine", 0.001)]
    cases.append(sleeper(clock, "slow", 0.05))
    cases.append(Case("one-way", broken, [], no_backward="no backward pass"))
    outcomes = measure(cases[:4], False, CPU, Limits(3, 0.2))
    assert outcomes["broken"] == "failed: RuntimeError: no kernel for this"
    assert outcomes["full"] == "out of memory"
    assert outcomes["slow"] == "5 calls take longer than --max-seconds 0.2"
    assert isinstance(outcomes["fine"], Outcome)
    assert measure(cases[4:], True, CPU, Limits(3, 0.2)) == {"one-way": "no backward pass"}


def test_peak_memory_is_what_the_call_held_at_once():
    x = torch.ones(2**18)  # 1 MiB

    def three_at_once():
        one = x + 1
        two = one + 1
        del one
        three = two + 1
        return three + two  # two, three and the sum

    assert peak_bytes(three_at_once, CPU) == pytest.approx(3 * 2**20, rel=0.01)
    assert peak_bytes(lambda: x.mul_(2), CPU) < 2**12


def test_the_floor_is_the_slower_of_memory_and_arithmetic():
    rates = Rates(bytes_per_second=100.0, flops_per_second=1000.0)
    assert rates.floor(Work(200, 1)) == 2.0 and rates.floor(Work(1, 3000)) == 3.0


def test_memory_that_runs_out_between_samples_ends_one_case(clock):
    log = []

    def full():
        log.append("full")
        if len(log) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        clock.sleep(0.5)
        return torch.ones(1)

    outcomes = measure([Case("full", full, []), sleeper(clock, "fine", 0.5)], False, CPU, Limits(4, 10.0))
    assert outcomes["full"] == "out of memory" and len(log) == 5
    assert len(outcomes["fine"].samples["forward"]) == 4


def test_rates_by_hand(clock, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: clock.sleep(0.5))
    monkeypatch.setattr(torch, "matmul", lambda one, other: clock.sleep(0.25))
    rates = measure_rates(CPU, torch.float32, copy_bytes=4000, matrix=10)
    # 4000 bytes are read and 4000 written; each of 100 sums has 10 products and 10 additions
    assert rates == (pytest.approx(8000 / 0.5), pytest.approx(2000 / 0.25))


def test_rates_are_of_this_device():
    rates = measure_rates(CPU, torch.float32, copy_bytes=2**24, matrix=256)
    for found in (rates, probe_rates(CPU, torch.float32)):
        assert 1e8 < found.bytes_per_second < 1e13 and 1e8 < found.flops_per_second < 1e14
