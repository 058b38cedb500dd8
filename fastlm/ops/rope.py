"""Rotary positions: the formula, and ops of it, on CUDA by one kernel of this package.

torch.compile's own code for the interleaved pairs takes an H100 112 us where the kernel takes 84
(bench/LOG.md, 2026-11-26); at a copy's rate it would be 67.

Shapes: B batch, T positions, H query heads, H_kv key heads, d head width.
"""

import math

import torch
from torch import Tensor

from fastlm.ops.dispatch import on_gpu
from fastlm.ops.registration import LIBRARY, register_op

Rope = tuple[Tensor, Tensor]  # (cos, sin), (T, d/2) fp32 each


def rope_tables(
    max_seq_len: int,
    head_dim: int,
    theta: float,
    scaling: tuple[float, float, float, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of position * theta^(-2i/d), fp32, (max_seq_len, d/2) each (arXiv:2104.09864).

    scaling: ModelConfig.rope_scaling. What turns high_freq_factor times or more within the length
    before keeps its frequency; low_freq_factor times or less, it turns `factor` times slower;
    between them both are mixed.
    """
    wide = dict(dtype=torch.float64, device="cpu")  # not every device has float64
    frequencies = theta ** (-torch.arange(0, head_dim, 2, **wide) / head_dim)
    if scaling is not None:
        factor, low, high, length_before = scaling
        turns = frequencies * length_before / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angles = torch.outer(torch.arange(max_seq_len, **wide), frequencies)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[2i], x[2i+1]); x: (..., T, d), cos and sin: (T, d/2)."""
    wide = x if x.dtype == torch.float64 else x.float()
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def rotate_heads(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q: (B, H, T, d) and k: (B, H_kv, T, d) turned; cos, sin: (T, d/2) fp32, or (B, 1, T, d/2)."""
    if cos.dim() == 2 and on_gpu(q, k):
        q, k = (rotate(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k))
        return q, k
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin)


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


def _turn(x: Tensor, tables: Rope | None, out: Tensor, back: bool) -> None:
    """Into `out`; without tables a copy."""
    if x.is_cuda:
        from fastlm.kernels import rope

        rope.rotate(x if x.stride(-1) == 1 else x.contiguous(), tables, out=out, back=back)
    elif tables is None:
        out.copy_(x)
    else:
        cos, sin = tables
        turned = apply_rope(x.transpose(1, 2), cos, -sin if back else sin)
        out.copy_(turned.transpose(1, 2))


# --- The ops; on CPUs for tests: there the trainer's attention turns queries and keys itself ---


@register_op(
    "rotate",
    "(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
    "CUDA",
    "CPU",
)
def _rotate(x, cos, sin, back):
    out = x.new_empty(x.shape)
    _turn(x, (cos, sin), out, back)
    return out


def _save(ctx, inputs, output) -> None:
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


torch.library.register_autograd(
    _rotate,
    lambda ctx, grad: (_rotate(grad, *ctx.saved_tensors, not ctx.back), None, None, None),
    setup_context=_save,
    lib=LIBRARY,
)


def _empty_joint(dq, dk, dv, *_) -> Tensor:
    B, T, _, d = dq.shape
    return dq.new_empty((B, T, (dq.shape[2] + 2 * dk.shape[2]) * d))


@register_op(
    "rotate_joint_gradient",
    "(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor",
    _empty_joint,
    "CUDA",
    "CPU",
)
def _joint_gradient(dq, dk, dv, cos, sin):
    joint = _empty_joint(dq, dk, dv)
    q, k, v = _of_heads(joint, dq.shape[2], dk.shape[2])
    _turn(dq, (cos, sin), q, True)
    _turn(dk, (cos, sin), k, True)
    _turn(dv, None, v, False)
    return joint
