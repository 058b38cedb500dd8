"""Tensors of these files are made where the kernels run, unless their call says where."""

import pytest
import torch
from interpreter import DEVICE


@pytest.fixture(autouse=True)
def tensors_where_the_kernels_run():
    with torch.device(DEVICE):
        yield
