"""The output head and its cross-entropy in one op: linear_cross_entropy_loss.

The loss is that of cross_entropy.py for logits = hidden @ weight.T + bias. The logits exist for a
chunk of rows at a time, and become their own gradient in place; the gradients of hidden, weight and
bias are computed with the loss, while the chunk is there, and kept for backward.

Shapes: N = any leading dimensions, D model width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm.kernels.arguments import Options, check_labels_fit, check_options
from fastlm.kernels.cross_entropy_op import (
    as_tensor,
    flat,
    refuse_second_derivative,
    times,
)
from fastlm.ops.cross_entropy import cross_entropy_loss, cross_entropy_loss_reference
from fastlm.ops.dispatch import implementation, resolve_implementation
from fastlm.ops.head import Head, head_gradients, head_losses

DEFAULT_MEMORY_BUDGET = 1 << 30  # bytes


@dataclass(frozen=True)
class LinearCrossEntropyPlan:
    """How linear_cross_entropy_loss splits its work."""

    rows_per_chunk: int  # whose logits exist at a time
    chunks: int
    extra_bytes: int  # of memory, beyond inputs, outputs and returned gradients


def linear_cross_entropy_loss(
    hidden: Tensor,  # (..., D) fp32, bf16 or fp16
    weight: Tensor,  # (V, D): the fp32 master, or of hidden's dtype
    targets: Tensor,  # (...) integer labels in [0, V), or ignore_index
    *,
    bias: Tensor | None = None,  # (V,)
    memory_budget: int | None = None,
    num_valid: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """cross_entropy_loss(hidden @ weight.T + bias, targets, ...) without the memory for the logits.

    Options and results are those of `cross_entropy_loss`. The products are computed in autocast's
    dtype where autocast is on, else in hidden's. The weight is cast inside: pass the fp32 parameter
    itself, then its gradient, summed over chunks in fp32, reaches it without rounding.

    `memory_budget`: bytes of memory that may be used beyond inputs and returned gradients; default
    1 GiB. Everything is one chunk where that fits; `linear_cross_entropy_plan` tells. Raises
    ValueError, naming the least that works, for a budget that is too small.

    Ignored rows are left out of the products: on the CPU always; on a GPU, which is not waited for,
    where `num_valid` says how many rows are not ignored (if it is wrong, the loss is NaN).

    The same errors as `cross_entropy_loss`; ValueError or TypeError for shapes or dtypes of weight
    and bias that do not fit. There is no second derivative, except with impl="torch".
    """
    _check(hidden, weight, bias, targets, num_valid)
    check_options(label_smoothing, softcap, z_loss, reduction, num_items)
    dtype = _compute_dtype(hidden)
    options = dict(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        z_loss=z_loss,
    )
    rest = dict(reduction=reduction, num_items=num_items, return_lse=return_lse)
    if resolve_implementation("linear_cross_entropy", impl, hidden.device, dtype) == "torch":
        logits = torch.nn.functional.linear(
            hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        )
        return cross_entropy_loss(logits, targets, impl="torch", **options, **rest)
    # Here, so that a budget that is too small is refused where it was given.
    plan = _plan(hidden, weight, bias, dtype, memory_budget)
    wanted = [
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        for tensor in (hidden, weight, bias)
    ]
    with_gradients = any(wanted) and reduction != "none" and not return_lse
    num_items = as_tensor(num_items, hidden.device)
    loss, lse, *_ = _forward(
        hidden, weight, bias, targets.long(), num_items, *options.values(), reduction,
        return_lse, dtype, wanted, with_gradients, plan.rows_per_chunk, num_valid,
    )  # fmt: skip
    return (loss, lse) if return_lse else loss


def linear_cross_entropy_plan(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    *,
    bias: Tensor | None = None,
    memory_budget: int | None = None,
) -> LinearCrossEntropyPlan:
    """The chunks that linear_cross_entropy_loss uses for these tensors, under this autocast state.

    Raises ValueError, naming the least that works, for a budget that is too small.
    """
    return _plan(hidden, weight, bias, _compute_dtype(hidden), memory_budget)


def linear_cross_entropy_loss_reference(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...)
    *,
    bias: Tensor | None = None,
    **options,  # of cross_entropy_loss_reference
) -> Tensor | tuple[Tensor, Tensor]:
    """All logits at once, then the reference loss: what every implementation is tested against."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    return cross_entropy_loss_reference(logits, targets, **options)


