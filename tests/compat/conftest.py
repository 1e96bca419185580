import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Models this tiny spend their time waiting for threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
