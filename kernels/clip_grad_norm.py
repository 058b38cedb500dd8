"""The sum of squares of many gradients and their scaling in Triton, for CUDA and ROCm:

norm = sqrt(sum over all gradients g of |g|^2);  g *= factor

Squares and sums are float64: a sum of each chunk first, then the chunks' sums in a fixed order, so
that the bits are the same every time. A launch goes over all tensors of one combination of dtypes,
a last one adds up. k chunks; rows, chunk_rows: device_table.py.
"""

import torch
import triton
import triton.language as tl

from . import configs
from . import device_table as tables
from .collect import SquareSum, TensorTable


@triton.jit
def _squares(
    address, start, size, G: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The chunk's sum of squares: -inf if it is infinite although every element is finite."""
    gradients = tables.pointer_to(address, G, FULL) + start
    sums, nans = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for offset in range(0, size, BLOCK):
        g = tables.load(gradients, offset + tl.arange(0, BLOCK), size, FULL).to(tl.float64)
        sums += g * g
        if G.is_fp64():  # the squares of the others are finite if they are
            nans += g - g
    total = tl.sum(sums)
    if G.is_fp64():
        total = tl.where((total == float("inf")) & (tl.sum(nans) == 0.0), -total, total)
    return total


@triton.jit(do_not_specialize=["first"])
def square_sums_kernel(
    rows, chunk_rows, pointers, sums, first, G: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """sums: (k,) fp64; here that of chunk first + program_id(0), with gradients of type G."""
    row, start, size = tables.find_chunk(rows, chunk_rows, first)
    address = tl.load(pointers + row * tables.POINTERS + tables.GRAD)
    if (size == tables.CHUNK) & (address % 16 == 0):
        total = _squares(address, start, size, G, True, BLOCK)
    else:
        total = _squares(address, start, size, G, False, BLOCK)
    tl.store(sums + first + tl.program_id(0), total)


@triton.jit(do_not_specialize=["k"])
def add_sums_kernel(chunk_rows, sums, out, bad, k, BLOCK: tl.constexpr):
    """out: 0-d fp64, all chunks' sum; bad: 0-d int64, the first row with an element that is not
    finite, -1 without."""
    NONE: tl.constexpr = 2**62  # more than any row
    total, least = tl.zeros([BLOCK], tl.float64), tl.full([BLOCK], NONE, tl.int64)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        row = tl.load(chunk_rows + at, mask=at < k, other=0).to(tl.int64)
        x = tl.load(sums + at, mask=at < k, other=0.0)
        least = tl.minimum(least, tl.where((x == x) & (x != float("inf")), NONE, row))
        total += tl.abs(x)
    tl.store(out, tl.sum(total))
    first = tl.min(least)
    tl.store(bad, tl.where(first == NONE, -1, first))


@triton.jit
def _scale(
    address, start, size, factor, G: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    WORK: tl.constexpr = tl.float64 if G.is_fp64() else tl.float32
    gradients = tables.pointer_to(address, G, FULL) + start
    for offset in range(0, size, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        g = tables.load(gradients, at, size, FULL).to(WORK)
        tables.store(gradients, at, size, g * factor.to(WORK), FULL)


@triton.jit(do_not_specialize=["first"])
def scale_gradients_kernel(
    rows, chunk_rows, pointers, factor, first, G: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """gradient *= factor (0-d fp64) of chunk first + program_id(0)."""
    f = tl.load(factor)
    row, start, size = tables.find_chunk(rows, chunk_rows, first)
    address = tl.load(pointers + row * tables.POINTERS + tables.GRAD)
    if (size == tables.CHUNK) & (address % 16 == 0):
        _scale(address, start, size, f, G, True, BLOCK)
    else:
        _scale(address, start, size, f, G, False, BLOCK)


def sum_squares(table: TensorTable) -> SquareSum:
    on, pointers = tables.on_device(table)
    sums = torch.empty(on.num_chunks, dtype=torch.float64, device=table.device)
    total = torch.empty((), dtype=torch.float64, device=table.device)
    bad = torch.empty((), dtype=torch.int64, device=table.device)
    with torch.cuda.device_of(bad):
        for _, gradient, first, count in on.launches:
            square_sums_kernel[(count,)](
                on.rows, on.chunk_rows, pointers, sums, first, G=tables.ELEMENTS[gradient],
                **configs.gradients_config(tables.ROCM),
            )  # fmt: skip
        config = configs.sums_config(tables.ROCM)
        add_sums_kernel[(1,)](on.chunk_rows, sums, total, bad, on.num_chunks, **config)
    return SquareSum(total, bad)


def scale_gradients(table: TensorTable, factor: float) -> None:
    """gradient *= factor in place: in fp32 (of fp64 gradients in fp64), rounded to 16 bits at the
    end."""
    on, pointers = tables.on_device(table)
    by = torch.full((), factor, dtype=torch.float64, device=table.device)
    with torch.cuda.device_of(by):
        for _, gradient, first, count in on.launches:
            scale_gradients_kernel[(count,)](
                on.rows, on.chunk_rows, pointers, by, first, G=tables.ELEMENTS[gradient],
                **configs.gradients_config(tables.ROCM),
            )  # fmt: skip
