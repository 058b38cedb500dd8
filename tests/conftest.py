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


@pytest.fixture
def without_extras(monkeypatch):
    """In this process: no second of matmuls and no picture at the end of each run, and the heap of
    all tests stays on the pages it has."""
    monkeypatch.setattr("fastlm.run.summary.matmul_ceiling", lambda *_: 1e12)
    monkeypatch.setattr("fastlm.run.plot.LivePlotter.save", lambda self, path: None)
    monkeypatch.setattr("fastlm.train.back_heap_with_huge_pages", lambda: None)


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=str)
def everything(request) -> bool:
    """False: a sample of the kernels' configurations; True, among the exhaustive tests: all."""
    return request.param
