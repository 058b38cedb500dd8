"""Sums of squares of many gradients and their scaling in Triton, for CUDA and ROCm.

Every launch goes over all tensors of a TensorTable, one program a chunk, whatever their dtypes.
The sums are of float64 squares, of each chunk first, and then of the chunks in a fixed order: the
same bits every time. Nothing waits for the device, and every launch can go into a CUDA graph. With
TRITON_INTERPRET=1 all of it runs on CPU tensors.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .device_table import (
    CLASS,
    FIRST_CHUNK,
    GRADIENT_CODE,
    NUMEL,
    ROW_FIELDS,
    DeviceTable,
    device_table,
)
from .tensor_table import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    GRAD,
    SPLIT,
    GradientSums,
    TensorTable,
)

ROCM = torch.version.hip is not None

_FLOAT32, _BFLOAT16 = tl.constexpr(FLOAT32), tl.constexpr(BFLOAT16)
_FLOAT16, _FLOAT64 = tl.constexpr(FLOAT16), tl.constexpr(FLOAT64)
_SPLIT = tl.constexpr(SPLIT)
_NUMEL, _FIRST_CHUNK = tl.constexpr(NUMEL), tl.constexpr(FIRST_CHUNK)
_GRADIENT_CODE, _CLASS = tl.constexpr(GRADIENT_CODE), tl.constexpr(CLASS)
_ROW_FIELDS, _GRAD = tl.constexpr(ROW_FIELDS), tl.constexpr(GRAD)
_COLUMNS = tl.constexpr(6)  # of TensorTable.pointers

NO_ROW = tl.constexpr(2**62)  # more than any row's index


@dataclass(eq=False)
class ChunkSums(GradientSums):
    """Sums of squares of every chunk; `bad` is what step() finds in `bad_rows`, (k,) int64."""

    bad_rows: Tensor


@triton.jit
def typed_pointer(address, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer that an int64 holds; ALIGNED promises that it is a multiple of 16."""
    if CODE == _FLOAT32:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif CODE == _BFLOAT16:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif CODE == _FLOAT16:
        pointer = address.to(tl.pointer_type(tl.float16))
    elif CODE == _FLOAT64:
        pointer = address.to(tl.pointer_type(tl.float64))
    else:
        tl.static_assert(CODE == _SPLIT)
        pointer = address.to(tl.pointer_type(tl.int16))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def find_chunk(rows, chunk_rows, chunk, CHUNK: tl.constexpr):
    """Of a chunk (its row, where in the row it starts, the elements from there to the end)."""
    row = tl.load(chunk_rows + chunk).to(tl.int64)
    start = (chunk - tl.load(rows + row * _ROW_FIELDS + _FIRST_CHUNK)) * CHUNK
    return row, start, tl.load(rows + row * _ROW_FIELDS + _NUMEL) - start


@triton.jit
def round_to_odd(x, error):
    """fp32 `x`, or where its exact value x + error is another the neighbour whose last bit is 1.

    What is then rounded to 16 bits is rounded once. NaN and infinity stay.
    """
    bits = x.to(tl.int32, bitcast=True)
    away = (error > 0.0) == (x > 0.0)
    inexact = (error > 0.0) | (error < 0.0)
    other = tl.where(away, bits + 1, bits - 1)
    return tl.where(inexact & ((bits & 1) == 0), other, bits).to(tl.float32, bitcast=True)


