import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from small_benchmarks import CPU, run

from hybriddit.benchmark import report as reports
from hybriddit.benchmark import run as running
from hybriddit.benchmark.layer import SDPA, layer_cases, layer_work
from hybriddit.benchmark.measure import Limits, measure
from hybriddit.benchmark.subjects import find_subject, subjects
from hybriddit.cli import main


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
        work = layer_work(variant, find_subject("sit-xl").shape, grid, window=16, radius=8, element=4)[direction]
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
    assert [reports.identity(case) for case in again["cases"]] == [reports.identity(c) for c in report["cases"]]


def test_json_goes_to_stdout(tmp_path, capsys):
    assert run(tmp_path, "--json", "--sizes", "32") == 0
    assert json.loads(capsys.readouterr().out) == reports.read(tmp_path / "benchmark.json")


def test_results_of_another_device_are_not_written_over(report, tmp_path, capsys):
    report["machine"]["device"]["name"] = "NVIDIA H100 80GB HBM3"
    before = reports.to_json(report)
    (tmp_path / "benchmark.json").write_text(before)
    assert run(tmp_path) == 1
    assert "holds results of another device (NVIDIA H100 80GB HBM3" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == [before]


def before(**kwargs):
    case = {"px": 512, "seconds": {"median": 1.0}, "floor": {"seconds": 0.1}, "peak_bytes": 1000}
    return {**case, **kwargs}


def test_what_would_take_too_long_or_too_much_is_not_tried():
    limits = Limits(10, 100.0)
    assert running._too_much([], 1024, 19.9, 1, 0, 1e9, limits) is None
    assert "by its floor" in running._too_much([], 1024, 20.1, 1, 0, 1e9, limits)
    assert "by its floor" in running._too_much([], 1024, 6.0, 4, 0, 1e9, limits), "four steps a call"
    # 1 s at a floor of 0.1 s: five calls of 20 s are the limit, and a guess may be half as much above it
    assert running._too_much([before()], 1024, 2.99, 1, 0, 1e9, limits) is None
    assert "going by 512 px it would take longer" in running._too_much([before()], 1024, 3.01, 1, 0, 1e9, limits)
    assert running._too_much([before()], 1024, 0.1, 1, 500, 4501, limits) is None
    assert "would not fit" in running._too_much([before()], 1024, 0.1, 1, 500, 4499, limits)
    failed = before(not_measured="failed: RuntimeError: no kernel")
    assert running._too_much([failed], 1024, 0.1, 1, 0, 1e9, limits) == "failed: RuntimeError: no kernel"
    full = before(not_measured="out of memory")
    assert running._too_much([full], 1024, 0.1, 1, 0, 1e9, limits) == "512 px was too much already"


def timed(px, seconds, floor):
    return before(px=px, seconds={"median": seconds}, floor={"seconds": floor})


def test_a_guess_leaves_out_what_does_not_grow():
    # starting kernels takes 0.3 s, the work 1.5 times its floor
    small, large = timed(256, 0.315, 0.01), timed(512, 0.375, 0.05)
    assert running._guess([small], 0.05) == pytest.approx(1.575), "by one size, in proportion"
    assert running._guess([small, large], 0.2) == pytest.approx(0.6)
    # not flatter than the floor, and not steeper than in proportion, where times scatter
    assert running._guess([timed(256, 0.4, 0.01), large], 0.2) == pytest.approx(0.375 + 0.15)
    assert running._guess([timed(256, 0.01, 0.01), large], 0.2) == pytest.approx(1.5)
    unmeasured = {"px": 256, "not_measured": "out of memory"}
    assert running._guess([unmeasured, large], 0.2) == pytest.approx(1.5)


