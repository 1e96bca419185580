"""The sweep of launch options. No GPU is needed: times are made up, and the kernels run in Triton's interpreter."""

import json
import os
import subprocess
import sys

import pytest
import torch
from small_benchmarks import SMALL

from hybriddit.attention import tuned
from hybriddit.benchmark import tune
from hybriddit.benchmark.tune import Job
from hybriddit.cli import main

CHOICES = {"linear": ({"BLOCK_N": (16, 32, 64), "num_warps": (4, 8)}, {"PROGRAMS_PER_SM": (2, 8)})}
DEFAULT = {"BLOCK_N": 32, "num_warps": 8, "PROGRAMS_PER_SM": 2}


class Kernel:
    """A kernel whose time and result follow from its options, and the job that sweeps it."""

    def __init__(self, name="sum", slowest=()):
        self.name, self.overrides, self.seen = name, {}, []
        self.slowest = dict(slowest)

    def options(self):
        return DEFAULT | self.overrides.get(self.name, {})

    def run(self):
        options = self.options()
        self.seen.append(options)
        if options["BLOCK_N"] == 64 and options["num_warps"] == 4:
            raise RuntimeError("out of resource: shared memory\nand more")
        wrong = options["BLOCK_N"] == 16 and options["num_warps"] == 4
        return [torch.full((4,), 1.5 if wrong else 1.0), None]

    def measure(self, call):
        call()
        options = self.options()
        return options["BLOCK_N"] / options["num_warps"] / options["PROGRAMS_PER_SM"] + self.slowest.get(self.name, 0)

    def job(self, width=8):
        expected = [torch.ones(4), None]
        shape = SMALL._replace(head_dim=width)
        return Job("linear", self.name, shape, 9, torch.bfloat16, self.overrides, DEFAULT, self.run, lambda: expected)


@pytest.fixture(autouse=True)
def few_choices(monkeypatch):
    monkeypatch.setattr(tune, "CHOICES", CHOICES)


def test_the_fastest_options_that_work_are_found():
    kernel = Kernel()
    row = tune.sweep(kernel.job(), kernel.measure)
    # 16 rows with 4 warps are as fast as 32 with 8, and wrong; 64 with 4 do not compile
    assert row["options"] == {"BLOCK_N": 16, "num_warps": 8, "PROGRAMS_PER_SM": 8}
    assert row["seconds"] == 0.25 and row["default_seconds"] == 2.0
    reasons = {(o["BLOCK_N"], o["num_warps"]): found for o, found in row["tried"] if isinstance(found, str)}
    assert reasons == {(16, 4): "wrong values", (64, 4): "RuntimeError: out of resource: shared memory and more"}
    assert kernel.overrides == {}, "a sweep leaves nothing behind"


def test_two_rounds_the_second_with_the_fastest_of_the_first():
    kernel = Kernel()
    tried = [options for options, _ in tune.sweep(kernel.job(), kernel.measure)["tried"]]
    assert tried[0] == DEFAULT and len(tried) == len({tuple(x.items()) for x in tried}) == 6 + 3
    assert [x for x in tried[6:] if x["PROGRAMS_PER_SM"] != 8] == []
    assert kernel.job().attempts == 1 + 6 + 3 * 2


def test_other_overrides_are_put_back():
    kernel = Kernel()
    kernel.overrides |= {"sum": {"num_warps": 4}, "output": {"num_warps": 2}}
    tune.sweep(kernel.job(), kernel.measure)
    assert kernel.overrides == {"sum": {"num_warps": 4}, "output": {"num_warps": 2}}


def test_nan_is_a_wrong_value():
    kernel = Kernel()
    row = tune.sweep(Job(**{**vars(kernel.job()), "run": lambda: [torch.full((4,), torch.nan), None]}), kernel.measure)
    assert row["options"] is None and {found for _, found in row["tried"]} == {"wrong values"}


def empty_table():
    machine = {"device": {"name": "A GPU", "capability": "9.0"}, "versions": {"torch": "2"}}
    return {"format": tuned.FORMAT, "date": "2026-11-26", "git": {"commit": "a"}, "machine": machine, "kernels": []}


def test_the_table_is_written_after_each_kernel_and_read_by_the_package(tmp_path, capsys):
    first, second, path = Kernel("sum"), Kernel("output"), tmp_path / "tuned.json"
    written = []

    def measure(call):
        written.append(path.exists())
        return (first if call == first.run else second).measure(call)

    tune.tune([first.job(), second.job()], empty_table(), path, measure)
    assert written == [False] * 7 + [True] * 7, "7 of the 9 that are tried work"
    table = json.loads(path.read_text())
    best = {"BLOCK_N": 16, "num_warps": 8, "PROGRAMS_PER_SM": 8}
    assert tuned.options_by_kernel(table) == {("linear", name, torch.bfloat16, 8): best for name in ("sum", "output")}
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "[1/2] linear sum, 2 x 8" and said[2].startswith("[2/2] linear output, 2 x 8, about 0 min left")
    assert said[1].endswith("with BLOCK_N 16, num_warps 8, PROGRAMS_PER_SM 8, 8.00 times as fast as now")


