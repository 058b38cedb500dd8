"""Causal attention, with rotary positions if asked for: causal_attention.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j        over the keys j <= i + Tk - Tq

The queries are the last Tq of Tk positions. With a head's queries its keys and values may serve
several heads: query head h reads key head h // (H / H_kv) (grouped queries, arXiv:2305.13245).

Shapes: B batch, H query heads, H_kv key heads, Tq queries, Tk keys, T both, d head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels.collect import is_dtensor
from fastlm.kernels.cross_entropy_op import is_transformed
from fastlm.ops import causal_attention_cpp as cpp
from fastlm.ops.dispatch import autocasts, compute_dtype, resolve_implementation
from fastlm.ops.rope import Rope, apply_rope, rotate_heads

# Of fewer queries than this behind a cache "cpp" would spend most of its time on packing the keys:
# 1.1 to 2.6 times SDPA's (bench/LOG.md, 2026-11-26). But SDPA is slow in 16 bits on AMD's Zen 5: of
# this many keys on "cpp" is faster there (2026-11-27).
_FEW_QUERIES = 8
_MANY_KEYS = 64


def causal_attention(
    q: Tensor,  # (..., H, Tq, d) fp32, bf16 or fp16; fp64 runs impl "torch"
    k: Tensor,  # (..., H_kv, Tk, d), H a multiple of H_kv, Tk >= Tq
    v: Tensor,  # (..., H_kv, Tk, d)
    *,
    scale: float | None = None,  # of the scores; default 1 / sqrt(d)
    rope: Rope | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Attention of each query to the keys up to its own position: (..., H, Tq, d), q's dtype.

    The queries are the last of the positions: query i sees the keys 0 to i + Tk - Tq. No memory of
    Tq * Tk is used, forward or backward, except by impl "torch" for 1 < Tq < Tk.

    `rope`: (cos, sin), (T, d/2) fp32 each. Rotates the pairs (2i, 2i+1) of q and k first, position
    t by row t; needs Tq == Tk, as both start at position 0. The tables get no gradient.
    `dropout_p`: how many of the softmax's weights become 0; by impl "torch" only.

    q, k and v are read where they are if the elements of a head are adjacent, else copied first.
    The result is laid out as (..., Tq, H, d): `.transpose(-3, -2).flatten(-2)` copies nothing.
    Under autocast q, k and v are cast to its dtype, and the result has that.

    impl: "cpp" (CPU, d <= 256; results the same for any number of threads) or "torch"
    (F.scaled_dot_product_attention and its choice of a backend). "auto" takes "cpp" where it can
    run, but "torch" for up to 7 queries behind more keys, as in decoding (except, not compiled, in
    16 bits from 64 keys on where bf16 dot products are fast: AMD), with dropout, and under
    torch.func's transforms.

    Raises ValueError for shapes, devices or an impl that do not fit, TypeError for dtypes. There is
    no second derivative, except with impl="torch" inside sdpa_kernel(SDPBackend.MATH).
    """
    _check(q, k, v, scale, rope)
    dtype, batch = compute_dtype(q), q.shape[:-3]
    if not q.dtype == k.dtype == v.dtype == dtype:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if len(batch) != 1:
        q, k, v = (x.reshape(batch.numel(), *x.shape[-3:]) for x in (q, k, v))
    if _runs_cpp(impl, q, k, v, dropout_p):
        out = cpp.attention(q, k, v, scale, rope)
    else:
        out = _by_sdpa(q, k, v, scale, rope, dropout_p)
    return (out if len(batch) == 1 else out.view(*batch, *out.shape[1:])).transpose(-3, -2)


def causal_attention_reference(
    q: Tensor,  # (..., H, Tq, d)
    k: Tensor,  # (..., H_kv, Tk, d)
    v: Tensor,  # (..., H_kv, Tk, d)
    *,
    scale: float | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """The formula above, with all scores at once: what every implementation is tested against.

    In fp64 for fp64 tensors, else in fp32.
    """
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q, k, v))
    if rope is not None:
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
    group = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(group, dim=-3) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.transpose(-2, -1) * scale
    scores = scores.masked_fill(~_seen(q, k), -torch.inf)
    return (scores.softmax(dim=-1) @ v).to(dtype)


def _by_sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, rope: Rope | None, dropout_p: float
) -> Tensor:  # (B, Tq, H, d)
    """By PyTorch's own function: on devices without a kernel, and for what kernels do not take."""
    if rope is not None:
        q, k = rotate_heads(q, k, *rope)
    Tq, Tk = q.shape[-2], k.shape[-2]
    # One query sees all keys and needs no mask.
    mask = _seen(q, k) if 1 < Tq < Tk else None
    k, v, grouped = of_query_heads(q, k, v, masked=mask is not None)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=True if Tq == Tk else False,  # noqa: SIM210 compiled for any size, it is a SymBool
        dropout_p=dropout_p,
        scale=scale,
        **grouped,
    )
    out = out.transpose(1, 2).contiguous()  # which most backends give, for such a q
    # torch (2.11) keeps cuDNN's backward under the strides of q, k and v alone: after a gradient of
    # one layout another, as that of out.sum(), would give wrong ones, silently. (A compiled graph's
    # gradients have the strides that it was compiled for.)
    on_tape = out.is_cuda and out.requires_grad
    if on_tape and not torch.compiler.is_compiling() and not is_transformed(q, k, v):
        out.register_hook(Tensor.contiguous)
    return out


