"""A TensorTable on its device, and how the kernels of the optimizer find their way in it.

A program works on one chunk of one of the n tensors: CHUNK elements, fewer at a tensor's end. Where
a chunk is whole and its pointers are multiples of 16 bytes, every access is of 16 bytes.

Nothing waits for the device: copies to it start in pinned memory. In a CUDA graph's capture they
become nodes of the graph, and start in memory that is never written again. With TRITON_INTERPRET=1
all of it runs on CPU tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import collect
from .collect import TensorTable
from .configs import OPTIMIZER_CHUNK

ROCM = torch.version.hip is not None

CHUNK = tl.constexpr(OPTIMIZER_CHUNK)
# In memory, by the table's code; int16 halves are what SPLIT has in params and remainders.
ELEMENTS = (tl.float32, tl.bfloat16, tl.float16, tl.float64, tl.int16)
# The columns of TensorTable.pointers and of DeviceTable.rows, and how many there are.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, REMAINDER, STEP, POINTERS = (tl.constexpr(i) for i in range(7))
NUMEL, GROUP, FIRST_CHUNK, ROW_FIELDS = (tl.constexpr(i) for i in (0, 3, 4, 5))

# Pinned buffers that a mirror has ready for captures, in which none can be allocated. A capture
# takes one if the values differ from those of the captures before it.
_SPARES = 4

# What captured graphs read at every replay. Nothing says when a graph is gone: kept for good.
_captured: list[object] = []


@triton.jit
def find_chunk(rows, chunk_rows, first):
    """(row of chunk first + program_id(0), where in the row it starts, its number of elements)."""
    chunk = first + tl.program_id(0).to(tl.int64)
    row = tl.load(chunk_rows + chunk).to(tl.int64)
    start = (chunk - tl.load(rows + row * ROW_FIELDS + FIRST_CHUNK)) * CHUNK
    left = tl.load(rows + row * ROW_FIELDS + NUMEL) - start
    return row, start, tl.minimum(left, CHUNK).to(tl.int32)


@triton.jit
def pointer_to(address, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer that an int64 holds; ALIGNED promises that it is a multiple of 16."""
    pointer = address.to(tl.pointer_type(ELEMENT))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def load(pointer, at, size, FULL: tl.constexpr, STREAM: tl.constexpr = False):
    """STREAM, here and in store: nothing soon reads it again, caches may forget it first."""
    POLICY: tl.constexpr = "evict_first" if STREAM else ""
    if FULL:
        return tl.load(pointer + at, eviction_policy=POLICY)
    else:
        return tl.load(pointer + at, mask=at < size, other=0.0, eviction_policy=POLICY)


@triton.jit
def store(pointer, at, size, x, FULL: tl.constexpr, STREAM: tl.constexpr = False):
    x = x.to(pointer.dtype.element_ty)
    MODIFIER: tl.constexpr = ".cs" if STREAM else ""
    if FULL:
        tl.store(pointer + at, x, cache_modifier=MODIFIER)
    else:
        tl.store(pointer + at, x, mask=at < size, cache_modifier=MODIFIER)


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # the question is about the current device
        return torch.cuda.is_current_stream_capturing()


def _send(values: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on the device."""
    if device.type == "cpu":
        return values.clone()
    # PyTorch's cache of pinned memory reuses this only when the copy has been made.
    return values.pin_memory().to(device, non_blocking=True)


class Mirror:
    """The copy on a device of a CPU tensor, sent again when the values are other ones."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sent: Tensor | None = None  # the values of `copy`
        self.copy: Tensor | None = None
        self.spares: list[Tensor] = []
        self.fixed: list[Tensor] = []  # what captured copies start from: never written again

    def on_device(self, values: Tensor) -> Tensor:
        if _capturing(self.device):
            return self._capture(values)
        if self.sent is None or not torch.equal(self.sent, values):
            self.sent = values.clone(memory_format=torch.contiguous_format)
            self.copy = _send(self.sent, self.device)
        return self.copy

    def prepare_captures(self) -> None:
        """What a capture after this step will need."""
        if self.spares and self.spares[0].shape != self.sent.shape:
            self.spares.clear()
        if len(self.spares) == _SPARES or self.device.type == "cpu" or _capturing(self.device):
            return
        with torch.inference_mode(False):
            while len(self.spares) < _SPARES:
                self.spares.append(torch.zeros_like(self.sent).pin_memory())

    def _capture(self, values: Tensor) -> Tensor:
        # A copy of the graph's own: a replay must not change what the steps outside it read, and
        # theirs not what a replay reads.
        source = next((x for x in self.fixed if torch.equal(x, values)), None)
        if source is None:
            if not self.spares or self.spares[-1].shape != values.shape:
                raise RuntimeError(
                    "no pinned memory is left to capture a CUDA graph: run one step outside of it"
                )
            source = self.spares.pop().copy_(values)
            self.fixed.append(source)
            _captured.append(source)
        copy = torch.empty(values.shape, dtype=values.dtype, device=self.device)
        return copy.copy_(source, non_blocking=True)


class DeviceTable:
    """A TensorTable on its device, without the pointers' values.

    described: (n, 4) int64 on the CPU: numel, codes of parameter and gradient, group.
    rows: (n, ROW_FIELDS) int64, the same and each row's first chunk. chunk_rows: (num_chunks,)
    int32, each chunk's row: one load, where a search in the first chunks of 2,000 tensors would be
    11, each waiting for the one before. launches: for each combination of dtypes (codes of
    parameter and gradient, first chunk, number of chunks).
    """

    def __init__(self, described: Tensor, device: torch.device):
        self.described = described.clone(memory_format=torch.contiguous_format)
        chunks = (described[:, 0] + (OPTIMIZER_CHUNK - 1)) // OPTIMIZER_CHUNK
        kinds = described[:, 1] * len(ELEMENTS) + described[:, 2]
        order = torch.argsort(kinds, stable=True)  # rows of one combination stand together
        first = torch.zeros_like(chunks)
        first[order] = torch.cumsum(chunks[order], 0) - chunks[order]
        self.num_chunks = int(chunks.sum())
        self.launches: list[tuple[int, int, int, int]] = []
        for kind in kinds.unique().tolist():
            if count := int(chunks[kinds == kind].sum()):
                start = int(first[kinds == kind].min())
                self.launches.append((*divmod(kind, len(ELEMENTS)), start, count))
        self.rows = _send(torch.column_stack([described, first]), device)
        self.chunk_rows = _send(torch.repeat_interleave(order, chunks[order]).int(), device)
        self.pointers = Mirror(device)


def on_device(table: TensorTable) -> tuple[DeviceTable, Tensor]:
    """The table on its device, kept in its cache while only pointers change, and its pointers."""
    if table.on_device is not None:
        return table.on_device
    pointers = table.rows[:, : collect.NUMEL]
    described = table.rows[:, collect.NUMEL : collect.INDEX]
    found, capturing = table.cache.get("device_table"), _capturing(table.device)
    if found is None or not torch.equal(found.described, described):
        if capturing:
            raise RuntimeError(
                "a CUDA graph cannot capture the first step of an optimizer, or the first one with "
                "other gradients: run one outside of a capture first"
            )
        found = table.cache["device_table"] = DeviceTable(described, table.device)
    if capturing and not any(x is found for x in _captured):
        _captured.append(found)
    table.on_device = found, found.pointers.on_device(pointers)
    return table.on_device
