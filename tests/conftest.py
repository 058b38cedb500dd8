"""Fixtures that several test files use."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """For files whose tensors are small: a second thread would cost more than it does, and ten
    times as much where other programs keep it waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
