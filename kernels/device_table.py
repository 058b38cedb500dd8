"""A TensorTable on its device: what does not change once, what changes when it does.

Imports torch only. Nothing here waits for the device: every copy to it starts in pinned memory. In
a CUDA graph's capture the copies become nodes of the graph, from memory that stays as it is.
n tensors, in chunks of at most `chunk` elements: a program works on one chunk of one tensor.
"""

import torch
from torch import Tensor

from .tensor_table import FLOAT64, TensorTable

# The columns of `rows`.
NUMEL, FIRST_CHUNK, GROUP, GRADIENT_CODE, CLASS = range(5)
ROW_FIELDS = 5

# Pinned buffers that a mirror has ready for captures, in which none can be allocated. A capture
# takes one where the values differ from those of the captures before it.
_SPARES = 4

# What captured graphs read at every replay. Nothing says when a graph is gone: kept for good.
_captured: list[object] = []


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _pinned(values: Tensor) -> Tensor:
    return values if values.device.type != "cpu" else values.pin_memory()


class Mirror:
    """The copy on a device of int64 numbers that the host has, sent when they are other ones."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sent: Tensor | None = None  # what `copy` holds, or will when the stream gets there
        self.copy: Tensor | None = None
        self.spares: list[Tensor] = []
        self.fixed: list[Tensor] = []  # what captured copies start from: never written again

    def on_device(self, values: Tensor) -> Tensor:
        """`values`, int64 on the CPU and of the same shape at every call, on the device."""
        if _capturing(self.device):
            return self._capture(values)
        if self.sent is None or not torch.equal(self.sent, values):
            with torch.inference_mode(False):
                if self.copy is None:
                    self.copy = torch.empty(values.shape, dtype=torch.int64, device=self.device)
                self.sent = values.clone()
                # Pinned memory comes from PyTorch's cache, which gives it away again only when the
                # copy has been made.
                source = values if self.device.type == "cpu" else _pinned(values)
                self.copy.copy_(source, non_blocking=True)
        while self.device.type == "cuda" and len(self.spares) < _SPARES:
            self.spares.append(_pinned(torch.zeros_like(values)))
        return self.copy

    def _capture(self, values: Tensor) -> Tensor:
        # A copy of the graph's own: a replay must not change what the steps outside it read, and
        # theirs not what a replay reads.
        source = next((x for x in self.fixed if torch.equal(x, values)), None)
        if source is None:
            if not self.spares:
                raise RuntimeError(
                    "no pinned memory is left for this capture of a CUDA graph: run one step of "
                    "this optimizer outside of a capture first"
                )
            source = self.spares.pop().copy_(values)
            self.fixed.append(source)
            _captured.append(source)
        copy = torch.empty(values.shape, dtype=torch.int64, device=self.device)
        return copy.copy_(source, non_blocking=True)


class DeviceTable:
    """A TensorTable's rows and chunks on its device.

    A program finds its tensor in `chunk_rows`, 4 bytes a chunk (of 8192 elements, 0.002 % of what
    a step moves): one load, where a search in the first chunks of 2,000 tensors would be 11, each
    waiting for the one before.
    """

    def __init__(self, table: TensorTable, chunk: int):
        device, n = table.device, len(table.numel)
        self.table, self.chunk = table, chunk
        chunks = (table.numel + (chunk - 1)) // chunk
        codes = table.kinds[:, 0] * 8 + table.kinds[:, 1]
        # Rows of one combination of parameter and gradient stand together: each has its launch.
        order = torch.argsort(codes, stable=True)
        first = torch.zeros(n, dtype=torch.int64, device="cpu")
        first[order] = torch.cumsum(chunks[order], 0) - chunks[order]
        self.num_chunks = int(chunks.sum())
        self.launches: list[tuple[int, int, int, int]] = []  # codes, first chunk, chunks
        for code in sorted(set(codes.tolist())):
            rows = codes == code
            if count := int(chunks[rows].sum()):
                self.launches.append((code // 8, code % 8, int(first[rows].min()), count))
        self.has_float64 = bool((table.kinds[:, 1] == FLOAT64).any())
        rows = torch.stack([table.numel, first, table.groups, table.kinds[:, 1], table.classes], 1)
        chunk_rows = torch.repeat_interleave(order, chunks[order]).to(torch.int32)
        with torch.inference_mode(False):
            self.rows, self.chunk_rows = self._send(rows), self._send(chunk_rows)
            # Stands for the arguments that a launch has no use for.
            self.nothing = torch.empty(1, dtype=torch.float32, device=device)
        self.pointers, self.hyper = Mirror(device), Mirror(device)

    def _send(self, values: Tensor) -> Tensor:
        if self.table.device.type == "cpu":
            return values.clone()
        return _pinned(values).to(self.table.device, non_blocking=True)


def device_table(table: TensorTable, chunk: int) -> DeviceTable:
    """The table on its device, which is made at the first call and kept in the table's cache."""
    capturing = _capturing(table.device)
    if (found := table.cache.get("device")) is None:
        if capturing:
            raise RuntimeError(
                "the first step of an optimizer cannot be captured in a CUDA graph: run one "
                "outside of a capture first"
            )
        found = table.cache["device"] = DeviceTable(table, chunk)
    if capturing and not any(x is found for x in _captured):
        _captured.append(found)
    return found
