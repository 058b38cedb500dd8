"""The output head and its cross-entropy in one op: linear_cross_entropy_loss.

The loss is that of cross_entropy.py for logits = hidden @ weight.T + bias. The logits exist for a
chunk of rows at a time (head.py), and become their own gradient in place; the gradients of hidden,
weight and bias are computed with the loss, while the chunk is there, and kept for backward.

Shapes: N = any leading dimensions, D model width, V vocabulary.
"""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from fastlm.kernels.collect import is_dtensor
from fastlm.kernels.cross_entropy_op import (
    check_rows,
    check_tensors,
    flat,
    fp32,
    refuse_other_backwards,
    refuse_transforms,
)
from fastlm.kernels.loss_options import OPTIONS_SCHEMA, LossOptions, Options, shows_options
from fastlm.ops.cross_entropy import (
    cross_entropy_loss,
    cross_entropy_loss_reference,
    row_kernels,
    times,
)
from fastlm.ops.dispatch import compute_dtype, resolve_implementation
from fastlm.ops.flops import count_flops
from fastlm.ops.head import Head, LinearCrossEntropyPlan, head_gradients, head_losses
from fastlm.ops.registration import LIBRARY, register_op

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastlm.kernels.loss_options import LossKeywords


@overload
def linear_cross_entropy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    memory_budget: int | None = ...,
    num_valid: int | None = ...,
    fp8: bool = ...,
    impl: str = ...,
    return_lse: Literal[False] = ...,
    **options: "Unpack[LossKeywords]",
) -> Tensor: ...
@overload
def linear_cross_entropy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    memory_budget: int | None = ...,
    num_valid: int | None = ...,
    fp8: bool = ...,
    impl: str = ...,
    return_lse: Literal[True],
    **options: "Unpack[LossKeywords]",
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_cross_entropy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    memory_budget: int | None = ...,
    num_valid: int | None = ...,
    fp8: bool = ...,
    impl: str = ...,
    return_lse: bool,
    **options: "Unpack[LossKeywords]",
) -> Tensor | tuple[Tensor, Tensor]: ...
@shows_options
def linear_cross_entropy_loss(
    hidden: Tensor,  # (..., D) fp32, bf16 or fp16
    weight: Tensor,  # (V, D): the fp32 master, or of hidden's dtype
    targets: Tensor,  # (...) integer labels in [0, V), or ignore_index
    *,
    bias: Tensor | None = None,  # (V,)
    memory_budget: int | None = None,
    num_valid: int | None = None,
    fp8: bool = False,
    impl: str = "auto",
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """cross_entropy_loss(hidden @ weight.T + bias, targets, ...) without the memory for the logits.

    Options and results are those of `cross_entropy_loss`. The products are computed in autocast's
    dtype if autocast is on, else in hidden's. The weight is cast inside: pass the fp32 parameter
    itself, then its gradient, summed over chunks in fp32, reaches it without rounding. In float16
    the gradients are computed in backward, after a GradScaler's factor, from logits made again.

    A weight that is a DTensor (FSDP2's, sharded by itself) is gathered here, and its gradient is
    averaged over the mesh, as data parallelism does it.

    `memory_budget`: bytes that may be used beyond inputs and returned gradients. Raises ValueError,
    naming the least that works, for one that is too small. Default: no bound for what the weight
    takes (a cast, an fp32 gradient; both only if its dtype is another), and chunks whose scratch is
    480 MiB, but no fewer than 1,024 rows (on a GPU 4,096). `linear_cross_entropy_plan` tells both.

    Ignored rows are left out of the products: on the CPU always; on a GPU, which is not waited for,
    if `num_valid` says how many rows are not ignored (if it is wrong, the loss is NaN).

    `fp8`: the logits are the product of float8_e4m3fn operands (3 bits of mantissa), each tensor
    with one scale; D and V must be multiples of 16. On NVIDIA's Ada, Hopper and later that product
    takes about half the time; a CPU computes the same slowly. The gradients' products stay as they
    are: rounding the logits' gradient would cost what they gain.

    The same errors as `cross_entropy_loss`; ValueError or TypeError for shapes or dtypes of weight
    and bias that do not fit. There is no second derivative, except with impl="torch".
    """
    checked = LossOptions.of(linear_cross_entropy_loss, options)
    weight, bias = _whole(weight), _whole(bias)
    _check(hidden, weight, bias, targets)
    dtype = compute_dtype(hidden)
    by_torch = resolve_implementation("linear_cross_entropy", impl, hidden.device, dtype) == "torch"
    if fp8:
        _check_fp8(hidden, weight, by_torch)
    if by_torch:
        b = None if bias is None else bias.to(dtype)
        logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), b)
        return cross_entropy_loss(logits, targets, impl="torch", **options)
    if not torch.compiler.is_compiling():
        refuse_transforms("linear_cross_entropy_loss", hidden, weight, bias)
        count_flops(_FLOPS)
    wanted = [
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        for tensor in (hidden, weight, bias)
    ]
    # In float16 a gradient of 1 / num_items vanishes before a GradScaler's factor comes.
    with_gradients = (
        any(wanted)
        and checked.reduction != "none"
        and not checked.return_lse
        and dtype != torch.float16
    )
    loss, lse, *_ = _forward(
        hidden, weight, bias, targets.long(), checked.items_on(hidden.device), checked.reduction,
        checked.return_lse, dtype, wanted, with_gradients, memory_budget, num_valid, fp8,
        *checked.of_rows,
    )  # fmt: skip
    return (loss, lse) if checked.return_lse else loss


