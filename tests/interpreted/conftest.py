"""Tensors of these files are made where the kernels run, unless their call says where."""

import pytest
import torch
from interpreter import DEVICE, INTERPRETED


@pytest.fixture(autouse=True)
def tensors_where_the_kernels_run():
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    with torch.device(DEVICE):
        yield
