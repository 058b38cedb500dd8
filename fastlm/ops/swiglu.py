"""silu(gate) * value as an op of torch's dispatcher, on CUDA by a kernel of this package.

torch.compile's own code for a joint gradient reads everything once for each of its halves: 1.4
times the time (bench/LOG.md, 2026-11-26).

Shapes: F feed-forward width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels.cross_entropy_op import refuse_other_backwards
from fastlm.ops.registration import LIBRARY, register_op


def swiglu(x: Tensor) -> Tensor:
    """x: (..., 2F), gates and then values, to silu(gate) * value: (..., F). The gradient is one
    tensor, too, which the backward of the matmul that made x reads."""
    return _swiglu(x)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@register_op("swiglu", "(Tensor x) -> Tensor", _empty, "CUDA", "CPU")
def _swiglu(x):
    h = _empty(x)
    if x.is_cuda:
        from fastlm.kernels import swiglu as kernels

        kernels.swiglu(x.contiguous().flatten(0, -2), h.flatten(0, -2))
    else:  # for tests
        gate, value = x.float().chunk(2, dim=-1)
        h.copy_(F.silu(gate) * value)
    return h


@register_op(
    "swiglu_gradient",
    "(Tensor x, Tensor dh) -> Tensor",
    lambda x, _: x.new_empty(x.shape),
    "CUDA",
    "CPU",
)
def _gradient(x, dh):
    dx = x.new_empty(x.shape)
    if x.is_cuda:
        from fastlm.kernels import swiglu as kernels

        x, dh = (y.contiguous().flatten(0, -2) for y in (x, dh))
        kernels.swiglu_gradient(x, dh, dx.flatten(0, -2))
    else:
        gate, value = x.float().chunk(2, dim=-1)
        s, d = gate.sigmoid(), dh.float()
        dx.copy_(torch.cat((d * value * (s * (1 + gate * (1 - s))), d * (gate * s)), dim=-1))
    return dx


def _differentiate(ctx, dh):
    refuse_other_backwards("swiglu", dh, twice="F.silu(gate) * value")
    return _gradient(*ctx.saved_tensors, dh)


torch.library.register_autograd(
    _swiglu,
    _differentiate,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lib=LIBRARY,
)