def linear_cross_entropy_plan(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    *,
    bias: Tensor | None = None,
    memory_budget: int | None = None,
    fp8: bool = False,
) -> LinearCrossEntropyPlan:
    """The chunks that linear_cross_entropy_loss uses for these tensors, under this autocast state.

    Raises ValueError, naming the least that works, for a budget that is too small.
    """
    N = hidden.shape[:-1].numel()
    return Head(weight, bias, compute_dtype(hidden), fp8).plan(N, memory_budget)


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


def _whole(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or not is_dtensor(parameter):
        return parameter
    from torch.distributed.tensor import Partial

    # Each rank's gradient belongs to the mean over its own rows: average them. full_tensor() by
    # itself takes them to be equal. Ranks with the same rows average equal gradients.
    average = [Partial("avg")] * parameter.device_mesh.ndim  # type: ignore[attr-defined]
    return parameter.full_tensor(grad_placements=average)  # type: ignore[attr-defined]


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    check_tensors(hidden=hidden, weight=weight, targets=targets)
    if bias is not None:
        check_tensors(bias=bias)
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, weight {tuple(weight.shape)}: they must be "
            f"(..., D) and (V, D)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, not ({weight.shape[0]},) as weight has rows"
        )
    check_rows("hidden", hidden, weight.shape[0], targets)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}: it must be a floating-point dtype")
        if tensor.dtype == torch.float64 != hidden.dtype:
            raise TypeError(f"{name} has dtype float64, hidden {hidden.dtype}: both, or neither")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}")


def _check_fp8(hidden: Tensor, weight: Tensor, by_torch: bool) -> None:
    V, D = weight.shape
    if D % 16 or V % 16:
        raise ValueError(f"fp8: D={D} and V={V} must be multiples of 16; pad them, or leave it out")
    if by_torch:
        raise ValueError(f"fp8: impl 'torch' has none ({hidden.device}, {hidden.dtype})")


# --- The op of torch's dispatcher. The chunks are planned inside, for no shape to enter Python. ---

_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
_GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"


def _fake_forward(
    hidden, weight, bias, targets, num_items, reduction, return_lse, dtype, wanted, with_gradients,
    *rest,
):  # fmt: skip
    device = hidden.device
    return (
        fp32(targets.shape if reduction == "none" else (), device),
        fp32(targets.shape if return_lse else 0, device),
        row_kernels(device).empty_saved(0 if with_gradients else targets.numel(), device),
        fp32((), device),
        *_empty_gradients(hidden, weight, bias, [with_gradients and want for want in wanted]),
    )


