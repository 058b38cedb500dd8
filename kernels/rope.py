"""Rotary positions in Triton, for CUDA and ROCm: pairs (x[2i], x[2i+1]) turned by their angles.

In memory a rotation is one read and one write, at 16 bytes an access, from and to tensors of any
strides: a projection's output is read, and its gradient written, where it stands.

Shapes: B batch, T positions, H heads, d head width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs

_ROCM = torch.version.hip is not None


@triton.jit(do_not_specialize=["positions", "sign"])
def rotate_kernel(
    x, out, cos, sin, positions, T, H, x_batch, x_position, x_head, out_batch, out_position,
    out_head, sign, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Positions program_id(0) * BLOCK and on, of all B * T, in every head. sign: 1, or -1 to turn
    back. WIDTH: the power of two from D on. Without TURN a copy."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = position < positions
    b, t = position // T, position % T
    column = tl.arange(0, WIDTH)[None, :]
    if TURN:
        pair = tl.arange(0, WIDTH // 2)[None, :]
        angle = t[:, None] * (D // 2) + pair
        known = here[:, None] & (pair < D // 2)
        c = tl.load(cos + angle, mask=known, other=0.0)
        s = tl.load(sin + angle, mask=known, other=0.0) * sign
    source = x + (b * x_batch + t * x_position)[:, None] + column
    target = out + (b * out_batch + t * out_position)[:, None] + column
    mask = here[:, None] & (column < D)
    for _ in range(0, H):  # a position's angles are read once for all its heads
        y = tl.load(source, mask=mask, other=0.0)
        if TURN:
            even, odd = tl.split(tl.reshape(y.to(tl.float32), (BLOCK, WIDTH // 2, 2)))
            turned = tl.join(even * c - odd * s, even * s + odd * c)
            y = tl.reshape(turned, (BLOCK, WIDTH)).to(out.dtype.element_ty)
        tl.store(target, y, mask=mask)
        source += x_head
        target += out_head


def rotate(
    x: Tensor,  # (B, T, H, d) fp32, bf16 or fp16, the elements of a head adjacent
    tables: tuple[Tensor, Tensor] | None,  # cos and sin, (T, d/2) fp32, contiguous; None: a copy
    *,
    out: Tensor,  # as x, of any strides but the last one
    back: bool = False,  # by the opposite angles: the gradient
) -> None:
    B, T, H, d = x.shape
    positions, config = B * T, configs.rope_config(d, _ROCM)
    cos, sin = (x, x) if tables is None else tables
    if positions and H:
        with torch.cuda.device_of(x):
            rotate_kernel[(triton.cdiv(positions, config["BLOCK"]),)](
                x, out, cos, sin, positions, T, H, *x.stride()[:3], *out.stride()[:3],
                -1.0 if back else 1.0, D=d, WIDTH=triton.next_power_of_2(d),
                TURN=tables is not None, **config,
            )  # fmt: skip
