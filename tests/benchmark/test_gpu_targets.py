import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybriddit.benchmark.measure import Rates

ROOT = Path(__file__).parents[2]


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
