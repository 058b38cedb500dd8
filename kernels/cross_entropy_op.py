"""Cross-entropy as an op of torch's dispatcher: checks, schema, shapes, autograd formula.

The kernels come from outside, a module for each device type, so that the formula stands here once
for all of them. Imports torch and siblings only.

Shapes: N = any leading dimensions, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from .collect import is_dtensor
from .loss_options import OPTIONS_SCHEMA, LossOptions, Options

_PLAIN = (Tensor, torch.nn.Parameter)
_CASTS = tuple(int if field.type is int else float for field in fields(Options))

# --- Checks ---


def check_tensors(**values: object) -> None:
    """TypeError, naming it, for what is no tensor."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}: it must be a torch.Tensor")


def check_rows(name: str, rows: Tensor, V: int, targets: Tensor) -> None:
    """`rows` (..., anything) must be floating-point, `targets` integers of the leading shape."""
    if is_dtensor(rows):
        raise TypeError(
            f"{name} is a DTensor: the kernels see one device; pass {name}.full_tensor(), or "
            f"{name}.to_local() if each rank has rows of its own"
        )
    if not rows.dim() or rows.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, {name} {tuple(rows.shape)}: targets must "
            f"have the shape of {name} without its last dimension"
        )
    if targets.device != rows.device:
        raise ValueError(f"targets is on {targets.device}, {name} on {rows.device}: move one")
    if V == 0:
        raise ValueError(f"{name} has shape {tuple(rows.shape)} and the vocabulary no entry: V = 0")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets has dtype {targets.dtype}: it must hold integer labels")
    if targets.dtype == torch.uint64:  # as int64, which labels are read in, some are ignore_index
        raise TypeError("targets has dtype torch.uint64: pass targets.long()")
    if not rows.is_floating_point():
        raise TypeError(f"{name} has dtype {rows.dtype}: it must be a floating-point dtype")


def bad_label(position: str, value: int, V: int, ignore_index: int) -> ValueError:
    """The error of a label out of range at `position`, as "[3, 1]"."""
    return ValueError(
        f"targets{position} = {value}: labels must lie in [0, {V}) or be ignore_index "
        f"({ignore_index})"
    )


def is_transformed(*inputs: Tensor | None) -> bool:
    """Under torch.func's transforms, or with tangents of forward-mode AD?"""
    tangents = forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs
    )
    return tangents or torch._C._functorch.peek_interpreter_stack() is not None


def refuse_transforms(name: str, *inputs: Tensor | None) -> None:
    """RuntimeError where is_transformed."""
    if is_transformed(*inputs):
        raise RuntimeError(
            f"{name} has a reverse-mode derivative only, and no batching rule: use impl='torch' "
            f"under torch.func.grad, vmap, jvp and forward-mode AD"
        )


def refuse_other_backwards(
    name: str, *gradients: Tensor | None, twice: str = "impl='torch'"
) -> None:
    """RuntimeError if backward is to be differentiated itself (`twice`: what can be), or runs for a
    batch of gradients."""
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative (create_graph=True): use {twice} for one"
        )
    if any(g is not None and "Batched" in str(torch._C._dispatch_keys(g)) for g in gradients):
        raise RuntimeError(
            f"{name} takes one upstream gradient at a time (is_grads_batched=True): use "
            f"impl='torch' for a batch of them"
        )


# --- The op ---


