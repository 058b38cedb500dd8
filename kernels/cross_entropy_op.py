"""Cross-entropy as an op of torch's dispatcher: schema, shapes, autograd formula; no kernel.

The kernels come from outside, one set for each device type, so that the formula stands here once
for all of them. Imports torch and siblings only.

Shapes: N = any leading dimensions, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .arguments import Options, check_labels_fit, check_options


class RowKernels(Protocol):
    """What a device must bring: functions over rows, none of which waits for the device.

    logits, gradients: (N, V), rows any distance apart, elements of a row adjacent; targets: (N,)
    int64; losses, lse: (N,) fp32. stats: (N, STATS_COLUMNS) fp64, what row_gradients needs besides
    the lse, of which alone a gradient cannot be computed: of logits near 1e4 its rounding to fp32
    would be an error of 1e-3 in every probability.
    """

    STATS_COLUMNS: int

    def denominator_scale(
        self, targets: Tensor, V: int, ignore_index: int, num_items: Tensor | None, mean: bool
    ) -> Tensor:
        """0-d fp32: 1 / (num_items, or the labels that count), 1 unless `mean`; checks labels."""

    def row_losses(
        self,
        logits: Tensor,
        targets: Tensor,
        options: Options,
        *,
        all_lse: bool = False,  # also of ignored rows
        gradient_scale: Tensor | None = None,  # 0-d: also the gradient of scale * sum of losses
        out: Tensor | None = None,  # into this, which may be the logits
        stats: Tensor | None = None,  # written; None: not wanted
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(losses, lse, gradient or None)"""

    def row_gradients(
        self,
        logits: Tensor,
        targets: Tensor,
        lse: Tensor,
        grad_losses: Tensor | None,  # (N,), or 0-d for all rows
        grad_lse: Tensor | None,  # (N,)
        options: Options,
        out: Tensor,  # may be the logits
        *,
        stats: Tensor,  # as row_losses wrote them when it made no gradient
    ) -> None:
        """Gradient of the logits for given gradients of losses and lse."""

    def sum_rows(self, losses: Tensor, scale: Tensor) -> Tensor:
        """scale * sum of the losses, 0-d fp32, in a fixed order."""

    def scale_in_place(self, x: Tensor, factor: Tensor) -> None:
        """x *= factor (0-d), without touching x where it is 1."""


