import copy
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hybriddit.benchmark import measure as measuring
from hybriddit.benchmark import report as reports
from hybriddit.benchmark import run as running
from hybriddit.benchmark.circular import circular_attention, circular_block_mask, circular_pairs
from hybriddit.benchmark.layer import SDPA, device_variants, input_bytes, layer_sides, layer_work
from hybriddit.benchmark.measure import Limits, Outcome, Rates, Side, Work, measure, peak_bytes, sample
from hybriddit.benchmark.shapes import PIXELS_PER_TOKEN, SHAPES, Shape
from hybriddit.cli import main

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = Shape(heads=2, head_dim=8, text=3, text_first=True, model="none", prompt=0, guided=False)
QUICK = [
    "--shapes",
    "sit-xl",
    "--dtype",
    "float32",
    "--repeats",
    "2",
    "--quiet",
    "--variants",
    "hybrid",
    "window",
    "linear",
    "dense",
]


def run(folder, *arguments):
    return main(["benchmark", *QUICK, "--part", "attention", "--sizes", "32", "64", "--out", str(folder), *arguments])


@pytest.fixture(scope="module", autouse=True)
def small_rates():
    """A real run copies and multiplies for seconds. And one thread, as in the tests, for it is part of the results."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        rates = measuring.measure_rates(CPU, torch.float32, copy_bytes=2**22, matrix=256)
        patch.setattr(running, "_rates", lambda device, dtype: rates)
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "new" / "folder"
    assert run(folder) == 0
    return folder


@pytest.fixture
def report(measured):
    return reports.read(measured / "benchmark.json")


def test_a_run_writes_json_table_and_plot(measured, report):
    names = ["benchmark.json", "benchmark.md"] + (["benchmark.png"] if importlib.util.find_spec("matplotlib") else [])
    assert sorted(path.name for path in measured.iterdir()) == names
    assert report["complete"] and report["machine"]["versions"]["torch"]
    cases = {(c["px"], c["variant"], c["direction"]): c for c in report["cases"]}
    directions = ("forward", "backward", "forward + backward")
    assert set(cases) == {
        (px, v, d) for px in (32, 64) for v in ("hybrid", "window", "linear", "dense") for d in directions
    }
    for (px, variant, direction), case in cases.items():
        assert len(case["seconds"]["samples"]) == 2 and case["peak_bytes"] > 0
        assert case["image_tokens"] == (px // 16) ** 2 and case["text_tokens"] == 0
        grid = (px // 16, px // 16)
        work = layer_work(variant, SHAPES["sit-xl"], grid, window=16, radius=8, element=4)[direction]
        assert (case["floor"]["bytes"], case["floor"]["flops"]) == work
    for px in (32, 64):
        whole, back = (cases[px, "dense", d]["seconds"]["samples"] for d in ("forward + backward", "backward"))
        assert all(a > b for a, b in zip(whole, back, strict=True)), "the backward pass is part of both"
    if "benchmark.png" in names:
        plot = (measured / "benchmark.png").read_bytes()
        assert plot.startswith(b"\x89PNG") and plot.endswith(b"IEND\xaeB`\x82")
    text = (measured / "benchmark.md").read_text()
    assert report["command"] in text and "hybriddit benchmark --part attention --shapes sit-xl --sizes 32 64" in text
    row = next(line for line in text.splitlines() if line.startswith("| 64 | 16 | hybrid"))
    case, dense = cases[64, "hybrid", "forward"], cases[64, "dense", "forward"]
    ratio = dense["seconds"]["median"] / case["seconds"]["median"]
    assert f"| {ratio:.2f} |" in row


def test_the_recorded_command_measures_the_same(report, tmp_path):
    words = report["command"].split()[1:]
    assert main([*words, "--quiet", "--out", str(tmp_path)]) == 0
    again = reports.read(tmp_path / "benchmark.json")
    assert again["settings"] == report["settings"] and again["command"] == report["command"]
    assert [running._identity(case) for case in again["cases"]] == [running._identity(c) for c in report["cases"]]


def test_json_goes_to_stdout(tmp_path, capsys):
    assert run(tmp_path, "--json", "--sizes", "32") == 0
    assert json.loads(capsys.readouterr().out) == reports.read(tmp_path / "benchmark.json")


# What is written was measured, here and now.


def invent_a_median(report):
    report["cases"][0]["seconds"]["median"] /= 2


def drop_the_samples(report):
    report["cases"][0]["seconds"]["samples"] = []


def invent_a_sample(report):
    report["cases"][0]["seconds"] = reports.summary([3600.0], 1)


def zero_seconds(report):
    report["cases"][0]["seconds"] = reports.summary([0.0], 1)


def nan_seconds(report):
    report["cases"][0]["seconds"] = reports.summary([math.nan], 1)


def no_calls(report):
    report["cases"][0]["seconds"]["calls_per_sample"] = 0


def add_a_speed(report):
    report["cases"][0]["images_per_second"] = 5.0


def add_a_speed_to_the_times(report):
    report["cases"][0]["seconds"]["best"] = 1e-6


def add_a_speed_to_the_report(report):
    report["speedup"] = 30.0


def tell_a_speed_and_why_there_is_none(report):
    report["cases"][0]["not_measured"] = "out of memory"


def give_no_reason(report):
    case = report["cases"][0]
    for key in ("seconds", "peak_bytes", "floor"):
        del case[key]
    case["not_measured"] = ""


def lower_the_floor(report):
    report["cases"][0]["floor"]["seconds"] /= 2


def measure_a_case_twice(report):
    report["cases"].append(copy.deepcopy(report["cases"][0]))


def forget_the_device(report):
    del report["machine"]


def invent_a_variant(report):
    report["cases"][0]["variant"] = "magic"


TAMPERINGS = [
    invent_a_median,
    drop_the_samples,
    invent_a_sample,
    zero_seconds,
    nan_seconds,
    no_calls,
    add_a_speed,
    add_a_speed_to_the_times,
    add_a_speed_to_the_report,
    tell_a_speed_and_why_there_is_none,
    give_no_reason,
    lower_the_floor,
    measure_a_case_twice,
    forget_the_device,
    invent_a_variant,
]


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda tamper: tamper.__name__)
def test_a_speed_that_was_not_measured_is_refused(tamper, report, tmp_path):
    reports.check(report)
    tamper(report)
    with pytest.raises(ValueError):
        reports.save(report, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "benchmark.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="is no benchmark result"):
        reports.read(tmp_path / "benchmark.json")


@pytest.mark.parametrize("key, value", [("name", "NVIDIA H100 80GB HBM3"), ("versions", {"torch": "1.0"})])
def test_results_of_another_machine_are_not_written_here(report, tmp_path, key, value):
    part = report["machine"] if key in report["machine"] else report["machine"]["device"]
    part[key] = value
    reports.check(report)
    with pytest.raises(ValueError, match="measure here"):
        reports.save(report, tmp_path)
    assert not list(tmp_path.iterdir())


def test_results_of_another_device_are_not_written_over(report, tmp_path, capsys):
    report["machine"]["device"]["name"] = "NVIDIA H100 80GB HBM3"
    before = reports.to_json(report)
    (tmp_path / "benchmark.json").write_text(before)
    assert run(tmp_path) == 1
    assert "holds results of another device (NVIDIA H100 80GB HBM3" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == [before]


def test_without_samples_there_is_no_summary():
    with pytest.raises(ValueError, match="no speed without a measurement"):
        reports.summary([], 1)
    times = reports.summary([4.0, 1.0, 2.0, 3.0, 5.0], 7)
    assert (times["median"], times["calls_per_sample"]) == (3.0, 7)
    assert times["p10"] == pytest.approx(1.4) and times["p90"] == pytest.approx(4.6)


def test_a_busy_machine_is_told(report):
    for load, said in ((0.1, False), (3.0, True)):
        report["load_average"] = load
        reports.check(report)
        assert ("busy with other programs" in reports.table(report)) == (
            said and report["machine"]["device"]["type"] == "cpu"
        )


# What stands between the clock and the figures.


class Clock:
    """Stands in for the time module: it moves when a side says that it took time, and a little at every look."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1e-9
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measuring, "time", clock)
    return clock


