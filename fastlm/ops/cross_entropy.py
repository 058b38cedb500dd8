"""Cross-entropy over the vocabulary, in fp32 whatever the logits' dtype.

With l = softcap(logits) in fp32 and lse = log(sum_v exp(l_v)), the loss of a row with label y is

    (1 - s) * (lse - l_y) + s * (lse - mean_v l_v) + z_loss * lse^2        s = label_smoothing

softcap(x) = c * tanh(x / c) is Gemma 2's (arXiv:2408.00118 §2), z_loss PaLM's
(arXiv:2204.02311 §5), label smoothing that of torch.nn.functional.cross_entropy.

The op of torch's dispatcher, fastlm::cross_entropy, is defined in kernels/cross_entropy_op.py.
Shapes: N = any leading dimensions, V vocabulary.
"""

import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels.arguments import check_labels_fit, check_options
from fastlm.kernels.cross_entropy_op import define_cross_entropy
from fastlm.ops.dispatch import implementation, resolve_implementation

_op = define_cross_entropy(
    "fastlm",
    {
        device_type: partial(implementation, "cross_entropy", impl, device_type)
        for device_type, impl in (("cpu", "cpp"), ("cuda", "triton"))
    },
)


def cross_entropy_loss(
    logits: Tensor,  # (..., V) fp32, bf16 or fp16; fp64 runs impl "torch"
    targets: Tensor,  # (...) integer labels in [0, V), or ignore_index
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    return_lse: bool = False,
    inplace: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean (or sum, or per-row) cross-entropy of `targets` under softmax(`logits`), in nats.

    Rows labelled `ignore_index` count for nothing; when every row is, the loss is 0 and so are the
    gradients. `num_items` (a number or 0-d tensor) replaces the mean's denominator, the count of
    rows not ignored: the total over all micro-batches, for gradient accumulation. With
    `return_lse`, (loss, lse): lse is (...), fp32 and differentiable.

    `inplace` allows backward to overwrite the logits with their gradient, which saves their size in
    memory; a second backward then raises RuntimeError. Otherwise the logits are never written to,
    and by impl "torch" not even then.

    The loss is fp32: () for "mean" and "sum", (...) for "none". Raises ValueError for arguments
    that do not fit together, TypeError for dtypes. A label out of range: on the CPU ValueError
    names its position; on a GPU, which is not waited for, the loss is NaN and
    `fastlm.check_labels()` raises. There is no second derivative, except with impl="torch".
    """
    check_labels_fit(logits.shape, logits.shape[-1] if logits.dim() else 0, targets)
    check_options(label_smoothing, softcap, z_loss, reduction, num_items)
    if not logits.is_floating_point():
        raise TypeError(f"logits has dtype {logits.dtype}: it must be a floating-point dtype")
    impl = resolve_implementation("cross_entropy", impl, logits.device, logits.dtype)
    options = dict(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        z_loss=z_loss,
        reduction=reduction,
        num_items=num_items,
        return_lse=return_lse,
    )
    if impl == "torch":
        return _torch_cross_entropy(logits, targets, **options)
    if impl == "triton" and logits.device.type == "cpu":  # Triton's interpreter
        from fastlm.kernels import cross_entropy_loss as interpreted

        return interpreted(logits, targets, inplace=inplace, **options)
    return _op(logits, targets, inplace=inplace, **options)


def check_labels() -> None:
    """Raises ValueError if a loss on a GPU has met a label out of range since the last call.

    Such a loss is NaN. Waits for the GPU, once for each that has computed a loss: call it where
    your loop reads the loss anyway. The message names the first such row and its label.
    """
    # Where Triton's kernels have not been loaded, no GPU has computed a loss.
    if "fastlm.kernels.cross_entropy" in sys.modules:
        sys.modules["fastlm.kernels.cross_entropy"].check_labels()


def _torch_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
    num_items: Tensor | float | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """By PyTorch's own functions: on devices without a kernel, in fp64, for second derivatives."""
    # Before any comparison: in a narrower dtype V and ignore_index would wrap around.
    targets = targets.long()
    V = logits.shape[-1]
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_label_range(targets, V, ignore_index)
    rows = logits.reshape(targets.numel(), V)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    labels = targets.reshape(-1)
    if softcap is not None:
        rows = softcap * torch.tanh(rows / softcap)

    lse = None
    if z_loss or return_lse:
        lse = torch.logsumexp(rows, dim=-1)
    # "sum" and our own division: torch's "mean" is NaN when every row is ignored.
    loss = F.cross_entropy(
        rows,
        labels,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none" if z_loss or reduction == "none" else "sum",
    )
    if z_loss:
        # Not a product with the mask: an ignored row's lse may be infinite.
        loss = loss + z_loss * torch.where(labels != ignore_index, lse.square(), 0.0)
    loss = loss.view(targets.shape) if reduction == "none" else loss.sum()
    if reduction == "mean":
        items = _count_valid(labels, ignore_index) if num_items is None else num_items
        loss = (loss / items).to(rows.dtype)  # an fp64 num_items would widen it
    return (loss, lse.view(targets.shape)) if return_lse else loss


def cross_entropy_loss_reference(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...)
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The formula above, step by step: what every implementation is tested against.

    In fp64 for fp64 logits, else in fp32.
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    largest = x.max(dim=-1, keepdim=True).values
    lse = (x - largest).exp().sum(dim=-1).log() + largest.squeeze(-1)

    targets = targets.long()
    valid = targets != ignore_index
    labels = torch.where(valid, targets, 0)
    target_logit = torch.take_along_dim(x, labels.unsqueeze(-1), dim=-1).squeeze(-1)
    loss = lse - target_logit
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - x.mean(dim=-1))
    loss = loss + z_loss * lse.square()
    loss = torch.where(valid, loss, 0.0)

    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (_count_valid(targets, ignore_index) if num_items is None else num_items)
    return (loss, lse) if return_lse else loss


def _count_valid(labels: Tensor, ignore_index: int) -> Tensor:
    """Rows not ignored, at least 1 so that the loss of none is 0 and not NaN."""
    return (labels != ignore_index).sum().clamp(min=1)


def _check_label_range(targets: Tensor, V: int, ignore_index: int) -> None:
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= V))
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"targets{list(position)} = {int(targets[position])}: labels must lie in [0, {V}) "
            f"or be ignore_index ({ignore_index})"
        )