def define_cross_entropy(
    namespace: str, row_kernels: dict[str, Callable[[], RowKernels]]
) -> Callable[..., Any]:
    """Registers `namespace::cross_entropy` and what its backward needs; returns the loss function.

    row_kernels: for each device type what loads its kernels, called when they are first needed.
    The function takes (logits, targets, *, ...) as `cross_entropy_loss` does, less `impl`.
    """
    # Of a released version: a schema is not changed without another name. Compiled graphs that
    # torch caches on disk call ops by name, and outlive an upgrade.
    device_types = tuple(row_kernels)
    options_schema = "int ignore_index, float label_smoothing, float? softcap, float z_loss"

    @torch.library.custom_op(
        f"{namespace}::cross_entropy",
        mutates_args=(),
        device_types=device_types,
        schema=f"(Tensor logits, Tensor targets, Tensor? num_items, {options_schema}, "
        "str reduction, bool all_lse, bool with_gradient, bool inplace) "
        "-> (Tensor loss, Tensor lse, Tensor stats, Tensor scale, Tensor gradient)",
    )
    def forward(
        logits, targets, num_items, ignore_index, label_smoothing, softcap, z_loss, reduction,
        all_lse, with_gradient, inplace,
    ):  # fmt: skip
        # inplace is for backward alone.
        kernels = row_kernels[logits.device.type]()
        options = Options(ignore_index, label_smoothing, softcap, z_loss)
        V = logits.shape[-1]
        scale = kernels.denominator_scale(targets, V, ignore_index, num_items, reduction == "mean")
        stats = torch.empty(
            (targets.numel(), kernels.STATS_COLUMNS), dtype=torch.float64, device=logits.device
        )
        losses, lse, gradient = kernels.row_losses(
            as_rows(logits),
            targets.reshape(-1).contiguous(),
            options,
            all_lse=all_lse,
            gradient_scale=scale if with_gradient else None,
            stats=stats,
        )
        if reduction == "none":
            loss = losses.view(targets.shape)
        else:
            loss = kernels.sum_rows(losses, scale)
        gradient = logits.new_empty(0) if gradient is None else gradient.view(logits.shape)
        return loss, lse.view(targets.shape), stats, scale, gradient

    @forward.register_fake
    def _(
        logits, targets, num_items, ignore_index, label_smoothing, softcap, z_loss, reduction,
        all_lse, with_gradient, inplace,
    ):  # fmt: skip
        def fp32(shape):
            return torch.empty(shape, dtype=torch.float32, device=logits.device)

        return (
            fp32(targets.shape if reduction == "none" else ()),
            fp32(targets.shape),
            torch.empty(
                (targets.numel(), row_kernels[logits.device.type]().STATS_COLUMNS),
                dtype=torch.float64,
                device=logits.device,
            ),
            fp32(()),
            logits.new_empty(logits.shape if with_gradient else 0),
        )

    backward_schema = (
        "Tensor targets, Tensor lse, Tensor stats, Tensor? grad_losses, Tensor? grad_lse, "
        + options_schema
    )

    @torch.library.custom_op(
        f"{namespace}::cross_entropy_backward",
        mutates_args=(),
        device_types=device_types,
        schema=f"(Tensor logits, {backward_schema}) -> Tensor",
    )
    def backward(
        logits, targets, lse, stats, grad_losses, grad_lse, ignore_index, label_smoothing, softcap,
        z_loss,
    ):  # fmt: skip
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        row_kernels[logits.device.type]().row_gradients(
            as_rows(logits),
            targets.reshape(-1).contiguous(),
            lse.reshape(-1),
            flat(grad_losses),
            flat(grad_lse),
            Options(ignore_index, label_smoothing, softcap, z_loss),
            as_rows(gradient),
            stats=stats,
        )
        return gradient

    @backward.register_fake
    def _(logits, *rest):
        return logits.new_empty(logits.shape)

    @torch.library.custom_op(
        f"{namespace}::cross_entropy_backward_",
        mutates_args=("logits",),
        device_types=device_types,
        schema=f"(Tensor(a!) logits, {backward_schema}) -> ()",
    )
    def backward_(
        logits, targets, lse, stats, grad_losses, grad_lse, ignore_index, label_smoothing, softcap,
        z_loss,
    ):  # fmt: skip
        rows = as_rows(logits)  # a copy where the rows cannot be viewed as one matrix
        row_kernels[logits.device.type]().row_gradients(
            rows,
            targets.reshape(-1).contiguous(),
            lse.reshape(-1),
            flat(grad_losses),
            flat(grad_lse),
            Options(ignore_index, label_smoothing, softcap, z_loss),
            rows,
            stats=stats,
        )
        if rows.data_ptr() != logits.data_ptr():
            logits.copy_(rows.view(logits.shape))

    @backward_.register_fake
    def _(logits, *rest):
        return None

    @torch.library.custom_op(
        f"{namespace}::scale_",
        mutates_args=("x",),
        device_types=device_types,
        schema="(Tensor(a!) x, Tensor factor) -> ()",
    )
    def scale_(x, factor):
        row_kernels[x.device.type]().scale_in_place(x, factor)

    @scale_.register_fake
    def _(x, factor):
        return None

    def setup_context(ctx, inputs, output):
        logits, targets, _, *ctx.options, ctx.reduction, _, ctx.with_gradient, ctx.inplace = inputs
        _, lse, stats, scale, gradient = output
        ctx.overwritten = False
        ctx.mark_non_differentiable(stats, scale, gradient)
        ctx.set_materialize_grads(False)
        if ctx.with_gradient:
            ctx.save_for_backward(gradient)
        else:
            ctx.save_for_backward(logits, targets, lse, stats, scale)

    def backward_formula(ctx, grad_loss, grad_lse, *_):
        refuse_second_derivative("cross_entropy_loss")
        if ctx.overwritten:
            raise RuntimeError(
                "backward through cross_entropy_loss(inplace=True) a second time: the first one "
                "has overwritten the logits with their gradient; use inplace=False"
            )
        none = (None,) * (len(ctx.options) + 6)
        if grad_loss is None and grad_lse is None:
            return None, *none
        if ctx.with_gradient:
            (gradient,) = ctx.saved_tensors
            return times(scale_, gradient, grad_loss), *none
        logits, targets, lse, stats, scale = ctx.saved_tensors
        if grad_loss is not None and ctx.reduction != "none":
            grad_loss = grad_loss * scale
        arguments = targets, lse.detach(), stats, grad_loss, grad_lse, *ctx.options
        if not ctx.inplace:
            return backward(logits, *arguments), *none
        ctx.overwritten = not torch.compiler.is_compiling()
        gradient = logits.detach()
        backward_(gradient, *arguments)
        return gradient, *none

    forward.register_autograd(backward_formula, setup_context=setup_context)

    def cross_entropy_loss(
        logits: Tensor,
        targets: Tensor,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        reduction: str = "mean",
        num_items: Tensor | float | None = None,
        return_lse: bool = False,
        inplace: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Mean (or sum, or per-row) cross-entropy, in nats, fp32.

        logits: (..., V) fp32, bf16 or fp16; targets: (...) integers in [0, V), or ignore_index.
        Ignored rows count for nothing; of none left, loss and gradients are 0. num_items replaces
        the mean's denominator. return_lse: (loss, lse), lse (...) after softcap, differentiable.
        inplace allows backward to overwrite the logits; a second backward then raises.
        Raises ValueError and TypeError for arguments that do not fit. On a GPU a label out of range
        makes the loss NaN, and check_labels() raises.
        """
        check_labels_fit(logits.shape, logits.shape[-1] if logits.dim() else 0, targets)
        check_options(label_smoothing, softcap, z_loss, reduction, num_items)
        if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"logits has dtype {logits.dtype}: it must be float32, bfloat16 or float16"
            )
        if logits.device.type not in row_kernels:
            raise ValueError(
                f"logits is on {logits.device}: there are kernels for {', '.join(row_kernels)}"
            )
        # Before any comparison: in a narrower dtype V and ignore_index would wrap around.
        targets = targets.long()
        num_items = as_tensor(num_items, logits.device)
        options = (ignore_index, label_smoothing, softcap, z_loss)
        needs_gradient = logits.requires_grad and torch.is_grad_enabled()
        # With the gradient at once the logits are read once. Of no use where the upstream gradient
        # is one per row, nor in a compiled graph, which would multiply it by what is nearly
        # always 1 in a second pass over memory.
        with_gradient = (
            needs_gradient
            and not inplace
            and reduction != "none"
            and not return_lse
            and not torch.compiler.is_compiling()
        )
        loss, lse, *_ = forward(
            logits, targets, num_items, *options, reduction, return_lse, with_gradient, inplace
        )
        return (loss, lse) if return_lse else loss

    return cross_entropy_loss


def as_rows(logits: Tensor) -> Tensor:
    """(..., V) as (N, V) with adjacent elements: a view where the strides allow it."""
    rows = logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])  # of no rows, too
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def as_tensor(num_items: Tensor | float | None, device: torch.device) -> Tensor | None:
    """num_items as a 0-d tensor on `device`."""
    if num_items is None:
        return None
    if isinstance(num_items, Tensor):
        return num_items.detach().to(device)
    return torch.full((), num_items, dtype=torch.float32, device=device)


def refuse_second_derivative(name: str) -> None:
    """RuntimeError where backward runs to be differentiated itself (create_graph=True)."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} has no second derivative (create_graph=True): use impl='torch' for one"
        )


def times(scale_: Callable[[Tensor, Tensor], None], gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor (0-d). Into its own memory where no later backward can want it again."""
    traced = torch.compiler.is_compiling() or type(gradient) is not Tensor
    if traced or _graph_is_kept():
        return gradient * factor.to(gradient.dtype)
    scale_(gradient, factor)
    return gradient


def _graph_is_kept() -> bool:
    """Was the backward that runs now called with retain_graph? True where torch does not tell."""
    try:
        return torch._C._autograd._get_current_graph_task_keep_graph()
    except AttributeError:
        return True


def flat(x: Tensor | None) -> Tensor | None:
    """(N,) or 0-d fp32."""
    if x is None:
        return None
    return (x if x.dim() == 0 else x.reshape(-1)).float().contiguous()