def sleeper(clock, name, seconds, log=None, **kwargs):
    def forward():
        clock.sleep(seconds)
        if log is not None:
            log.append(name)
        return torch.ones(2, requires_grad=torch.is_grad_enabled())

    return Side(name, forward, [], **kwargs)


def test_times_are_those_of_the_call(clock):
    log = []
    sides = [sleeper(clock, "one", 0.004, log), sleeper(clock, "two", 0.008, log)]
    outcomes = measure(sides, False, CPU, Limits(4, 10.0))
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
    sides = [sleeper(clock, "a", 0.99), sleeper(clock, "b", 2.5), sleeper(clock, "c", 0.1)]
    outcomes = measure(sides, False, CPU, Limits(20, 10.0))
    assert [len(outcomes[name].samples["forward"]) for name in ("a", "c")] == [8, 20]
    assert outcomes["b"] == "3 calls take longer than --max-seconds 10"


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
    times = sample(Side("slow", lambda: Slow.apply(x), [x]), True, 2, CPU)
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
    times = sample(Side("b", lambda: (clock.sleep(0.01), x * 2)[1], [x]), True, 3, gpu)
    assert times == {"backward": pytest.approx(0.0), "forward + backward": pytest.approx(0.01)}

    held = iter([100, 175])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(held))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(held))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    assert peak_bytes(lambda: None, gpu) == 75


