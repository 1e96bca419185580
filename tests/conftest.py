import gc
import os
import sys

import pytest
import torch

# a hub miss then fails at once instead of after half a minute of retries
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def imports_stay():
    """Collections of garbage, of which a run has one after each of its stages, leave out what is imported by now: it
    would take them 0.3 s each."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def alone():
    """One thread (the models are tiny), random numbers that do not depend on the tests before, and a fresh accelerate,
    whose precision is fixed once a process."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