def _plan(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, budget: int | None
) -> LinearCrossEntropyPlan:
    budget = DEFAULT_MEMORY_BUDGET if budget is None else budget
    head = Head(weight, bias, dtype)
    D = hidden.shape[-1]
    N = hidden.numel() // D if D else 0

    def extra_bytes(rows: int, chunks: int) -> int:
        return head.fixed_bytes(chunks) + rows * head.bytes_per_row()

    # Whole, or split: then a 16-bit weight's gradient needs an fp32 sum beside it.
    if extra_bytes(N, 1) <= budget:
        return LinearCrossEntropyPlan(N, 1 if N else 0, extra_bytes(N, 1))
    rows = (budget - head.fixed_bytes(2)) // head.bytes_per_row()
    if rows < 1:
        raise ValueError(
            f"memory_budget={budget}: it must be at least {extra_bytes(1, 2):,} bytes, and 256 "
            f"rows or more for speed ({extra_bytes(256, 2):,})"
        )
    chunks = -(-N // rows)
    rows = -(-N // chunks)  # chunks of one size
    return LinearCrossEntropyPlan(rows, chunks, extra_bytes(rows, chunks))


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, num_valid: int | None
) -> None:
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, weight {tuple(weight.shape)}: they must be "
            f"(..., D) and (V, D)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, not ({weight.shape[0]},) as weight has rows"
        )
    check_labels_fit(hidden.shape, weight.shape[0], targets, what="hidden")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}: it must be a floating-point dtype")
        if tensor is not None and tensor.dtype == torch.float64 != hidden.dtype:
            raise TypeError(f"{name} has dtype float64, hidden {hidden.dtype}: both, or neither")
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}")
    if num_valid is not None and not 0 <= num_valid <= targets.numel():
        raise ValueError(f"num_valid={num_valid}: it must lie in [0, {targets.numel()}]")


# --- The op of torch's dispatcher ---


def _kernels(device: torch.device):
    return implementation("linear_cross_entropy", "auto", device)


_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
_OPTIONS = "int ignore_index, float label_smoothing, float? softcap, float z_loss"
_HOW = "ScalarType dtype, bool[] wanted"
_GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"


@torch.library.custom_op(
    "fastlm::linear_cross_entropy",
    mutates_args=(),
    device_types=("cpu", "cuda"),
    schema=f"({_INPUTS}, Tensor? num_items, {_OPTIONS}, str reduction, bool all_lse, {_HOW}, "
    "bool with_gradients, int rows_per_chunk, int? num_valid) "
    f"-> (Tensor loss, Tensor lse, Tensor stats, Tensor scale, {_GRADIENTS})",
)
def _forward(
    hidden, weight, bias, targets, num_items, ignore_index, label_smoothing, softcap, z_loss,
    reduction, all_lse, dtype, wanted, with_gradients, rows_per_chunk, num_valid,
):  # fmt: skip
    kernels = _kernels(hidden.device)
    V = weight.shape[0]
    scale = kernels.denominator_scale(targets, V, ignore_index, num_items, reduction == "mean")
    losses, lse, stats, gradients = head_losses(
        kernels,
        hidden.reshape(targets.numel(), hidden.shape[-1]),
        Head(weight, bias, dtype),
        targets.reshape(-1).contiguous(),
        Options(ignore_index, label_smoothing, softcap, z_loss),
        all_lse=all_lse,
        gradient_scale=scale if with_gradients else None,
        wanted=wanted,
        rows_per_chunk=rows_per_chunk,
        num_valid=num_valid,
    )
    loss = losses.view(targets.shape) if reduction == "none" else kernels.sum_rows(losses, scale)
    return loss, lse.view(targets.shape), stats, scale, *_shaped(gradients, hidden)


