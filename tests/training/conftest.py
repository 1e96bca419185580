import pytest
import torch
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def alone():
    """One thread (the models are tiny), and a fresh accelerate, whose precision is fixed once a process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