def test_a_4096_px_step_of_flux_is_tried():
    """Times of an H100, of which a sample and the calls before it make ten seconds."""
    hybrid = [timed(1024, 0.148, 0.0856), timed(2048, 0.519, 0.3153)]
    assert running._guess(hybrid, 1.2342) == pytest.approx(2.0, abs=0.01)
    assert running._too_much(hybrid, 4096, 1.2342, 1, 0, 1e11, Limits(20, 10.0)) is None
    dense = [timed(1024, 0.134, 0.0981), timed(2048, 0.703, 0.5516)]
    assert "by its floor" in running._too_much(dense, 4096, 5.1559, 1, 0, 1e11, Limits(20, 10.0))
    linear = [timed(1024, 0.127, 0.0827), timed(2048, 0.441, 0.3037)]
    assert running._guess(linear, 1.1877) == pytest.approx(1.684, rel=0.01), "as measured"


def test_smaller_sizes_are_found_in_order():
    row = {"part": "attention", "shape": "flux", "variant": "hybrid", "direction": "forward"}
    known = [row | {"px": px} for px in (2048, 512, 1024)] + [row | {"px": 256, "variant": "dense"}]
    assert [x["px"] for x in running._smaller(known, row | {"px": 2048})] == [512, 1024]


def test_sizes_beyond_the_limits_are_listed_and_not_run(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        running, "layer_cases", lambda shape, px, *rest: made.append(px) or layer_cases(shape, px, *rest)
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
        (["--layers", "0"], "--layers must be above 0, not 0"),
        (["--repeats", "0"], "--repeats must be above 0, not 0"),
        (["--max-seconds", "nan"], "--max-seconds must be above 0, not nan"),
        (["--window", "-1"], "--window must be above 0"),
        (["--out", "FILE/folder"], "file/folder cannot be made in it"),
        (["--out", "FILE"], "file is a file: give a folder"),
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


def test_unknown_shapes_are_named_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", "--shapes", "flux", "nonsense"])
    assert capsys.readouterr().err.splitlines()[-1] == (
        "hybriddit: error: argument --shapes: invalid choice: 'nonsense' "
        "(choose from pixart-sigma, sd3, sd3.5-medium, sd3.5-large, flux, chroma, qwen-image, flux2, flux2-klein, "
        "z-image, ovis-image, flux3, krea2, longcat-image, fibo, sit-xl)"
    )
    with pytest.raises(ValueError, match="invalid choice: 'nonsense'"):
        running.settings(CPU, **ASKED | {"shapes": ["nonsense"]})


def test_help_names_every_shape(capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", "--help"])
    assert ", ".join(subjects()) in " ".join(capsys.readouterr().out.split())


ASKED = dict.fromkeys(("parts", "sizes", "variants", "dtype", "layers", "repeats", "max_seconds"))
ASKED |= {"shapes": ["pixart-sigma", "sit-xl"], "window": 16, "radius": 8, "backward": False, "compile": False}


def test_what_cannot_be_measured_is_left_out_and_said():
    chosen = running.settings(CPU, **ASKED | {"variants": ["circular"]})
    assert chosen.parts == ("attention",) and chosen.layers is None
    assert chosen.left_out == ("transformer: --variants circular has none of it",)
    with pytest.raises(ValueError, match="transformer: --variants circular has none of it"):
        running.settings(CPU, **ASKED | {"variants": ["circular"], "parts": ["transformer"]})
    chosen = running.settings(CPU, **ASKED)
    assert chosen.parts == ("attention", "transformer") and not chosen.left_out


def test_the_attention_layer_is_measured_without_natten(tmp_path, monkeypatch):
    for name in ("natten", "omegaconf"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(tmp_path, "--sizes", "32") == 0


def test_without_diffusers_one_line_says_so():
    code = "import sys; sys.modules['diffusers'] = None; from hybriddit.cli import main; sys.exit(main(['benchmark']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    [error] = done.stderr.splitlines()
    assert error.startswith("hybriddit: ") and "diffusers" in error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_every_dense_kernel_and_the_circular_window_are_timed(tmp_path):
    arguments = ["--part", "attention", "--shapes", "flux", "--sizes", "512", "--repeats", "2", "--quiet"]
    assert main(["benchmark", *arguments, "--out", str(tmp_path)]) == 0
    report = reports.read(tmp_path / "benchmark.json")
    assert {case["variant"] for case in report["cases"]} == {"hybrid", "window", "linear", *SDPA, "circular"}
    assert all("seconds" in case for case in report["cases"] if case["direction"] == "forward")
