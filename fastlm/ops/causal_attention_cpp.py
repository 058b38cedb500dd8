"""The CPU's attention, csrc/attention.cpp, as ops of torch's dispatcher.

No result depends on the number of threads. Reverse-mode derivatives only.

Shapes: B batch, H query heads, H_kv key heads, Tq queries, Tk keys, T both, d head width. What the
ops return is dense and laid out as (B, T, H, d), which (B, T, H * d) is a view of.
"""

import torch
from torch import Tensor

from fastlm.extension import extension
from fastlm.kernels.cross_entropy_op import fp32, refuse_other_backwards, refuse_transforms
from fastlm.ops.cross_entropy_cpp import KIND, _numpy
from fastlm.ops.flops import count_flops
from fastlm.ops.registration import LIBRARY, register_op
from fastlm.ops.rope import Rope

MAX_HEAD_DIM = 256
# Of what there is a second derivative: torch's own fused kernels have none either.
_TWICE = "impl='torch' inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"


def attention(
    q: Tensor,  # (B, H, Tq, d), of a dtype in KIND
    k: Tensor,  # (B, H_kv, Tk, d)
    v: Tensor,  # (B, H_kv, Tk, d)
    scale: float | None,
    rope: Rope | None,
) -> Tensor:  # (B, Tq, H, d)
    if not torch.compiler.is_compiling():
        refuse_transforms("causal_attention", q, k, v)
        count_flops(_FLOPS)
    return _attention(q, k, v, scale, *_tables(rope))[0]


def runs_bf16_dots() -> bool:
    """Does this run by AVX-512-BF16's dot products? By itself on AMD alone (csrc/isa.cpp)."""
    return extension().isa() == "avx512_bf16"


def _tables(rope: Rope | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if rope is None else (rope[0].contiguous(), rope[1].contiguous())


def _forward(q, k, v, scale, cos, sin) -> tuple[Tensor, Tensor]:
    out, stats = _empty(q)
    if q.numel():
        extension().causal_attention(
            *_arrays(q, k, v), *_options(q, scale, cos, sin), _numpy(out.transpose(1, 2)),
            _numpy(stats),
        )  # fmt: skip
    return out, stats


def _empty(q) -> tuple[Tensor, Tensor]:
    """(out, stats), not filled. stats: what backward wants of each row, (B, H, Tq, 2)."""
    return _dense(q), fp32((*q.shape[:-1], 2), q.device)


def _dense(x: Tensor) -> Tensor:
    """Memory for (B, H, T, d), as (B, T, H, d)."""
    B, H, T, d = x.shape
    return x.new_empty((B, T, H, d))


def _backward(grad_out, q, k, v, out, stats, scale, cos, sin, gradients) -> None:
    """grad_out, out: (B, T, H, d). Writes the gradients: three of (B, H or H_kv, T, d)."""
    if not q.numel():
        for gradient in gradients:
            gradient.zero_()
        return
    extension().causal_attention_backward(
        *_arrays(grad_out.transpose(1, 2), q, k, v), *_options(q, scale, cos, sin),
        _numpy(out.transpose(1, 2)), _numpy(stats), *map(_numpy, gradients),
    )  # fmt: skip


def _arrays(*tensors: Tensor):
    """Each with the elements of a head adjacent."""
    for x in tensors:
        adjacent = x.stride(-1) == 1
        yield _numpy(x if adjacent else x.clone(memory_format=torch.contiguous_format))


def _options(q, scale, cos, sin) -> tuple:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tables = (None if table is None else _numpy(table) for table in (cos, sin))
    return KIND[q.dtype], scale, *tables


# --- The ops ---

_OPTIONS = "float? scale, Tensor? cos, Tensor? sin"
_RESULTS = "Tensor out, Tensor stats"


@register_op(
    "causal_attention",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> ({_RESULTS})",
    lambda q, *_: _empty(q),
    "CPU",
)
def _attention(q, k, v, *options):
    return _forward(q, k, v, *options)


@register_op(
    "causal_attention_gradients",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, {_RESULTS}, {_OPTIONS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    lambda grad_out, q, k, v, *_: (_dense(q), _dense(k), _dense(v)),
    "CPU",
)
def _gradients(grad_out, q, k, v, *rest):
    gradients = _dense(q), _dense(k), _dense(v)
    _backward(grad_out, q, k, v, *rest, [gradient.transpose(1, 2) for gradient in gradients])
    return gradients


# --- Autograd ---


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, cos, sin = inputs
    ctx.save_for_backward(*tensors, *output, cos, sin)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, _):
    refuse_other_backwards("causal_attention", grad_out, twice=_TWICE)
    if grad_out is None:
        return (None,) * 6
    q, k, v, out, stats, cos, sin = ctx.saved_tensors
    gradients = _gradients(grad_out, q, k, v, out, stats, ctx.scale, cos, sin)
    return *(gradient.transpose(1, 2) for gradient in gradients), None, None, None


torch.library.register_autograd(_attention, _differentiate, setup_context=_save, lib=LIBRARY)


# --- FlopCounterMode: the whole square, and the scores again in backward, as torch counts SDPA ---


def _square(q: Tensor, k: Tensor) -> int:
    """FLOPs of one matmul: 2 * B * H * Tq * Tk * d."""
    return 2 * q.numel() * k.shape[-2]


_FLOPS = {
    torch.ops.fastlm.causal_attention: lambda q, k, *_, **__: 2 * _square(q, k),
    torch.ops.fastlm.causal_attention_gradients: lambda _, q, k, *__, **___: 5 * _square(q, k),
}