def of_query_heads(
    q: Tensor, k: Tensor, v: Tensor, *, masked: bool
) -> tuple[Tensor, Tensor, dict[str, bool]]:
    """k, v, and SDPA's option for fewer of them than queries: (B, H_kv, Tk, d), or repeated to
    (B, H, Tk, d) where only the kernel that holds all scores would take fewer."""
    H, H_kv = q.shape[-3], k.shape[-3]
    if H_kv == H:
        return k, v, {}
    if _groups_heads(q.dtype, q.device, masked):
        return k, v, {"enable_gqa": True}
    k, v = (x.repeat_interleave(H // H_kv, dim=-3) for x in (k, v))
    return k, v, {}


def _groups_heads(dtype: torch.dtype, device: torch.device, masked: bool) -> bool:
    """Has SDPA a fast kernel here for keys that several heads share? False where that is not sure:
    to repeat them is always right."""
    if device.type != "cuda":
        return True
    # Flash attention's takes 16 bits, sm_80 and no mask. cuDNN's takes a mask, and its place in the
    # order depends on its version.
    return not masked and dtype.itemsize == 2 and torch.cuda.get_device_capability(device) >= (8, 0)


# Compiled, its answer stands: as torch.compiler.assume_constant_result, which loads torch.compile.
_groups_heads._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _seen(q: Tensor, k: Tensor) -> Tensor:
    """(Tq, Tk) bool: which keys each query sees."""
    Tq, Tk = q.shape[-2], k.shape[-2]
    return torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)


def _runs_cpp(impl: str, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> bool:
    Tq, d = q.shape[-2:]
    if resolve_implementation("causal_attention", impl, q.device, q.dtype) != "cpp":
        return False
    if impl == "auto":
        Tk, compiling = k.shape[-2], torch.compiler.is_compiling()
        few = Tq == 1 or (Tq < Tk and Tq < _FEW_QUERIES)
        by_sdpa = compiling or q.dtype.itemsize != 2 or Tk < _MANY_KEYS
        if few and (by_sdpa or not cpp.runs_bf16_dots()):
            return False
        transformed = not compiling and is_transformed(q, k, v)
        return not (d > cpp.MAX_HEAD_DIM or dropout_p or transformed)
    if d > cpp.MAX_HEAD_DIM:
        raise ValueError(
            f"impl='cpp' takes heads of at most {cpp.MAX_HEAD_DIM}, not d={d}: use impl='torch'"
        )
    if dropout_p:
        raise ValueError(f"impl='cpp' has no dropout, so dropout_p={dropout_p}: use impl='torch'")
    if q.dtype not in cpp.KIND:
        raise TypeError(f"impl='cpp' takes no {q.dtype}: use impl='torch'")
    return True


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None, rope: Rope | None) -> None:
    # Without messages first: a generated token has many such calls, of a tenth of a millisecond.
    fits = (
        q.dim() == k.dim() == 4
        and k.shape == v.shape
        and q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3] > 0
        and k.shape[1] > 0 == q.shape[1] % k.shape[1]
        and q.shape[2] <= k.shape[2]
        and q.dtype == k.dtype == v.dtype
        and q.is_floating_point()
        and q.device == k.device == v.device
    )
    if not fits or scale is not None or rope is not None or any(map(is_dtensor, (q, k, v))):
        _explain(q, k, v, scale, rope)


def _explain(q: Tensor, k: Tensor, v: Tensor, scale: float | None, rope: Rope | None) -> None:
    """Raises for what does not fit."""
    shapes = f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() < 3 or k.dim() != q.dim() or k.shape != v.shape:
        raise ValueError(f"{shapes}: they must be (B, H, Tq, d) and twice (B, H_kv, Tk, d)")
    if k.shape[:-3] != q.shape[:-3] or k.shape[-1] != q.shape[-1] or q.shape[-1] == 0:
        raise ValueError(f"{shapes}: they must agree in the batch and in the heads' width d > 0")
    if not k.shape[-3] or q.shape[-3] % k.shape[-3]:
        raise ValueError(f"{shapes}: q's heads must be a multiple of k's")
    if q.shape[-2] > k.shape[-2]:
        raise ValueError(
            f"{shapes}: the queries are the last of the positions, so Tq={q.shape[-2]} must not "
            f"be above Tk={k.shape[-2]}"
        )
    dtypes = f"q has dtype {q.dtype}, k {k.dtype}, v {v.dtype}"
    if not (q.is_floating_point() and k.is_floating_point() and v.is_floating_point()):
        raise TypeError(f"{dtypes}: they must be floating-point dtypes")
    if not q.dtype == k.dtype == v.dtype and not autocasts(q.device):
        raise TypeError(f"{dtypes}: they must be one dtype, except under autocast")
    if not q.device == k.device == v.device:
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}: move them to one")
    if any(map(is_dtensor, (q, k, v))):
        raise TypeError(
            "q, k or v is a DTensor: the kernels see one device; pass .to_local() of each, if "
            "each rank has heads or rows of its own"
        )
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale={scale}: it must be positive and finite")
    if rope is not None:
        _check_rope(q, k, *rope)


def _check_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    T, d = q.shape[-2:]
    if k.shape[-2] != T:
        raise ValueError(
            f"rope needs as many queries as keys, not Tq={T} and Tk={k.shape[-2]}: rotate q and k "
            f"before, each by its own positions"
        )
    if d % 2 or cos.shape != (T, d // 2) or sin.shape != cos.shape:
        raise ValueError(
            f"rope has shapes {tuple(cos.shape)} and {tuple(sin.shape)}, q {tuple(q.shape)}: cos "
            f"and sin must be (T, d/2), d even"
        )
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise TypeError(f"rope has dtypes {cos.dtype} and {sin.dtype}: they must be float32")
    if cos.device != q.device or sin.device != q.device:
        raise ValueError(f"rope is on {cos.device} and {sin.device}, q on {q.device}: move it")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rope requires a gradient, which the tables do not get: detach them")
