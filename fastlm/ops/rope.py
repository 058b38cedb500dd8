"""Rotary positions as ops of torch's dispatcher, on CUDA by one kernel of this package.

torch.compile's own code for the interleaved pairs takes 1.7 times what reading and writing the
tensor once takes (bench/LOG.md, 2026-11-26).

Shapes: B batch, T positions, H query heads, H_kv key heads, d head width.
"""

import torch
from torch import Tensor

from fastlm.kernels.cross_entropy_op import is_transformed

_LIBRARY = torch.library.Library("fastlm", "FRAGMENT")


def rotates(*tensors: Tensor) -> bool:
    """Is there a kernel for these? Not inside torch.func's transforms, of which it knows nothing."""
    known = all(
        x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in tensors
    )
    return known and (torch.compiler.is_compiling() or not is_transformed(*tensors))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (B, T, H, d), of any strides; cos, sin: (T, d/2) fp32. The pairs (x[2i], x[2i+1]) turned,
    dense."""
    return _rotate(x, cos.contiguous(), sin.contiguous(), False)


def rotate_joint(
    qkv: Tensor,  # (B, T, (H + 2 H_kv) * d): queries, keys and values of one matmul
    cos: Tensor,  # (T, d/2) fp32
    sin: Tensor,  # as cos
    heads: tuple[int, int],  # H, H_kv
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v): (B, T, H or H_kv, d), q and k turned, v where it stands. The three gradients are
    written into one, which the matmul's backward reads."""
    return _RotateJoint.apply(qkv, cos.contiguous(), sin.contiguous(), heads)


class _RotateJoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, heads):
        ctx.save_for_backward(cos, sin)
        q, k, v = _of_heads(qkv, *heads)
        return _rotate(q, cos, sin, False), _rotate(k, cos, sin, False), v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk, dv):
        return _joint_gradient(dq, dk, dv, *ctx.saved_tensors), None, None, None


def _of_heads(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Views of queries, keys and values: (B, T, H or H_kv, d)."""
    return qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=-2)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, back: bool) -> None:
    if x.is_cuda:
        from fastlm.kernels import rope

        x = x if x.stride(-1) == 1 else x.contiguous()
        rope.rotate(x, cos, sin, out=out, back=back)
        return
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos.unsqueeze(-2), (-sin if back else sin).unsqueeze(-2)  # the same for all heads
    out.copy_(torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2))


# --- The ops ---


def _op(name: str, schema: str, fake):
    def register(function):
        _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        for key in ("CUDA", "CPU"):  # on CPUs for tests: the trainer's attention turns them itself
            _LIBRARY.impl(name, function, key)
        torch.library.register_fake(f"fastlm::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.fastlm, name).default

    return register


@_op(
    "rotate",
    "(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
)
def _rotate(x, cos, sin, back):
    out = x.new_empty(x.shape)
    _turn(x, cos, sin, out, back)
    return out


def _save(ctx, inputs, output) -> None:
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


torch.library.register_autograd(
    _rotate,
    lambda ctx, grad: (_rotate(grad, *ctx.saved_tensors, not ctx.back), None, None, None),
    setup_context=_save,
    lib=_LIBRARY,
)


def _empty_joint(dq, dk, dv, *_) -> Tensor:
    B, T, _, d = dq.shape
    return dq.new_empty((B, T, (dq.shape[2] + 2 * dk.shape[2]) * d))


@_op(
    "rotate_joint_gradient",
    "(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor",
    _empty_joint,
)
def _joint_gradient(dq, dk, dv, cos, sin):
    joint = _empty_joint(dq, dk, dv)
    q, k, v = _of_heads(joint, dq.shape[2], dk.shape[2])
    _turn(dq, cos, sin, q, True)
    _turn(dk, cos, sin, k, True)
    v.copy_(dv)
    return joint