@_forward.register_fake
def _(
    hidden, weight, bias, targets, num_items, ignore_index, label_smoothing, softcap, z_loss,
    reduction, all_lse, dtype, wanted, with_gradients, rows_per_chunk, num_valid,
):  # fmt: skip
    def empty(shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    return (
        empty(targets.shape if reduction == "none" else ()),
        empty(targets.shape),
        empty((targets.numel(), _kernels(hidden.device).STATS_COLUMNS), torch.float64),
        empty(()),
        *_empty_gradients(hidden, weight, bias, [with_gradients and want for want in wanted]),
    )


@torch.library.custom_op(
    "fastlm::linear_cross_entropy_backward",
    mutates_args=(),
    device_types=("cpu", "cuda"),
    schema=f"({_INPUTS}, Tensor lse, Tensor stats, Tensor? grad_losses, Tensor? grad_lse, "
    f"{_OPTIONS}, {_HOW}, int rows_per_chunk) -> ({_GRADIENTS})",
)
def _backward(
    hidden, weight, bias, targets, lse, stats, grad_losses, grad_lse, ignore_index,
    label_smoothing, softcap, z_loss, dtype, wanted, rows_per_chunk,
):  # fmt: skip
    gradients = head_gradients(
        _kernels(hidden.device),
        hidden.reshape(targets.numel(), hidden.shape[-1]),
        Head(weight, bias, dtype),
        targets.reshape(-1).contiguous(),
        lse.reshape(-1),
        stats,
        flat(grad_losses),
        flat(grad_lse),
        Options(ignore_index, label_smoothing, softcap, z_loss),
        wanted=wanted,
        rows_per_chunk=rows_per_chunk,
    )
    return _shaped(gradients, hidden)


@_backward.register_fake
def _(hidden, weight, bias, targets, *rest):
    return _empty_gradients(hidden, weight, bias, rest[-2])


def _shaped(gradients: list[Tensor | None], hidden: Tensor) -> tuple[Tensor, ...]:
    """An op returns tensors: an empty one for a gradient that is not wanted."""
    grad_hidden, *others = gradients
    if grad_hidden is not None:
        grad_hidden = grad_hidden.view(hidden.shape)
    return tuple(hidden.new_empty(0) if g is None else g for g in (grad_hidden, *others))


def _empty_gradients(hidden, weight, bias, wanted) -> tuple[Tensor, ...]:
    tensors = (hidden, weight, bias)
    return tuple(
        t.new_empty(t.shape) if want else hidden.new_empty(0)
        for t, want in zip(tensors, wanted, strict=True)
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, targets, _, *ctx.options = inputs[:9]
    ctx.reduction, _, ctx.dtype, ctx.wanted, ctx.with_gradients, ctx.rows_per_chunk, _ = inputs[9:]
    _, lse, stats, scale, *gradients = output
    ctx.mark_non_differentiable(stats, scale, *gradients)
    ctx.set_materialize_grads(False)
    if ctx.with_gradients:
        ctx.save_for_backward(*gradients)
    else:
        ctx.save_for_backward(hidden, weight, bias, targets, lse, stats, scale)


def _backward_formula(ctx, grad_loss, grad_lse, *_):
    refuse_second_derivative("linear_cross_entropy_loss")
    none = (None,) * 13
    if grad_loss is None and grad_lse is None:
        return None, None, None, *none
    if ctx.with_gradients:
        gradients = [
            times(torch.ops.fastlm.scale_, gradient, grad_loss) if want else None
            for gradient, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)
        ]
        return *gradients, *none
    hidden, weight, bias, targets, lse, stats, scale = ctx.saved_tensors
    if grad_loss is not None and ctx.reduction != "none":
        grad_loss = grad_loss * scale
    gradients = _backward(
        hidden, weight, bias, targets, lse.detach(), stats, grad_loss, grad_lse, *ctx.options,
        ctx.dtype, ctx.wanted, ctx.rows_per_chunk,
    )  # fmt: skip
    wanted = [g if want else None for g, want in zip(gradients, ctx.wanted, strict=True)]
    return *wanted, *none


_forward.register_autograd(_backward_formula, setup_context=_setup_context)
