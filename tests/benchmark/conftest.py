from contextlib import contextmanager

import pytest
import torch
from small_benchmarks import CPU, Clock, run

from hybriddit.attention import rates as measured_rates
from hybriddit.attention.rates import measure_rates
from hybriddit.benchmark import report as reports
from hybriddit.benchmark import run as running


@contextmanager
def small_rates():
    """A real run copies and multiplies for seconds. And one thread, as in the tests, for it is part of the results."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        rates = measure_rates(CPU, torch.float32, copy_bytes=2**22, matrix=256)
        patch.setattr(running, "_rates", lambda device, dtype: rates)
        yield


@pytest.fixture(scope="module", autouse=True)
def quick():
    with small_rates():
        yield


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """Folder of the results of one small run."""
    folder = tmp_path_factory.mktemp("results") / "new" / "folder"
    with small_rates():
        assert run(folder) == 0
    return folder


@pytest.fixture
def report(measured):
    return reports.read(measured / "benchmark.json")


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measured_rates, "time", clock)
    return clock
