"""What the tests of tests/gpu share. Each runs its body on the CPU as well, without what only CUDA
has, so that a mistake in it shows on any machine.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

NO_GPU = "needs an NVIDIA GPU"
on_cuda = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
)
DEVICES = ["cpu", on_cuda]
# With a compiler behind it the CPU's turn takes seconds.
COMPILED_DEVICES = [pytest.param("cpu", marks=pytest.mark.exhaustive), on_cuda]


# What only a CPU runs, and what reads tables that are the host's for every device.
_ON_THE_HOST = ("_cpp.py", "/collect.py")


class _NoHostReads(TorchDispatchMode):
    """Raises where a tensor's value is read on the host, which on a GPU would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            frame = sys._getframe()
            while frame is not None and not frame.f_code.co_filename.endswith(_ON_THE_HOST):
                frame = frame.f_back
            if frame is None:
                raise RuntimeError("called a synchronizing operation: a value read on the host")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def nothing_waits(device: torch.device) -> Iterator[None]:
    """An operation inside that waits for the device is an error (on CUDA torch's own check)."""
    if device.type == "cpu":
        with _NoHostReads():
            yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def recorded(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`work` captured in a CUDA graph, which the result replays; on a CPU `work` itself.

    The capture computes nothing, and writes nothing that `work` allocates.
    """
    if device.type == "cpu":
        return work
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@contextlib.contextmanager
def on_another_stream(device: torch.device) -> Iterator[None]:
    """On CUDA: a stream of its own, that starts behind the current one and ends before it."""
    if device.type == "cpu":
        yield
        return
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
