import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from hybriddit.attention.rates import Rates

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


def test_the_gpu_check_names_its_parts():
    done = subprocess.run([ROOT / "scripts/gpu_check.sh", "speed"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"gpu_check: no part speed: the parts are {PARTS}\n"


PARTS = "tests attention transformer generation training highres-passes highres-image highres-low-memory"
# stands in for Python with a GPU: logs what it is to run, and fails at what $BROKEN names
PRETENDED = """#!/usr/bin/env bash
case $1 in
    -c) [[ $2 != *get_device_name* ]] || echo a-gpu; exit 0 ;;
    *highres.py) name=$2; [[ $3 != --memory ]] || name=$2$4
        echo "--out $name" >> log; mkdir -p "${@: -1}"; touch "${@: -1}/$name.json" "${@: -1}/$2.png"
        [[ -z $BROKEN || $name != *$BROKEN* ]] ;;
    -m) [[ $2 == hybriddit && $3 == info ]] || echo "$*" >> log; [[ -z $BROKEN || $* != *$BROKEN* ]] ;;
esac
"""


def test_the_gpu_check_goes_on_where_it_stopped(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/gpu_check.sh", tmp_path / "scripts")
    python, log, results = tmp_path / "python", tmp_path / "log", tmp_path / "benchmarks/results/a-gpu"
    python.write_text(PRETENDED)
    python.chmod(0o755)

    def check(*arguments, broken=""):
        log.write_text("")
        environment = os.environ | {"PYTHON": str(python), "BROKEN": broken, "OUT": str(tmp_path / "out")}
        command = [tmp_path / "scripts/gpu_check.sh", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment | {"GIT_DIR": "none"})
        ran = ["tests" if "pytest" in line else line.split("--out ")[1] for line in log.read_text().splitlines()]
        return done.returncode, [Path(name).name for name in ran]

    assert check("tests", "training") == (0, ["tests", "training"])
    everything = ["tests", "a-gpu", "transformer", "generation", "training", "passes", "image", "image20"]
    left = ["a-gpu", "transformer", "generation", "passes", "image", "image20"]
    assert check(broken="generation") == (1, left), "two are done"
    assert check() == (0, ["generation"])
    assert check() == (0, [])
    assert check("highres", "--again", broken="20") == (1, everything[-3:])
    kept = sorted(path.name for path in (results / "highres").iterdir())
    assert kept == ["image.json", "image20.json", "passes.json"], "no images"
    assert check() == (0, ["image20"])
    assert check("--again") == (0, everything)
    assert check("tests", "--again", broken="pytest") == (1, ["tests"])
    assert check() == (0, ["tests"])
    parts = set(PARTS.split())
    assert {line.split()[0] for line in (results / "parts.txt").read_text().splitlines()} == parts
    assert (tmp_path / "out/a-gpu/parts.txt").read_text() == (results / "parts.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("words", [["passes", "--sizes", "1536"], ["image"], ["image", "--memory", "0.003"]])
def test_large_images_are_measured_with_a_small_model(words, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "scripts/highres.py", *words, "--tiny", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if words[0] == "passes":
        assert [row["rows"] for row in found["passes"]] == [None, 8]
        assert all(abs(row["planned_over_measured"] - 1) < 0.1 for row in found["passes"])
        return
    assert [stage["pixels"] for stage in found["stages"]] == [128, 256, 512]
    assert [stage["rows"] for stage in found["stages"]] == [None, None, 8 if "--memory" in words else None]
    with Image.open(tmp_path / "highres-512.png") as image:
        assert image.size == (512, 512)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_large_images_are_not_measured_without_a_gpu(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "scripts/highres.py", "passes", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "no GPU: nothing was measured" in done.stderr and not (tmp_path / "out").exists()