def test_a_side_that_cannot_run_says_why_and_leaves_the_others(clock):
    def broken():
        raise RuntimeError("no kernel\nfor this")

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    sides = [Side("broken", broken, []), Side("full", full, []), sleeper(clock, "fine", 0.001)]
    sides.append(sleeper(clock, "slow", 0.05))
    sides.append(Side("one-way", broken, [], no_backward="no backward pass"))
    outcomes = measure(sides[:4], False, CPU, Limits(3, 0.2))
    assert outcomes["broken"] == "failed: RuntimeError: no kernel for this"
    assert outcomes["full"] == "out of memory"
    assert outcomes["slow"] == "3 calls take longer than --max-seconds 0.2"
    assert isinstance(outcomes["fine"], Outcome)
    assert measure(sides[4:], True, CPU, Limits(3, 0.2)) == {"one-way": "no backward pass"}


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


def test_memory_that_runs_out_between_samples_ends_one_side(clock):
    log = []

    def full():
        log.append("full")
        if len(log) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        clock.sleep(0.5)
        return torch.ones(1)

    outcomes = measure([Side("full", full, []), sleeper(clock, "fine", 0.5)], False, CPU, Limits(4, 10.0))
    assert outcomes["full"] == "out of memory" and len(log) == 5
    assert len(outcomes["fine"].samples["forward"]) == 4


def test_rates_are_of_this_device():
    rates = measuring.measure_rates(CPU, torch.float32, copy_bytes=2**24, matrix=256)
    assert 1e8 < rates.bytes_per_second < 1e13 and 1e8 < rates.flops_per_second < 1e14


def before(**kwargs):
    case = {"px": 512, "seconds": {"median": 1.0}, "floor": {"seconds": 0.1}, "peak_bytes": 1000}
    return {**case, **kwargs}


def test_what_would_take_too_long_or_too_much_is_not_tried():
    limits = Limits(10, 100.0)
    assert running._too_much(None, 1024, 19.9, 1, 0, 1e9, limits) is None
    assert "by its floor" in running._too_much(None, 1024, 20.1, 1, 0, 1e9, limits)
    assert "by its floor" in running._too_much(None, 1024, 6.0, 4, 0, 1e9, limits), "four steps a call"
    # 1 s at a floor of 0.1 s: five calls of 20 s are the limit
    assert running._too_much(before(), 1024, 1.99, 1, 0, 1e9, limits) is None
    assert "going by 512 px it would take longer" in running._too_much(before(), 1024, 2.01, 1, 0, 1e9, limits)
    assert running._too_much(before(), 1024, 0.1, 1, 500, 4501, limits) is None
    assert "would not fit" in running._too_much(before(), 1024, 0.1, 1, 500, 4499, limits)
    failed = before(not_measured="failed: RuntimeError: no kernel")
    assert running._too_much(failed, 1024, 0.1, 1, 0, 1e9, limits) == "failed: RuntimeError: no kernel"
    full = before(not_measured="out of memory")
    assert running._too_much(full, 1024, 0.1, 1, 0, 1e9, limits) == "512 px was too much already"


