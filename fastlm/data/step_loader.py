"""The batches of training steps, made one step ahead.

B batch, T context length.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from fastlm.data.loader import TrainLoader

Batches = list[tuple[Tensor, Tensor]]


class StepLoader:
    """A step's batches; while it runs, a thread gathers those of the next.

    A step does not wait for windows that must be read from a disk first, and on CUDA the copies to
    the device run on a stream of their own. What comes is the same either way: batches are a
    function of their sample numbers.
    """

    def __init__(self, loader: TrainLoader, *, ahead: bool = True):
        self.loader = loader
        self.waited = 0.0  # seconds that `batches` has taken
        self._thread = ThreadPoolExecutor(1, "fastlm-batches") if ahead else None
        self._next: tuple[Sequence[int], Future[tuple[Batches, torch.Event | None]]] | None = None
        # Made here, where the device is the process's own: a thread begins on the first.
        on_cuda = ahead and loader.device.type == "cuda"
        self._stream = torch.cuda.Stream(loader.device) if on_cuda else None

    def batches(self, firsts: Sequence[int], following: Sequence[int] = ()) -> Batches:
        """The batch of each sample number in `firsts`: (x, y), int64, (B, T) each, on the device.

        following: what the next call will ask for, unless the run takes another way then. Raises
        what gathering has raised, in the call that asks for the batch.
        """
        start = time.perf_counter()
        expected, self._next = self._next, None
        if expected is not None and expected[0] == firsts:
            batches, copied = expected[1].result()
            if copied is not None:
                stream = torch.cuda.current_stream(self.loader.device)
                stream.wait_event(copied)
                for tensor in (tensor for batch in batches for tensor in batch):
                    tensor.record_stream(stream)  # it lives in the other stream's memory
        else:
            batches = [self.loader.batch(first) for first in firsts]
        if self._thread is not None and following:
            self._next = following, self._thread.submit(self._gather, following)
        self.waited += time.perf_counter() - start
        return batches

    def _gather(self, firsts: Sequence[int]) -> tuple[Batches, torch.Event | None]:
        """In the thread."""
        for first in firsts:  # what no cache holds is then read at once, not window by window
            self.loader.will_need(first)
        if self._stream is None:
            return [self.loader.batch(first) for first in firsts], None
        with torch.cuda.stream(self._stream):  # and on its device
            batches = [self.loader.batch(first) for first in firsts]
            return batches, self._stream.record_event()
