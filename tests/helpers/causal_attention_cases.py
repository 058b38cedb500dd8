"""What the tests of causal_attention share: random cases, PyTorch's path, and one assertion.

B batch, H query heads, H_kv key heads, Tq queries, Tk keys, d head width.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from tolerance import assert_as_accurate
from torch import Tensor

from fastlm.ops.causal_attention import causal_attention_reference
from fastlm.ops.rope import apply_rope, rope_tables

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("out", "dq", "dk", "dv")


@dataclass
class Case:
    q: Tensor  # (B, H, Tq, d)
    k: Tensor  # (B, H_kv, Tk, d)
    v: Tensor  # (B, H_kv, Tk, d)
    grad_out: Tensor  # (B, H, Tq, d)
    rope: tuple[Tensor, Tensor] | None = None
    scale: float | None = None

    @property
    def options(self) -> dict:
        return {"rope": self.rope, "scale": self.scale}

    def to(self, dtype) -> "Case":
        tensors = {name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "grad_out")}
        return replace(self, **tensors)


def make(
    shape=(2, 2, 2), T=16, d=16, dtype=torch.float32, *, Tq=None, rope=False, seed=0, scale=None,
    sharpness=1.5, device="cpu",
) -> Case:  # fmt: skip
    """shape: (B, H, H_kv). sharpness: of q and k; at 1.5 a softmax looks at a few keys."""
    B, H, H_kv = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(size, generator=generator)

    Tq = T if Tq is None else Tq
    q, k = sharpness * random(B, H, Tq, d), sharpness * random(B, H_kv, T, d)
    tensors = q, k, random(B, H_kv, T, d), random(B, H, Tq, d)
    tables = tuple(table.to(device) for table in rope_tables(T, d, 100.0)) if rope else None
    return Case(*(x.to(device, dtype) for x in tensors), tables, scale)


def results(function, case: Case, **options) -> list[Tensor]:
    """[out, dq, dk, dv]"""
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    out = function(*leaves, **case.options, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad_out)]


def sdpa(q, k, v, *, scale=None, rope=None) -> Tensor:
    """The same as one composes it of PyTorch's functions."""
    if rope is not None:
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
    Tq, Tk = q.shape[-2], k.shape[-2]
    mask = None
    if Tq != Tk:
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=Tq == Tk, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def assert_right(got: list[Tensor], case: Case, *, loosened: float = 1.0) -> None:
    """The suite's one comparison: fp64 truth, PyTorch's own error allowed.

    An error is scaled by the sum of the products' sizes, without the signs by which they cancel
    (`loosened`: times this). In fp32 what counts is the rounding of the scores, which every element
    of a row and of a key shares: two right orders of summation differ by chance, the more so in the
    largest error.
    """
    truth = results(causal_attention_reference, case.to(torch.float64))
    torchs = results(sdpa, case)
    # A whole unit would be more than the error itself, of which half a unit is the last rounding.
    largest, rms = (0.5, 0.08) if case.q.dtype == torch.float32 else (0.1, 0.02)
    for name, actual, peer, true, size in zip(
        NAMES, got, torchs, truth, magnitudes(case), strict=True
    ):
        assert_as_accurate(
            actual,
            peer,
            true,
            magnitude=loosened * size,
            slack=largest - 1,
            rms_slack=rms - 1,
            what=name,
        )


def magnitudes(case: Case) -> list[Tensor]:
    """What was rounded on the way to each element of [out, dq, dk, dv], in fp64."""
    wide = case.to(torch.float64)
    q, k, v, g = wide.q, wide.k, wide.v.abs(), wide.grad_out.abs()
    if case.rope is not None:
        q, k = apply_rope(q, *case.rope), apply_rope(k, *case.rope)
    B, H, Tq, d = q.shape
    H_kv, Tk = k.shape[1:3]
    scale = d**-0.5 if case.scale is None else case.scale
    k, v = (x.repeat_interleave(H // H_kv, dim=1) for x in (k, v))
    unseen = ~torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    p = (scale * q @ k.mT).masked_fill(unseen, -torch.inf).softmax(-1)
    dp = g @ v.mT
    if case.q.dtype == torch.float32:
        p = p * (1 + scale * q.abs() @ k.abs().mT)  # a score's error is one of its probability
    ds = scale * p * (dp + (p * dp).sum(-1, keepdim=True))

    def of_keys(x):  # summed over the query heads of a key head
        return x.view(B, H_kv, H // H_kv, Tk, d).sum(2)

    dq, dk = ds @ k.abs(), of_keys(ds.mT @ q.abs())
    if case.rope is not None:  # a rotated element is made of both of its pair
        dq, dk = (
            x.unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(*x.shape[:-1], d // 2, 2)
            for x in (dq, dk)
        )
        dq, dk = dq.flatten(-2), dk.flatten(-2)
    sizes = [p @ v, dq, dk, of_keys(p.mT @ g)]
    # What is 0 but for a probability of 1e-9 is not held to its own last place.
    return [x + 1e-6 * x[x.isfinite()].mean() if x.numel() else x for x in sizes]
