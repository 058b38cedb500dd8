"""Cross-entropy over the vocabulary, in fp32 whatever the logits' dtype.

With l = softcap(logits) in fp32 and lse = log(sum_v exp(l_v)), the loss of a row with label y is

    (1 - s) * (lse - l_y) + s * (lse - mean_v l_v) + z_loss * lse^2        s = label_smoothing

softcap(x) = c * tanh(x / c) is Gemma 2's (arXiv:2408.00118 §2), z_loss PaLM's
(arXiv:2204.02311 §5), label smoothing that of torch.nn.functional.cross_entropy.

The op of torch's dispatcher and the options: kernels/cross_entropy_op.py.
Shapes: N = any leading dimensions, V vocabulary.
"""

import sys
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels.cross_entropy_op import (
    bad_label,
    check_rows,
    check_tensors,
    define_cross_entropy,
    is_transformed,
)
from fastlm.kernels.loss_options import LossOptions, shows_options
from fastlm.ops.dispatch import implementation, resolve_implementation

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastlm.kernels.loss_options import LossKeywords

row_kernels = cache(partial(implementation, "cross_entropy", "auto"))  # the module for a device
_loss_of, times = define_cross_entropy("fastlm", ("cpu", "cuda"), row_kernels)


@overload
def cross_entropy_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    inplace: bool = ...,
    impl: str = ...,
    return_lse: Literal[False] = ...,
    **options: "Unpack[LossKeywords]",
) -> Tensor: ...
@overload
def cross_entropy_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    inplace: bool = ...,
    impl: str = ...,
    return_lse: Literal[True],
    **options: "Unpack[LossKeywords]",
) -> tuple[Tensor, Tensor]: ...
@overload
def cross_entropy_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    inplace: bool = ...,
    impl: str = ...,
    return_lse: bool,
    **options: "Unpack[LossKeywords]",
) -> Tensor | tuple[Tensor, Tensor]: ...
@shows_options
def cross_entropy_loss(
    logits: Tensor,  # (..., V) fp32, bf16 or fp16; fp64 runs impl "torch"
    targets: Tensor,  # (...) integer labels in [0, V), or ignore_index
    *,
    inplace: bool = False,
    impl: str = "auto",
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean (or sum, or per-row) cross-entropy of `targets` under softmax(`logits`), in nats.

    Rows labelled `ignore_index` count for nothing; when every row is, the loss is 0 and so are the
    gradients. `num_items` (a number or one-element tensor) replaces the mean's denominator, the
    count of rows not ignored: the total over all micro-batches, for gradient accumulation. With
    `return_lse`, (loss, lse): lse is (...), fp32 and differentiable.

    `inplace` allows backward to overwrite the logits with their gradient, which saves their size in
    memory; a second backward then raises RuntimeError. Otherwise the logits are never written to,
    and by impl "torch" not even then.

    The loss is fp32: () for "mean" and "sum", (...) for "none". Raises ValueError for arguments
    that do not fit together, TypeError for dtypes. A label out of range: on the CPU ValueError
    names its position; on a GPU, which is not waited for, the loss is NaN and
    `fastlm.check_labels()` raises. There is no second derivative, except with impl="torch".
    """
    checked = LossOptions.of(cross_entropy_loss, options)
    check_tensors(logits=logits, targets=targets)
    check_rows("logits", logits, logits.shape[-1] if logits.dim() else 0, targets)
    if resolve_implementation("cross_entropy", impl, logits.device, logits.dtype) == "torch":
        return _torch_cross_entropy(logits, targets, checked)
    return _loss_of(logits, targets, checked, inplace)


def check_labels() -> None:
    """Raises ValueError if a loss on a GPU has met a label out of range since the last call.

    Such a loss is NaN. Waits for the GPU, once for each that has computed a loss: call it where
    your loop reads the loss anyway. The message names the first such row and its label.
    """
    # Where Triton's kernels have not been loaded, no GPU has computed a loss.
    if "fastlm.kernels.cross_entropy" in sys.modules:
        sys.modules["fastlm.kernels.cross_entropy"].check_labels()


def _torch_cross_entropy(
    logits: Tensor, targets: Tensor, o: LossOptions
) -> Tensor | tuple[Tensor, Tensor]:
    """By PyTorch's own functions: on devices without a kernel, in fp64, for second derivatives."""
    # Before any comparison: in a narrower dtype V and ignore_index would wrap around.
    targets = targets.long()
    V = logits.shape[-1]
    read = targets.device.type == "cpu" and not torch.compiler.is_compiling()
    if read and not is_transformed(targets):  # under vmap F.cross_entropy has its own check
        _check_label_range(targets, V, o.ignore_index)
    rows = logits.reshape(targets.numel(), V)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    labels = targets.reshape(-1)
    if o.softcap is not None:
        rows = o.softcap * torch.tanh(rows / o.softcap)

    lse = None
    if o.z_loss or o.return_lse:
        lse = torch.logsumexp(rows, dim=-1)
    # "sum" and our own division: torch's "mean" is NaN when every row is ignored.
    loss = F.cross_entropy(
        rows,
        labels,
        ignore_index=o.ignore_index,
        label_smoothing=o.label_smoothing,
        reduction="none" if o.z_loss or o.reduction == "none" else "sum",
    )
    if o.z_loss:
        # Not a product with the mask: an ignored row's lse may be infinite.
        loss = loss + o.z_loss * torch.where(labels != o.ignore_index, lse.square(), 0.0)
    loss = loss.view(targets.shape) if o.reduction == "none" else loss.sum()
    if o.reduction == "mean":
        loss = (loss / _items(labels, o)).to(rows.dtype)  # an fp64 num_items would widen it
    return (loss, lse.view(targets.shape)) if o.return_lse else loss


def cross_entropy_loss_reference(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...)
    **options,  # of cross_entropy_loss
) -> Tensor | tuple[Tensor, Tensor]:
    """The formula above, step by step: what every implementation is tested against.

    In fp64 for fp64 logits, else in fp32.
    """
    o = LossOptions(**options)
    x = logits if logits.dtype == torch.float64 else logits.float()
    if o.softcap is not None:
        x = o.softcap * torch.tanh(x / o.softcap)
    largest = x.max(dim=-1, keepdim=True).values
    lse = (x - largest).exp().sum(dim=-1).log() + largest.squeeze(-1)

    targets = targets.long()
    valid = targets != o.ignore_index
    labels = torch.where(valid, targets, 0)
    target_logit = torch.take_along_dim(x, labels.unsqueeze(-1), dim=-1).squeeze(-1)
    loss = lse - target_logit
    if o.label_smoothing:
        loss = (1 - o.label_smoothing) * loss + o.label_smoothing * (lse - x.mean(dim=-1))
    loss = loss + o.z_loss * lse.square()
    loss = torch.where(valid, loss, 0.0)

    if o.reduction != "none":
        loss = loss.sum()
    if o.reduction == "mean":
        loss = loss / _items(targets, o)
    return (loss, lse) if o.return_lse else loss


def _items(labels: Tensor, o: LossOptions) -> Tensor:
    """The mean's denominator; 1 if no row counts, so that the loss of none is 0 and not NaN."""
    count = (labels != o.ignore_index).sum()
    items = o.items_on(labels.device)
    return count.clamp(min=1) if items is None else torch.where(count == 0, 1, items)


def _check_label_range(targets: Tensor, V: int, ignore_index: int) -> None:
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= V))
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        raise bad_label(str(list(position)), int(targets[position]), V, ignore_index)
