"""silu(gate) * value in Triton, for CUDA and ROCm, of gates and values that one matmul has made.

    h = silu(g) v      dg = dh v s (1 + g (1 - s))      dv = dh silu(g)      s = sigmoid(g)

in fp32, rounded once. Both halves of a row are read, and both halves of its gradient written, in
one pass: 3 and 5 times the size of h.

Shapes: R rows, F feed-forward width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs

_ROCM = torch.version.hip is not None


@triton.jit
def _gate_and_value(x, row, F, columns):
    """Of x (R, 2F), gates then values, in fp32; 0 past the end."""
    here = columns < F
    gates = x + row * 2 * F + columns
    g = tl.load(gates, mask=here, other=0.0)
    v = tl.load(gates + F, mask=here, other=0.0)
    return g.to(tl.float32), v.to(tl.float32)


@triton.jit
def swiglu_kernel(x, h, F, BLOCK: tl.constexpr):
    """Row program_id(0): x (R, 2F), gates then values; h (R, F)."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, F, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        g, v = _gate_and_value(x, row, F, columns)
        y = g * tl.sigmoid(g) * v
        tl.store(h + row * F + columns, y.to(h.dtype.element_ty), mask=columns < F)


@triton.jit
def swiglu_gradient_kernel(x, dh, dx, F, BLOCK: tl.constexpr):
    """Row program_id(0): dh (R, F) to dx (R, 2F)."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, F, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        here = columns < F
        g, v = _gate_and_value(x, row, F, columns)
        d = tl.load(dh + row * F + columns, mask=here, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        dg = d * v * (s * (1.0 + g * (1.0 - s)))
        tl.store(dx + row * 2 * F + columns, dg.to(dx.dtype.element_ty), mask=here)
        dv = d * (g * s)
        tl.store(dx + row * 2 * F + F + columns, dv.to(dx.dtype.element_ty), mask=here)


def swiglu(x: Tensor, h: Tensor) -> None:
    """x: (R, 2F), fp32, bf16 or fp16; h: (R, F), both contiguous."""
    if h.numel():
        with torch.cuda.device_of(x):
            swiglu_kernel[(len(x),)](x, h, h.shape[1], **configs.swiglu_config(h.shape[1], _ROCM))


def swiglu_gradient(x: Tensor, dh: Tensor, dx: Tensor) -> None:
    """dh: (R, F); dx: (R, 2F), all contiguous."""
    if dh.numel():
        config = configs.swiglu_config(dh.shape[1], _ROCM)
        with torch.cuda.device_of(x):
            swiglu_gradient_kernel[(len(x),)](x, dh, dx, dh.shape[1], **config)
