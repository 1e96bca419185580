"""What the tests of Triton's kernels share: the interpreter, which runs them where there is no GPU, and its limits."""

import os
import subprocess
import sys

import numpy
import pytest
import torch
from torch.utils import deterministic

triton = pytest.importorskip("triton", reason="triton is not installed")
from triton import language as tl  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402


def _loop(out, count):
    for i in range(count):
        tl.store(out + i, 1.0)


def refusal():
    """Why the interpreter cannot run the kernels here, in one line, or None.

    Triton 3.6 converts the bound of a loop, an array of one element, with int(); numpy from 2.4 on takes those of no
    dimension alone. Triton 3.9 squeezes it before.
    """
    out = torch.zeros(2)
    try:
        InterpretedFunction(_loop)[(1,)](out, 2)
    except Exception as error:  # the interpreter's own class of errors
        cause = error.__cause__ or error
        return f"the interpreter of Triton {triton.__version__} fails with numpy {numpy.__version__}: {cause}"
    assert out.tolist() == [1, 1]
    return None


@pytest.fixture(autouse=True)
def poisoned():
    """New tensors are full of NaN: what a kernel does not write is seen."""
    fill, on = deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(on)
    deterministic.fill_uninitialized_memory = fill


def run_in_interpreter(folder):
    """Run this folder's test_triton*.py in a process of its own: Triton decides as it reads a kernel whether to compile."""
    if reason := refusal():
        pytest.skip(reason)
    tests = sorted(path.name for path in folder.glob("test_triton*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "skipped" not in run.stdout, run.stdout + run.stderr