def test_sizes_beyond_the_limits_are_listed_and_not_run(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        running, "layer_sides", lambda shape, px, *rest: made.append(px) or layer_sides(shape, px, *rest)
    )
    monkeypatch.setattr(running, "free_bytes", lambda device: 2e6)
    assert run(tmp_path, "--sizes", "32", "8192", "16384") == 0
    assert set(made) == {32}
    report = reports.read(tmp_path / "benchmark.json")
    reasons = {case["not_measured"] for case in report["cases"] if case["px"] > 32}
    assert reasons == {"the inputs and an output do not fit into the 0.0 GiB that are free"}
    assert "| 16384 | 1048576 | hybrid | not measured: the inputs" in (tmp_path / "benchmark.md").read_text()


@pytest.mark.parametrize("finished", [0, 1])
def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch, capsys, finished):
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > 2 * finished:  # two directions a size
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(running, "measure", interrupted)
    out = tmp_path / "out"
    assert run(out) == 130
    if not finished:
        assert not out.exists()
        return
    report = reports.read(out / "benchmark.json")
    assert not report["complete"]
    assert all(("seconds" in case) == (case["px"] == 32) for case in report["cases"])
    assert {case["not_measured"] for case in report["cases"] if case["px"] == 64} == {"interrupted"}
    assert "Not complete" in (out / "benchmark.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sizes", "250"], "--sizes 250: an image side is a positive multiple of 16 px"),
        (["--sizes", "0"], "--sizes 0: an image side is a positive multiple"),
        (["--variants", "dense-flash"], "--variants dense-flash: needs an NVIDIA GPU"),
        (["--part", "transformer", "--variants", "circular"], "transformer: --variants circular has none of it"),
        (
            ["--layers", "29", "--shapes", "pixart-sigma"],
            "--layers 29: PixArt-alpha/PixArt-Sigma-XL-2-1024-MS has 1 to",
        ),
        (["--repeats", "0"], "--repeats must be above 0, not 0"),
        (["--max-seconds", "nan"], "--max-seconds must be above 0, not nan"),
        (["--window", "-1"], "--window must be above 0"),
        (["--out", "FILE/folder"], "Not a directory"),
        (["--out", "FILE"], "File exists"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    if "--layers" in arguments:
        pytest.importorskip("diffusers")
    if not torch.cuda.is_available() or "dense-flash" not in arguments:
        (tmp_path / "file").write_text("mine")
        arguments = [argument.replace("FILE", str(tmp_path / "file")) for argument in arguments]
        assert main(["benchmark", "--out", str(tmp_path / "out"), "--quiet", *arguments]) == 1
        [error] = capsys.readouterr().err.splitlines()
        assert error.startswith("hybriddit: ") and message in error
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["benchmark", "--help"])
    assert exit.value.code == 0 and "example: hybriddit benchmark" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--shapes", "--part", "--variants", "--dtype"])
def test_unknown_names_are_a_wrong_call(option, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["benchmark", option, "nonsense"])
    assert exit.value.code == 2 and "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_what_this_machine_lacks_is_left_out_and_said(monkeypatch):
    find_spec = running.importlib.util.find_spec
    monkeypatch.setattr(
        running.importlib.util, "find_spec", lambda name: None if name == "diffusers" else find_spec(name)
    )
    given = dict.fromkeys(("parts", "sizes", "variants", "dtype", "layers", "repeats", "max_seconds"))
    given |= {"shapes": ["pixart-sigma", "sit-xl"], "window": 16, "radius": 8, "backward": False, "compile": False}
    chosen = running.settings(CPU, **given)
    assert chosen.parts == ("attention",) and chosen.left_out == ("transformer: needs diffusers, not installed here",)
    with pytest.raises(ValueError, match="transformer: needs diffusers"):
        running.settings(CPU, **given | {"parts": ["transformer"]})
    monkeypatch.undo()
    chosen = running.settings(CPU, **given)
    assert chosen.parts == ("attention", "transformer") and not chosen.left_out


