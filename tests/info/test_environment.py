"""What `hybriddit info` says of this machine."""

import json
import re
import subprocess
import sys

import pytest
import torch

from hybriddit.attention.window import WindowCase, choose_backend
from hybriddit.cli import main
from hybriddit.info import environment, environment_text
from hybriddit.info.machine import first_call


def test_this_machine(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert found["device"]["type"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert all(found["window_attention"][name]["available"] for name in ("tiled", "dense"))
    triton = found["linear_attention"]["triton"]
    assert triton["available"] == (triton["note"] == "") and (triton["available"] or "GPU" in triton["note"])


def test_choices_are_those_of_the_dispatch(capsys):
    assert main(["info", "--json"]) == 0
    choices = json.loads(capsys.readouterr().out)["window_choices"]
    names = (
        "PixArt-Sigma",
        "Stable Diffusion 3",
        "FLUX",
        "Chroma",
        "Qwen-Image",
        "FLUX.2",
        "FLUX.2 klein",
        "Z-Image",
        "Ovis-Image",
        "FLUX.3 klein",
        "Krea 2",
        "LongCat-Image",
        "FIBO",
    )
    assert [(c["family"], c["pixels"]) for c in choices] == [
        (name, size) for name in names for size in (512, 1024, 4096)
    ]
    flux = choices[3 * names.index("FLUX") + 2]
    assert flux["grid"] == [256, 256] and (flux["heads"], flux["head_dim"], flux["text_length"]) == (24, 128, 512)
    for choice in choices:
        case = WindowCase(
            torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            torch.bfloat16 if torch.cuda.is_available() else torch.float32,
            tuple(choice["grid"]),
            choice["heads"],
            choice["head_dim"],
            (choice["window"],) * 2,
            text_length=choice["text_length"],
        )
        expected = choose_backend(case)
        assert (choice["backend"], choice["reason"]) == expected[:2]
        assert choice["passed_over"] == dict(expected.passed_over)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert (
        f"FLUX                 512 {choices[6]['backend']}, 1024 {choices[7]['backend']}, 4096 {flux['backend']}"
        in text
    )
    assert f"    {flux['backend']}: {flux['reason']}" in text


def test_a_gpu_takes_the_kernels_of_this_project(monkeypatch):
    """What a GPU machine is told, made up on this one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("hybriddit.attention.trial.triton_requirements", lambda: [])
    found = environment()
    assert {c["backend"] for c in found["window_choices"] if c["pixels"] > 512} == {"triton"}
    assert "FLUX                 512 triton, 1024 triton, 4096 triton" in environment_text(found)
    monkeypatch.setattr("hybriddit.attention.trial.triton_requirements", lambda: ["a C compiler"])
    monkeypatch.setattr("hybriddit.attention.window.flex.triton_requirements", lambda: [])
    monkeypatch.setitem(sys.modules, "natten", None)
    found = environment()
    assert {c["backend"] for c in found["window_choices"] if c["pixels"] > 512} == {"flex"}
    assert found["window_choices"][-1]["passed_over"] == {"triton": "it needs a C compiler"}


def test_a_mac_is_told_of_its_gpu_and_of_what_runs_there(monkeypatch):
    """Made up on this machine: Apple's GPUs run neither triton, natten nor FlexAttention."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M2 Pro")
    monkeypatch.setattr("hybriddit.info.machine._natten_has_kernels", lambda: True)
    found = environment()
    assert found["device"]["type"] == "mps" and found["device"]["name"] == "Apple M2 Pro"
    available = {name for name, backend in found["window_attention"].items() if backend["available"]}
    assert available == {"tiled", "dense"}
    assert {choice["backend"] for choice in found["window_choices"]} <= {"tiled", "dense"}
    assert not found["linear_attention"]["triton"]["available"]
    assert re.search(r"^device +1 x Apple M2 Pro$", environment_text(found), re.MULTILINE)


def test_the_first_call_is_timed(monkeypatch):
    """On this machine's CPU, by a clock that tells 5, 1, … seconds for a call."""
    clock = iter([0, 5, 10, 11, 12])
    monkeypatch.setattr("hybriddit.info.machine.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("torch.accelerator.synchronize", lambda: None)
    assert first_call(torch.device("cpu")) == {"seconds": 4, "note": ""}
    found = environment() | {"first_call": {"seconds": 4, "note": ""}}
    assert "first call    4 s more than the second: kernels are compiled" in environment_text(found)
    monkeypatch.setattr("hybriddit.attention.HybridAttention.forward", lambda *args: 1 / 0)
    failed = first_call(torch.device("cpu"))
    assert failed == {"seconds": None, "note": "ZeroDivisionError: division by zero"}
    assert "first call    ZeroDivisionError" in environment_text(found | {"first_call": failed})


@pytest.mark.parametrize("gpu, kernels, triton, compiler", [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 1, 1), (0, 0, 0, 0)])
def test_each_missing_backend_says_what_it_needs(gpu, kernels, triton, compiler, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("hybriddit.info.machine._natten_has_kernels", lambda: bool(kernels))
    monkeypatch.setattr("hybriddit.attention.trial.importlib.util.find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr("hybriddit.attention.trial.shutil.which", lambda name: "/bin/cc" if compiler else None)
    monkeypatch.delenv("CC", raising=False)
    found = environment()
    natten, flex, own = (found["window_attention"][name] for name in ("natten", "flex", "triton"))
    assert natten["available"] == bool(gpu and kernels)
    assert ("GPU" in natten["note"], "kernels" in natten["note"]) == (not gpu, not kernels)
    assert flex["available"] == (not gpu or bool(triton and compiler))
    assert own["available"] == bool(gpu and triton and compiler)
    if gpu:
        assert own == flex
        assert ("triton" in flex["note"], "C compiler" in flex["note"]) == (not triton, not compiler)
    assert f"natten      {'yes' if natten['available'] else 'no: needs'}" in environment_text(found)


def test_a_machine_without_diffusers_is_described_too():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('diffusers', 'accelerate', 'transformers')))\n"
        "from hybriddit.cli import main; sys.exit(main(['info', '--json']) or main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, end = json.JSONDecoder().raw_decode(done.stdout)
    assert found["window_choices"] == [] and found["window_attention"]["tiled"]["available"]
    assert "taken for a window" not in done.stdout[end:] and "linear attention" in done.stdout[end:]