def test_a_kernel_s_row_is_replaced_and_the_others_stay(tmp_path):
    path, kernel = tmp_path / "tuned.json", Kernel()
    tune.tune([kernel.job(8), kernel.job(16)], empty_table(), path, kernel.measure, quiet=True)
    again = empty_table() | {"kernels": tune.kept_rows(path, empty_table())}
    slower = Kernel(slowest={"sum": 1.0})
    tune.tune([slower.job(16)], again, path, slower.measure, quiet=True)
    seconds = {row["width"]: row["seconds"] for row in json.loads(path.read_text())["kernels"]}
    assert seconds == {8: 0.25, 16: 1.25}
    other = empty_table() | {"git": {"commit": "b"}}
    with pytest.raises(ValueError, match="of another device, other versions or another commit: give a folder by --out"):
        tune.kept_rows(path, other)


def test_memory_that_does_not_suffice_leaves_the_kernel_out(tmp_path, capsys):
    def expected():
        raise torch.OutOfMemoryError("CUDA out of memory")

    kernel = Kernel()
    jobs = [Job(**{**vars(Kernel("output").job()), "expected": expected}), kernel.job()]
    tune.tune(jobs, empty_table(), tmp_path / "tuned.json", kernel.measure)
    assert "left out: out of memory" in capsys.readouterr().err
    assert [row["kernel"] for row in json.loads((tmp_path / "tuned.json").read_text())["kernels"]] == ["sum"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sizes", "512"], "does not take --sizes"),
        (["--part", "attention"], "does not take --part"),
        (["--max-seconds", "3"], "does not take --max-seconds"),
        (["--compile"], "does not take --compile"),
        ([], "--tune measures kernels on an NVIDIA GPU, and torch sees none here"),
    ],
)
def test_a_wrong_call_is_one_line(arguments, message, tmp_path, capsys):
    if not arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["benchmark", "--tune", "--out", str(tmp_path / "out"), *arguments]) == 1
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("hybriddit: ") and message in error
    assert not (tmp_path / "out").exists()


def test_two_shapes_of_one_width_are_refused():
    assert [layer.head_dim for layer in tune.layers_of(tune.SHAPES)] == [128, 64, 72]
    with pytest.raises(ValueError, match="--shapes sd3 sd3.5-large: both have heads of width 64; tune one of them"):
        tune.layers_of(["sd3", "flux", "sd3.5-large"])


def test_the_results_folder_is_named_as_by_the_gpu_check():
    assert tune.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


INTERPRETED = """
import json, sys, torch
from hybriddit.attention.linear import triton
from hybriddit.benchmark import tune
from hybriddit.models.family import AttentionShape

assert triton.INTERPRETED
tune.CHOICES = {"linear": ({"BLOCK_N": (16,), "PROGRAMS_PER_SM": (1,)}, {}), "window": ({"BLOCK_M": (16,)}, {})}
jobs, without_text = (
    tune.jobs([AttentionShape(1, 16, text, True, 16)], 3, torch.float32, torch.device("cpu"), "interpreter", 5, 5)
    for text in (3, 0)
)
rows = []
for job in jobs:
    calls = []
    row = tune.sweep(job, lambda call: calls.append(call) or 1.0 / len(calls))
    rows.append([row["part"], row["kernel"], row["text_tokens"], [found for _, found in row["tried"]]])
print(json.dumps([rows, [job.kernel for job in without_text]]))
"""


def test_every_kernel_of_the_layers_is_swept():
    """Called with the arguments of its pass, and compared with plain torch: any mistake would be the reason of a row."""
    interpreter = pytest.importorskip("attention.interpreter", reason="triton is not installed")
    if reason := interpreter.refusal():
        pytest.skip(reason)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, without_text = json.loads(done.stdout)
    linear = [["linear", name, 0] for name in ("sum", "output", "output_backward", "state_backward")]
    window = [["window", name, 3] for name in ("forward", "query_gradient", "key_gradient", "text_gradient")]
    assert [row[:3] for row in rows] == [*linear, *window]
    assert without_text == [kernel for _, kernel, _ in (*linear, *window[:-1])]
    failed = [row for row in rows if any(isinstance(found, str) for found in row[3])]
    assert not failed and all(len(row[3]) == 2 for row in rows)