@register_op(
    "linear_cross_entropy_loss",
    f"({_INPUTS}, Tensor? num_items, str reduction, bool return_lse, ScalarType dtype, "
    "bool[] wanted, bool with_gradients, SymInt? memory_budget, SymInt? num_valid, bool fp8, "
    f"{OPTIONS_SCHEMA}) -> (Tensor loss, Tensor lse, Tensor saved, Tensor scale, {_GRADIENTS})",
    _fake_forward, "CPU", "CUDA",
)  # fmt: skip
def _forward(
    hidden, weight, bias, targets, num_items, reduction, return_lse, dtype, wanted, with_gradients,
    memory_budget, num_valid, fp8, *options,
):  # fmt: skip
    N = targets.numel()
    if num_valid is not None and not 0 <= num_valid <= N:
        raise ValueError(f"num_valid={num_valid}: it must lie in [0, {N}]")
    kernels, options = row_kernels(hidden.device), Options(*options)
    V = weight.shape[0]
    scale = kernels.denominator_scale(
        targets, V, options.ignore_index, num_items, reduction == "mean"
    )
    losses, lse, saved, gradients = head_losses(
        kernels, hidden.reshape(N, hidden.shape[-1]), Head(weight, bias, dtype, fp8),
        targets.reshape(-1).contiguous(), options, all_lse=return_lse,
        gradient_scale=scale if with_gradients else None, wanted=wanted,
        memory_budget=memory_budget, num_valid=num_valid,
    )  # fmt: skip
    loss = losses.view(targets.shape) if reduction == "none" else kernels.sum_rows(losses, scale)
    lse = lse.view(targets.shape) if return_lse else lse
    return loss, lse, saved, scale, *_shaped(gradients, hidden)


@register_op(
    "linear_cross_entropy_gradient",
    f"({_INPUTS}, Tensor saved, Tensor? grad_losses, Tensor? grad_lse, ScalarType dtype, "
    f"bool[] wanted, SymInt? memory_budget, bool fp8, {OPTIONS_SCHEMA}) -> ({_GRADIENTS})",
    lambda hidden, weight, bias, targets, saved, grad_losses, grad_lse, dtype, wanted, *rest: (
        _empty_gradients(hidden, weight, bias, wanted)
    ),
    "CPU", "CUDA",
)  # fmt: skip
def _gradient(
    hidden, weight, bias, targets, saved, grad_losses, grad_lse, dtype, wanted, memory_budget,
    fp8, *options,
):  # fmt: skip
    gradients = head_gradients(
        row_kernels(hidden.device), hidden.reshape(targets.numel(), hidden.shape[-1]),
        Head(weight, bias, dtype, fp8), targets.reshape(-1).contiguous(), saved, flat(grad_losses),
        flat(grad_lse), Options(*options), wanted=wanted, memory_budget=memory_budget,
    )  # fmt: skip
    return _shaped(gradients, hidden)


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
    (
        hidden, weight, bias, targets, _, ctx.reduction, _, ctx.dtype, ctx.wanted,
        ctx.with_gradients, ctx.memory_budget, _, ctx.fp8, *ctx.options,
    ) = inputs  # fmt: skip
    _, _, saved, scale, *gradients = output
    ctx.mark_non_differentiable(saved, scale, *gradients)
    ctx.set_materialize_grads(False)
    if ctx.with_gradients:
        ctx.save_for_backward(*gradients)
    else:
        ctx.save_for_backward(hidden, weight, bias, targets, saved, scale)


def _backward(ctx, grad_loss, grad_lse, *_):
    refuse_other_backwards("linear_cross_entropy_loss", grad_loss, grad_lse)
    none = (None,) * (len(ctx.options) + 10)
    if grad_loss is None and grad_lse is None:
        return None, None, None, *none
    if ctx.with_gradients:
        gradients = [
            times(gradient, grad_loss) if want else None
            for gradient, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)
        ]
        return *gradients, *none
    hidden, weight, bias, targets, saved, scale = ctx.saved_tensors
    if grad_loss is not None and ctx.reduction != "none":
        grad_loss = grad_loss * scale
    gradients = _gradient(
        hidden, weight, bias, targets, saved, grad_loss, grad_lse, ctx.dtype, ctx.wanted,
        ctx.memory_budget, ctx.fp8, *ctx.options,
    )  # fmt: skip
    wanted = [g if want else None for g, want in zip(gradients, ctx.wanted, strict=True)]
    return *wanted, *none


torch.library.register_autograd(_forward, _backward, setup_context=_setup_context, lib=LIBRARY)


# --- FlopCounterMode ---


def _loss_flops(hidden, weight, *rest, out_val, **kwargs) -> int:
    """Counts the logits, and as much again for each of the gradients of hidden and weight."""
    made = sum(gradient.dim() > 1 for gradient in out_val[-3:-1])
    return (1 + made) * 2 * hidden.numel() * weight.shape[0]


_FLOPS = {
    torch.ops.fastlm.linear_cross_entropy_loss: _loss_flops,
    torch.ops.fastlm.linear_cross_entropy_gradient: _loss_flops,
}