class RowKernels(Protocol):
    """What the kernels' module of a device brings: functions over rows, that do not wait for it.

    logits, gradients: (N, V), rows any distance apart, elements of a row adjacent; targets: (N,)
    int64; losses, lse: (N,) fp32. saved: (N, ...), what row_gradients needs of each row; only the
    kernels know what is in it.
    """

    def empty_saved(self, N: int, device: torch.device) -> Tensor:
        """`saved` of N rows, not filled."""

    def denominator_scale(
        self, targets: Tensor, V: int, ignore_index: int, num_items: Tensor | None, mean: bool
    ) -> Tensor:
        """0-d fp32: 1 / (num_items, or the labels that count), 1 unless `mean` or if no label
        counts; checks labels, which may have any shape."""

    def row_losses(
        self,
        logits: Tensor,
        targets: Tensor,  # checked
        options: Options,
        *,
        all_lse: bool = False,  # also of ignored rows
        gradient_scale: Tensor | None = None,  # 0-d: also the gradient of scale * sum of losses
        out: Tensor | None = None,  # into this, which may be the logits
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(losses, lse, saved, gradient or None)"""

    def row_gradients(
        self,
        logits: Tensor,
        targets: Tensor,
        saved: Tensor,  # by row_losses, which made no gradient
        grad_losses: Tensor | None,  # (N,), or 0-d for all rows
        grad_lse: Tensor | None,  # (N,)
        options: Options,
        out: Tensor,  # may be the logits
    ) -> None:
        """Gradient of the logits for given gradients of losses and lse."""

    def sum_rows(self, losses: Tensor, scale: Tensor) -> Tensor:
        """scale * sum of the losses, 0-d fp32, in a fixed order."""

    def scale_in_place(self, x: Tensor, factor: Tensor) -> None:
        """x *= factor (0-d), without touching x if it is 1."""


def define_cross_entropy(
    namespace: str,
    device_types: tuple[str, ...],
    row_kernels: Callable[[torch.device], RowKernels],  # loads them when they are first needed
) -> tuple[Callable[..., Any], Callable[[Tensor, Tensor], Tensor]]:
    """Registers ops of `namespace`; returns (loss function, gradient * factor).

    The function takes (logits, targets, checked options, inplace).
    """

    def eager(*arguments: Any) -> bool:
        """Can a call leave out the dispatcher? Only compilers, dispatch modes and subclasses of
        tensors need it, and its way through Python takes longer than a GPU computes."""
        return (
            not torch.compiler.is_compiling()
            and not torch._C._len_torch_dispatch_stack()
            and not any(isinstance(x, Tensor) and type(x) not in _PLAIN for x in arguments)
            and arguments[0].device.type in device_types  # else the dispatcher says what is missing
        )

    # After release, rename an op whenever its schema changes: compiled graphs that torch caches on
    # disk call ops by name, and outlive an upgrade.
    def op(name: str, schema: str, mutates: tuple[str, ...] = (), fake=lambda *arguments: None):
        def decorate(function):
            def call(first, *others):
                if not eager(first, *others):
                    return call.op(first, *others)
                if mutates:
                    increment_version(first)
                return function(first, *others)

            call.function, call.op = function, torch.library.custom_op(
                f"{namespace}::{name}", function, mutates_args=mutates, device_types=device_types,
                schema=schema,
            )  # fmt: skip
            call.op.register_fake(fake)
            return call

        return decorate

    def fake_forward(logits, targets, num_items, reduction, return_lse, with_gradient, *rest):
        return (
            fp32(targets.shape if reduction == "none" else (), logits.device),
            fp32(targets.shape if return_lse else 0, logits.device),
            row_kernels(logits.device).empty_saved(targets.numel(), logits.device),
            fp32((), logits.device),
            logits.new_empty(logits.shape if with_gradient else 0),
        )

    @op(
        "cross_entropy_loss",
        "(Tensor logits, Tensor targets, Tensor? num_items, str reduction, bool return_lse, "
        f"bool with_gradient, bool inplace, {OPTIONS_SCHEMA}) "
        "-> (Tensor loss, Tensor lse, Tensor saved, Tensor scale, Tensor gradient)",
        fake=fake_forward,
    )
    def forward(
        logits, targets, num_items, reduction, return_lse, with_gradient, inplace, *options
    ):  # inplace is for backward alone
        kernels, options = row_kernels(logits.device), Options(*options)
        scale = kernels.denominator_scale(
            targets, logits.shape[-1], options.ignore_index, num_items, reduction == "mean"
        )
        losses, lse, saved, gradient = kernels.row_losses(
            as_rows(logits), targets.reshape(-1).contiguous(), options, all_lse=return_lse,
            gradient_scale=scale if with_gradient else None,
        )  # fmt: skip
        return (
            losses.view_as(targets) if reduction == "none" else kernels.sum_rows(losses, scale),
            lse.view_as(targets) if return_lse else lse.new_empty(0),
            saved,
            scale,
            logits.new_empty(0) if gradient is None else gradient.view_as(logits),
        )

    def write_gradient(logits, targets, saved, grad_losses, grad_lse, options, out):
        row_kernels(logits.device).row_gradients(
            logits, targets.reshape(-1).contiguous(), saved, flat(grad_losses), flat(grad_lse),
            Options(*options), out,
        )  # fmt: skip

    gradient_schema = (
        "Tensor targets, Tensor saved, Tensor? grad_losses, Tensor? grad_lse, " + OPTIONS_SCHEMA
    )

    @op(
        "cross_entropy_gradient", f"(Tensor logits, {gradient_schema}) -> Tensor",
        fake=lambda logits, *others: logits.new_empty(logits.shape),
    )  # fmt: skip
    def gradient_of(logits, targets, saved, grad_losses, grad_lse, *options):
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        rows = as_rows(logits)
        write_gradient(rows, targets, saved, grad_losses, grad_lse, options, as_rows(gradient))
        return gradient

    @op("cross_entropy_gradient_", f"(Tensor(a!) logits, {gradient_schema}) -> ()", ("logits",))
    def gradient_over(logits, targets, saved, grad_losses, grad_lse, *options):
        rows = as_rows(logits)  # a copy if the rows cannot be viewed as one matrix
        write_gradient(rows, targets, saved, grad_losses, grad_lse, options, rows)
        if rows.data_ptr() != logits.data_ptr():
            logits.copy_(rows.view(logits.shape))

    @op("scale_", "(Tensor(a!) x, Tensor factor) -> ()", ("x",))
    def scale_(x, factor):
        row_kernels(x.device).scale_in_place(x, factor)

    def times(gradient: Tensor, factor: Tensor) -> Tensor:
        """gradient * factor (0-d), in fp32. In its own memory if no later backward can want it."""
        if torch.compiler.is_compiling() or type(gradient) is not Tensor:
            return (gradient.float() * factor).to(gradient.dtype)  # one loop, once it is compiled
        if torch._C._autograd._get_current_graph_task_keep_graph():
            gradient = gradient.clone()
        scale_(gradient, factor)
        return gradient

    def setup_context(ctx, inputs, output):
        logits, targets, _, ctx.reduction, _, ctx.with_gradient, ctx.inplace, *ctx.options = inputs
        _, _, saved, scale, gradient = output
        ctx.overwritten = False
        ctx.mark_non_differentiable(saved, scale, gradient)
        ctx.set_materialize_grads(False)
        if ctx.with_gradient:
            ctx.save_for_backward(gradient)
        else:
            ctx.save_for_backward(logits, targets, saved, scale)

    def backward(ctx, grad_loss, grad_lse, *_):
        refuse_other_backwards("cross_entropy_loss", grad_loss, grad_lse)
        if ctx.overwritten:
            raise RuntimeError(
                "backward through cross_entropy_loss(inplace=True) a second time: the first one "
                "has overwritten the logits with their gradient; use inplace=False"
            )
        none = (None,) * (len(ctx.options) + 6)
        if grad_loss is None and grad_lse is None:
            return None, *none
        if ctx.with_gradient:
            return times(ctx.saved_tensors[0], grad_loss), *none
        logits, targets, saved, scale = ctx.saved_tensors
        if grad_loss is not None and ctx.reduction != "none":
            grad_loss = grad_loss * scale
        arguments = targets, saved, grad_loss, grad_lse, *ctx.options
        if not ctx.inplace:
            return gradient_of(logits, *arguments), *none
        ctx.overwritten = not torch.compiler.is_compiling()
        gradient = logits.detach()
        gradient_over(gradient, *arguments)
        return gradient, *none

    forward.op.register_autograd(backward, setup_context=setup_context)

    def eager_forward(ctx, *inputs):
        # Nothing is recorded: were a result known as a view, it could not be changed in place.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            output = forward.function(*inputs)
        setup_context(ctx, inputs, output)
        return output[:2]

    methods = {"forward": staticmethod(eager_forward), "backward": staticmethod(backward)}
    in_eager = type("CrossEntropyLoss", (torch.autograd.Function,), methods)

    def loss_of(logits: Tensor, targets: Tensor, options: LossOptions, inplace: bool):
        if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"logits has dtype {logits.dtype}: it must be float32, bfloat16 or float16"
            )
        if not torch.compiler.is_compiling():
            refuse_transforms("cross_entropy_loss", logits)
        # With the gradient at once the logits are read once. Of no use if the upstream gradient is
        # one per row, nor in a compiled graph, which would multiply it by what is nearly always 1
        # in a second pass over memory; and in float16 a gradient of 1 / num_items vanishes before
        # a GradScaler's factor comes.
        with_gradient = (
            logits.requires_grad
            and torch.is_grad_enabled()
            and not inplace
            and options.reduction != "none"
            and not options.return_lse
            and logits.dtype != torch.float16
            and not torch.compiler.is_compiling()
        )
        # Labels in int64 before any comparison: in a narrower dtype V and ignore_index would wrap.
        targets, items = targets.long(), options.items_on(logits.device)
        call, of_rows = forward.op, options.of_rows
        if eager(logits, targets, items):
            call = in_eager.apply
            of_rows = [x if x is None else cast(x) for cast, x in zip(_CASTS, of_rows, strict=True)]
        loss, lse, *_ = call(
            logits, targets, items, options.reduction,
            options.return_lse, with_gradient, inplace, *of_rows,
        )  # fmt: skip
        return (loss, lse) if options.return_lse else loss

    return loss_of, times


def as_rows(logits: Tensor) -> Tensor:
    """(..., V) as (N, V) with adjacent elements: a view where the strides allow it."""
    rows = logits
    if logits.dim() != 2:
        rows = logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])  # of no rows, too
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def flat(x: Tensor | None) -> Tensor | None:
    """(N,) or 0-d fp32."""
    if x is None:
        return None
    return (x if x.dim() == 0 else x.reshape(-1)).float().contiguous()


def fp32(shape, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)
