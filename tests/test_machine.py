"""What is noted of the machine that a result was made on."""

import platform
import subprocess
from importlib import metadata

import diffusers
import torch

import hybriddit
from hybriddit.benchmark.measure import device_to_measure
from hybriddit.machine import device_details, device_of_this_machine, git_state, gpu_name, running_versions, versions


def test_versions_are_the_installed_ones():
    found = versions(("hybriddit", "numpy", "torch", "no-such-package"))
    assert found == {
        "hybriddit": hybriddit.__version__,
        "numpy": metadata.version("numpy"),
        "torch": metadata.version("torch"),
        "no-such-package": None,
    }
    assert running_versions() == {
        "hybriddit": hybriddit.__version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
    }


def test_the_commit_and_what_differs_from_it(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert git_state(tmp_path) is None
    git("init")
    (tmp_path / "a.txt").write_text("a")
    git("add", "a.txt")
    git("commit", "-m", "a")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "changed": []}
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("changed")
    assert git_state(tmp_path)["changed"] == [" M a.txt", "?? b.txt"]


def test_the_device_of_a_cpu_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device = device_of_this_machine()
    assert device == torch.device("cpu") and gpu_name(device) is None and gpu_name() is None
    details = device_details(device)
    assert list(details) == ["type", "name", "capability"] and details["type"] == "cpu"
    assert platform.machine().replace("_", "-") in details["name"]


def test_the_device_of_a_gpu_machine(monkeypatch):
    """Made up on this one; without nvidia-smi there is no driver's version."""
    properties = type("Properties", (), {"name": "a GPU", "total_memory": 80, "major": 9, "minor": 0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("PATH", "")
    device = device_of_this_machine()
    assert device == torch.device("cuda") and gpu_name() == gpu_name(device) == "a GPU, cuda"
    details = device_details(device)
    assert details == {
        "type": "cuda",
        "name": "a GPU",
        "memory_bytes": 80,
        "capability": "9.0",
        "cuda": torch.version.cuda,
        "driver": None,
    }


def test_the_device_of_a_mac(monkeypatch):
    """Apple's GPU, made up on this machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M2 Pro")
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 80)
    device = device_of_this_machine()
    assert device == torch.device("mps") and gpu_name() == gpu_name(device) == "Apple M2 Pro"
    assert device_details(device) == {"type": "mps", "name": "Apple M2 Pro", "memory_bytes": 80}
    assert gpu_name(torch.device("cpu")) is None
    assert device_to_measure() == torch.device("cpu"), "the benchmark measures NVIDIA's and AMD's GPUs, and CPUs"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of_this_machine() == torch.device("cuda")