@triton.jit
def _squares(
    address, start, left, CODE: tl.constexpr, FULL: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(sum of squares, fp64; sum of x - x, which is 0 or NaN) of a chunk."""
    x = typed_pointer(address, CODE, FULL) + start
    places = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    nans = tl.zeros([BLOCK], tl.float64)
    for offset in range(0, CHUNK if FULL else tl.minimum(left, CHUNK).to(tl.int32), BLOCK):
        at = offset + places
        if FULL:
            g = tl.load(x + at).to(tl.float64)
        else:
            g = tl.load(x + at, mask=at < left, other=0.0).to(tl.float64)
        sums += g * g
        if CODE == _FLOAT64:  # squares of the others are finite where they are
            nans += g - g
    return tl.sum(sums), tl.sum(nans)


@triton.jit
def _squares_anywhere(
    address, start, left, CODE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    if (left >= CHUNK) & (address % 16 == 0):
        total, nans = _squares(address, start, left, CODE, True, CHUNK, BLOCK)
    else:
        total, nans = _squares(address, start, left, CODE, False, CHUNK, BLOCK)
    return total, (nans if CODE == _FLOAT64 else total - total)


@triton.jit
def square_sums_kernel(
    rows, chunk_rows, pointers, sums, bad_rows, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of chunk program_id(0) the sum of squares, and its row if an element is not finite."""
    chunk = tl.program_id(0).to(tl.int64)
    row, start, left = find_chunk(rows, chunk_rows, chunk, CHUNK)
    address = tl.load(pointers + row * _COLUMNS + _GRAD)
    code = tl.load(rows + row * _ROW_FIELDS + _GRADIENT_CODE)
    if code == _FLOAT32:
        total, nans = _squares_anywhere(address, start, left, _FLOAT32, CHUNK, BLOCK)
    elif code == _BFLOAT16:
        total, nans = _squares_anywhere(address, start, left, _BFLOAT16, CHUNK, BLOCK)
    elif code == _FLOAT16:
        total, nans = _squares_anywhere(address, start, left, _FLOAT16, CHUNK, BLOCK)
    else:
        total, nans = _squares_anywhere(address, start, left, _FLOAT64, CHUNK, BLOCK)
    tl.store(sums + chunk, total)
    tl.store(bad_rows + chunk, tl.where(nans == 0.0, NO_ROW, row))


@triton.jit
def add_up(values, bad_rows, chunk_rows, rows, count, wanted, find_bad, BLOCK: tl.constexpr):
    """(Sum of the values, least of bad_rows if find_bad) of chunks of class `wanted`, -1: all."""
    total = tl.zeros([BLOCK], tl.float64)
    bad = tl.full([BLOCK], NO_ROW, tl.int64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        here = at < count
        if find_bad:
            bad = tl.minimum(bad, tl.load(bad_rows + at, mask=here, other=NO_ROW))
        if wanted >= 0:
            row = tl.load(chunk_rows + at, mask=here, other=0).to(tl.int64)
            kind = tl.load(rows + row * _ROW_FIELDS + _CLASS, mask=here, other=-1)
            here = here & (kind == wanted)
        total += tl.load(values + at, mask=here, other=0.0)
    least = tl.min(bad)
    return tl.sum(total), tl.where(least == NO_ROW, -1, least)


@triton.jit(do_not_specialize=["count"])
def class_sums_kernel(
    rows, chunk_rows, sums, bad_rows, out, bad, count, BLOCK: tl.constexpr
):  # fmt: skip
    """The sum of class program_id(0), and of all the first row that is not finite."""
    wanted = tl.program_id(0)
    total, row = add_up(sums, bad_rows, chunk_rows, rows, count, wanted, wanted == 0, BLOCK)
    tl.store(out + wanted, total)
    if wanted == 0:
        tl.store(bad, row)


@triton.jit
def _scale(
    address, start, left, factor, CODE: tl.constexpr, FULL: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = (CODE == _BFLOAT16) | (CODE == _FLOAT16)
    x = typed_pointer(address, CODE, FULL) + start
    places = tl.arange(0, BLOCK)
    for offset in range(0, CHUNK if FULL else tl.minimum(left, CHUNK).to(tl.int32), BLOCK):
        at = offset + places
        g = tl.load(x + at) if FULL else tl.load(x + at, mask=at < left)
        new = g.to(tl.float64) * factor
        if HALF:
            once = new.to(tl.float32)
            new = round_to_odd(once, new - once.to(tl.float64))
        if FULL:
            tl.store(x + at, new.to(g.dtype))
        else:
            tl.store(x + at, new.to(g.dtype), mask=at < left)


@triton.jit
def _scale_anywhere(
    address, start, left, factor, CODE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    if (left >= CHUNK) & (address % 16 == 0):
        _scale(address, start, left, factor, CODE, True, CHUNK, BLOCK)
    else:
        _scale(address, start, left, factor, CODE, False, CHUNK, BLOCK)


@triton.jit
def scale_gradients_kernel(
    rows, chunk_rows, pointers, factor, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """gradient *= factor of chunk program_id(0); a factor of 1 leaves every bit as it is."""
    f = tl.load(factor)
    if f != 1.0:
        chunk = tl.program_id(0).to(tl.int64)
        row, start, left = find_chunk(rows, chunk_rows, chunk, CHUNK)
        address = tl.load(pointers + row * _COLUMNS + _GRAD)
        code = tl.load(rows + row * _ROW_FIELDS + _GRADIENT_CODE)
        if code == _FLOAT32:
            _scale_anywhere(address, start, left, f, _FLOAT32, CHUNK, BLOCK)
        elif code == _BFLOAT16:
            _scale_anywhere(address, start, left, f, _BFLOAT16, CHUNK, BLOCK)
        elif code == _FLOAT16:
            _scale_anywhere(address, start, left, f, _FLOAT16, CHUNK, BLOCK)
        else:
            _scale_anywhere(address, start, left, f, _FLOAT64, CHUNK, BLOCK)


def on_device(table: TensorTable) -> tuple[DeviceTable, Tensor]:
    """The table on its device, and its pointers as they are now."""
    found = device_table(table, configs.OPTIMIZER_CHUNK)
    return found, found.pointers.on_device(table.pointers)


def square_sums(table: TensorTable, *, by_class: bool = False) -> GradientSums:
    """Sums of squares of the gradients, in float64: of every chunk, or (num_classes,) of classes.

    `bad` of the former is written by the step that gets them.
    """
    on, pointers = on_device(table)
    config, k = configs.square_sums_config(ROCM), on.num_chunks
    even = k + k % 2  # every part starts at a multiple of 16 bytes
    buffer = torch.empty(2 * even + 1, dtype=torch.int64, device=table.device)
    sums, bad_rows, bad = buffer[:k].view(torch.float64), buffer[even : even + k], buffer[2 * even]
    with torch.cuda.device_of(buffer):
        if k:
            square_sums_kernel[(k,)](
                on.rows, on.chunk_rows, pointers, sums, bad_rows, CHUNK=on.chunk, **config
            )  # fmt: skip
        if not by_class:
            return ChunkSums(sums, bad, bad_rows)
        out = torch.empty(table.num_classes, dtype=torch.float64, device=table.device)
        if table.num_classes:
            class_sums_kernel[(table.num_classes,)](
                on.rows, on.chunk_rows, sums, bad_rows, out, bad, k, **configs.sums_config(ROCM)
            )  # fmt: skip
    return GradientSums(out, bad)


def scale_gradients(table: TensorTable, factor: Tensor | float) -> None:
    """gradient *= factor, a float or a 0-d float64 tensor on the device: in place, rounded once."""
    on, pointers = on_device(table)
    factor = torch.as_tensor(factor, dtype=torch.float64, device=table.device)
    if on.num_chunks:
        with torch.cuda.device_of(pointers):
            scale_gradients_kernel[(on.num_chunks,)](
                on.rows, on.chunk_rows, pointers, factor,
                CHUNK=on.chunk, **configs.scale_gradients_config(ROCM),
            )  # fmt: skip