def test_the_attention_layer_is_measured_without_diffusers(tmp_path, monkeypatch):
    """As on a GPU machine that brings torch, triton and no more."""
    for name in ("diffusers", "accelerate", "transformers", "natten", "omegaconf"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(tmp_path, "--sizes", "32") == 0


# The accounting, against sums by hand.


def test_bytes_and_flops_by_hand():
    # a grid of 4 x 5 tokens, 3 of text, 2 heads x 8, 2 bytes a number: a token is 32 bytes
    def work(variant, direction, window=3):
        return layer_work(variant, SMALL, (4, 5), window, 2, 2)[direction]

    assert work("linear", "forward") == (4 * 20 * 32, 2 * 2 * 20 * 2 * 8 * 8)
    assert work("linear", "backward").bytes == 7 * 20 * 32
    assert work("linear", "forward + backward").bytes == 11 * 20 * 32
    # each image token sees 9 tokens of the window and 3 of text; a pair costs 8 multiply-adds twice, in 2 heads
    assert work("window", "forward") == (32 * (20 + 20 + 20 + 20 + 3 + 3), 20 * 12 * 8 * 2 * 2 * 2)
    assert work("window", "backward").bytes == 32 * (5 * 20 + 2 * 3 + 3 * 20 + 2 * 3)
    assert work("window", "forward", window=16).flops == 20 * 23 * 64, "a window ends with its grid"
    assert work("dense", "forward") == (4 * 23 * 32, 23 * 23 * 64)
    assert work("dense-flash", "backward") == (8 * 23 * 32, 2 * 23 * 23 * 64)
    assert work("dense", "forward + backward") == (12 * 23 * 32, 3 * 23 * 23 * 64)
    hybrid = 20 * 12 * 64 + 3 * 23 * 64 + 2 * 2 * 20 * 2 * 8 * 8
    assert work("hybrid", "forward") == (32 * (4 * 23 + 2 * 20), hybrid)
    assert work("hybrid", "backward").bytes == 32 * (8 * 23 + 4 * 20)
    # radius 2: the token, its 4 neighbours and the 4 diagonal ones, cut at the border
    near = sum(1 for a in range(20) for b in range(20) if (a // 5 - b // 5) ** 2 + (a % 5 - b % 5) ** 2 < 4)
    assert near == circular_pairs((4, 5), 2) and 20 * 4 < near < 20 * 9
    assert work("circular", "forward") == (4 * 23 * 32, (near + 20 * 3 + 3 * 23) * 64)


def test_shared_tensors_are_counted():
    sides = layer_sides(SMALL, 64, ["hybrid"], 3, 2, torch.float32, CPU, False)
    tensors = sides[0].inputs[:5]
    out = sides[0].forward()
    assert sum(x.nbytes for x in (*tensors, out)) == input_bytes(SMALL, 64, torch.float32, False)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", [SMALL, SMALL._replace(text_first=False), SMALL._replace(text=0)])
def test_every_side_of_a_layer_runs_and_has_gradients(shape, backward):
    names = [name for name in device_variants(CPU) if name != "circular"]
    sides = layer_sides(shape, 80, names, 3, 2, torch.float32, CPU, backward)
    image, whole = 25, 25 + shape.text
    for side in sides:
        out = side.forward()
        assert out.shape == (1, whole if side.name in ("hybrid", "dense") else image, 2, 8) and out.isfinite().all()
        if backward:
            grads = torch.autograd.grad(out.sum(), side.inputs)
            assert all(grad.abs().sum() > 0 for grad in grads), side.name


def test_a_window_that_covers_the_grid_is_dense():
    window, dense = layer_sides(SMALL, 64, ["window", "dense"], 4, 2, torch.float64, CPU, False)
    torch.testing.assert_close(window.forward(), dense.forward()[:, 3:])


# The competitor.


def seen(grid, text, text_first, radius):
    """[S, S] of bool, token by token."""
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    order = [None] * text + places if text_first else places + [None] * text
    return torch.tensor(
        [[a is None or b is None or (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 < radius**2 for b in order] for a in order]
    )


CIRCLES = [
    ((6, 6), 0, True, 2, 16),
    ((8, 16), 5, True, 3, 16),
    ((9, 7), 5, False, 3, 16),
    ((12, 32), 32, True, 4, 16),
    ((5, 48), 7, False, 1, 16),
    ((16, 16), 20, False, 40, 32),
    ((4, 16), 0, True, 15, 16),  # the ends of a row are exactly a radius apart
]


@pytest.mark.parametrize("grid, text, text_first, radius, block", CIRCLES)
def test_circular_attention_against_the_formula(grid, text, text_first, radius, block):
    from torch.nn.attention.flex_attention import flex_attention

    expected = seen(grid, text, text_first, radius)
    mask = circular_block_mask(grid, text, text_first, radius, CPU, block=block)
    total = len(expected)
    query, key, value = torch.randn(3, 1, total, 2, 8, dtype=torch.float64)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 8**0.5
    weights = scores.masked_fill(~expected, -math.inf).softmax(-1)
    out = circular_attention(query, key, value, mask, flex_attention)
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", weights, value))
    image = expected.clone()
    places = slice(text, None) if text_first else slice(None, total - text)
    assert circular_pairs(grid, radius) == image[places, places].sum()

    # the kernel goes by the lists of blocks: partial ones get the mask, full ones do not, others are left out
    count = math.ceil(total / block)
    padded = torch.zeros(count * block, count * block, dtype=torch.bool)
    padded[:total, :total] = expected
    blocks = padded.view(count, block, count, block)
    partial, full = (listed(*lists) for lists in (
        (mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)))  # fmt: skip
    assert not (partial & full).any()
    assert (blocks.any(3).any(1) <= (partial | full)).all(), "no pair is lost"
    assert (full <= blocks.all(3).all(1)).all(), "no pair is added"
    # and where a block is of whole rows or within one, no block is read for nothing
    if block % grid[1] == 0 or grid[1] % block == 0:
        if not text_first or text % block == 0:
            assert torch.equal(full, blocks.all(3).all(1))
        if text == 0:
            assert torch.equal(partial | full, blocks.any(3).any(1))


def listed(counts, indices):
    found = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, (count, places) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
        found[row, places[:count].long()] = True
    return found


# Whole models.


@pytest.fixture
def tiny(monkeypatch):
    """The three families at a width and depth that a test can run, under the names of the full-size ones."""
    pytest.importorskip("diffusers")
    import tiny_models

    from hybriddit.benchmark import model

    kinds = {"pixart-sigma": "pixart", "sd3.5-medium": "sd35-medium", "flux": "flux-dev"}
    for shape, kind in kinds.items():
        made = tiny_models.KINDS[kind]()
        values = {key: value for key, value in made.config.items() if not key.startswith("_")}
        monkeypatch.setitem(model.REPOSITORIES, SHAPES[shape].model, (type(made).__name__, values))
        small = SHAPES[shape]._replace(heads=2, head_dim=16, text=SHAPES[shape].text and 5, prompt=5)
        monkeypatch.setitem(SHAPES, shape, small)
    monkeypatch.setitem(SHAPES, "sit-xl", SHAPES["sit-xl"]._replace(heads=6, head_dim=64, model="SiT-S/2"))
    return model


@pytest.mark.parametrize(
    "name, dtype",
    [("pixart-sigma", "bfloat16"), ("sd3.5-medium", "float32"), ("flux", "bfloat16"), ("sit-xl", "bfloat16")],
)
def test_transformers_and_samplers_are_timed(tiny, name, dtype, tmp_path):
    arguments = ["--part", "transformer", "generation", "--shapes", name, "--sizes", "64", "--window", "3"]
    arguments += ["--layers", "2", "--backward", "--repeats", "1", "--quiet", "--out", str(tmp_path)]
    assert main(["benchmark", *arguments, "--dtype", dtype]) == 0
    report = reports.read(tmp_path / "benchmark.json")
    assert {case.get("not_measured") for case in report["cases"]} == {None}
    assert {(case["variant"], case["part"]) for case in report["cases"]} == {
        (variant, part) for variant in ("hybrid", "linear", "dense") for part in ("transformer", "generation")
    }
    of = 12 if name == "sit-xl" else 2
    assert all(case["layers"] == [2, of] for case in report["cases"])
    steps = [case for case in report["cases"] if case["direction"] == "step"]
    assert {case["batch"] for case in steps} == {1 if name == "flux" else 2} and len(steps) == 3
    assert f"2 of {of} blocks" in (tmp_path / "benchmark.md").read_text()


@pytest.mark.parametrize("name", ["pixart-sigma", "sd3.5-medium", "flux", "sit-xl"])
def test_variants_share_weights_and_their_flops_are_torchs(tiny, name):
    from torch.utils.flop_counter import FlopCounterMode

    shape = SHAPES[name]
    works = tiny.model_work("transformer", shape, 64, ("dense", "hybrid", "linear"), 16, 2, torch.float32)
    sides = tiny.model_sides(
        "transformer", shape, 64, ("dense", "hybrid", "linear"), 16, 2, False, torch.float32, CPU, True
    )
    for side in sides:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            out = side.forward()
        # the window of 16 covers the grid of 4 x 4; sums of the linear branch may be counted otherwise
        assert counter.get_total_flops() == pytest.approx(works[side.name]["forward"].flops, rel=0.02), side.name
        assert out.isfinite().all() and out.std() > 0
        assert (len(side.inputs) > 2) == (side.name != "dense")
    dense = tiny.random_model(*tiny.plan(shape, 64, 2)[:2], torch.float32, CPU)
    twin = tiny.variant_model(dense, "hybrid", 3)
    shared = {p.data_ptr() for p in dense.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert len(shared) == len(list(dense.parameters()))
    if name == "sit-xl":
        assert {block.attn.kind for block in twin.transformer_blocks} == {"hybrid"}
    else:
        assert type(dense) is not type(twin)
    weights = sum(p.numel() for p in dense.parameters()) * 4
    assert weights == works["dense"]["forward"].bytes == tiny.weight_bytes(shape, 64, 2, torch.float32)
    guided = tiny.model_work("generation", shape, 64, ("dense",), 16, 2, torch.float32)["dense"]["step"]
    assert guided.flops == works["dense"]["forward"].flops * (2 if shape.guided else 1)


def test_blocks_of_a_part_of_the_model():
    pytest.importorskip("diffusers")
    from hybriddit.benchmark.model import plan

    def blocks(name, layers):
        _, values, counts = plan(SHAPES[name], 1024, layers)
        return values["num_layers"], values.get("num_single_layers"), counts

    assert blocks("flux", None) == (19, 38, (57, 57))
    assert blocks("flux", 6) == (2, 4, (6, 57)) and blocks("flux", 1) == (1, 0, (1, 57))
    assert blocks("pixart-sigma", 2) == (2, None, (2, 28)) and blocks("sd3.5-large", None) == (38, None, (38, 38))
    assert plan(SHAPES["sd3.5-medium"], 1024, 3)[1]["dual_attention_layers"] == (0, 1, 2)
    assert plan(SHAPES["sd3"], 16384, 1)[1]["pos_embed_max_size"] == 16384 // PIXELS_PER_TOKEN


def test_the_shapes_are_those_of_the_models():
    pytest.importorskip("diffusers")
    from hybriddit.benchmark.model import plan

    for shape in SHAPES.values():
        model_class, values, _ = plan(shape, 1024, None)
        with torch.device("meta"):
            config = model_class.from_config({**values, "num_layers": 1}).config
        assert (shape.heads, shape.head_dim) == (config.num_attention_heads, config.attention_head_dim)
        assert shape.text in (0, shape.prompt)


@pytest.mark.parametrize("factor", [1.0, 1.02, 40.0])
def test_a_plot_keeps_its_labels_apart_and_inside(report, factor):
    pytest.importorskip("matplotlib")
    from matplotlib.text import Text

    from hybriddit.benchmark.plot import draw as figure_of

    for i, case in enumerate(case for case in report["cases"] if "seconds" in case):  # ends together, close, far apart
        case["seconds"] |= dict.fromkeys(("median", "p10", "p90"), 1e-3 * factor ** (i % 4))
    figure = figure_of(report)
    figure.draw_without_rendering()
    for axis in figure.axes:
        boxes = [Text.get_window_extent(text) for text in axis.texts]  # without the line that leads to the label
        assert len(boxes) == 4
        assert not [1 for i, one in enumerate(boxes) for other in boxes[i + 1 :] if one.overlaps(other)]
        assert all(figure.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
    report["cases"] = [case | {"not_measured": "no"} for case in report["cases"] if case.pop("seconds")]
    assert figure_of(report) is None


# What a GPU has to reach.


def target_report():
    """Rates of 1 TB/s and 1 PFLOP/s, and cases of FLUX that reach every target by a hair."""
    rates = Rates(1e12, 1e15)
    cases = []

    def add(variant, direction, side, seconds, bytes=0):
        case = {"part": "attention", "shape": "flux", "px": 16 * side, "image_tokens": side**2, "variant": variant}
        cases.append(case | {"direction": direction, "seconds": {"median": seconds}, "floor": {"bytes": bytes}})

    for side, dense in ((64, 0.96), (128, 2.01), (256, 8.01), (512, 30.1)):
        add("hybrid", "forward", side, 1.0)
        add("dense-flash", "forward", side, dense)
        add("dense-efficient", "forward", side, 2 * dense)
        add("linear", "forward", side, 1.0, 0.701e12 if side >= 128 else 0.1e12)
        add("linear", "backward", side, 1.0, 0.551e12 if side >= 128 else 0.1e12)
    return {"rates": rates._asdict(), "cases": cases}


def test_targets_are_told_apart(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_targets

    found = list(gpu_targets.attention_targets(target_report()))
    assert len(found) == 10 and all(ok for _, ok, _ in found)
    report = target_report()
    for case in report["cases"]:
        case["seconds"]["median"] *= 1 if case["variant"].startswith("dense") else 1.02
    found = [ok for _, ok, _ in gpu_targets.attention_targets(report)]
    assert found == [False] * 10
    for case in report["cases"]:
        del case["seconds"]
        case["not_measured"] = "out of memory"
    found = list(gpu_targets.attention_targets(report))
    assert len(found) == 10 and {(ok, why) for _, ok, why in found} == {(None, "out of memory")}

    steps = [
        ("hybrid", 1.04, 512),
        ("dense", 1.0, 512),
        ("hybrid", 1.06, 1024),
        ("dense", 1.0, 1024),
        ("hybrid", 9, 2048),
    ]
    cases = [
        {
            "part": "transformer",
            "shape": "flux",
            "variant": v,
            "direction": "forward",
            "px": px,
            "seconds": {"median": s},
        }
        for v, s, px in steps
    ]
    assert [ok for _, ok, _ in gpu_targets.step_targets({"cases": cases})] == [True, False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_check_says_that_there_is_no_gpu():
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([ROOT / "scripts/gpu_check.sh"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == [
        f"gpu_check: no GPU that torch of {sys.executable} can use: nothing was measured"
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_every_dense_kernel_and_the_circular_window_are_timed(tmp_path):
    arguments = ["--part", "attention", "--shapes", "flux", "--sizes", "512", "--repeats", "2", "--quiet"]
    assert main(["benchmark", *arguments, "--out", str(tmp_path)]) == 0
    report = reports.read(tmp_path / "benchmark.json")
    assert {case["variant"] for case in report["cases"]} == {"hybrid", "window", "linear", *SDPA, "circular"}
    assert all("seconds" in case for case in report["cases"] if case["direction"] == "forward")
