"""Cross-entropy over the vocabulary, in fp32 whatever the logits' dtype.

With l = softcap(logits) in fp32 and lse = log(sum_v exp(l_v)), the loss of a row with label y is

    (1 - s) * (lse - l_y) + s * (lse - mean_v l_v) + z_loss * lse^2        s = label_smoothing

softcap(x) = c * tanh(x / c) is Gemma 2's (arXiv:2408.00118 §2), z_loss PaLM's
(arXiv:2204.02311 §5), label smoothing that of torch.nn.functional.cross_entropy.

Shapes: N = any leading dimensions, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops.dispatch import resolve_implementation


def cross_entropy_loss(
    logits: Tensor,  # (..., V) fp32, bf16 or fp16
    targets: Tensor,  # (...) integer labels in [0, V), or ignore_index
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean (or sum, or per-row) cross-entropy of `targets` under softmax(`logits`), in nats.

    Rows labelled `ignore_index` count for nothing; when every row is, the loss is 0 and so are the
    gradients. `num_items` (a number or 0-d tensor) replaces the mean's denominator, the count of
    rows not ignored: the total over all micro-batches, for gradient accumulation. With
    `return_lse`, (loss, lse): lse is (...), fp32 and differentiable.

    The loss is fp32: () for "mean" and "sum", (...) for "none". Raises ValueError for arguments
    that do not fit together and, on CPU outside torch.compile, for a label out of range.
    """
    _check(logits, targets, label_smoothing, softcap, z_loss, reduction, num_items)
    resolve_implementation("cross_entropy", impl, logits.device)
    # Before any comparison: in a narrower dtype V and ignore_index would wrap around.
    targets = targets.long()
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_labels(targets, logits.shape[-1], ignore_index)

    V = logits.shape[-1]
    rows = logits.reshape(-1, V)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    labels = targets.reshape(-1)
    if softcap is not None:
        rows = softcap * torch.tanh(rows / softcap)

    lse = None
    if z_loss or return_lse:
        lse = torch.logsumexp(rows, dim=-1)
    if z_loss or reduction == "none":
        loss = F.cross_entropy(
            rows,
            labels,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",
        )
        if z_loss:
            # Not a product with the mask: an ignored row's lse may be infinite.
            loss = loss + z_loss * torch.where(labels != ignore_index, lse.square(), 0.0)
        loss = loss.view(targets.shape) if reduction == "none" else loss.sum()
    else:
        # "sum" and our own division: torch's "mean" is NaN when every row is ignored.
        loss = F.cross_entropy(
            rows,
            labels,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="sum",
        )
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


def _check(logits, targets, label_smoothing, softcap, z_loss, reduction, num_items) -> None:
    if logits.dim() < 1 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, logits {tuple(logits.shape)}: targets must "
            f"have the shape of logits without its last dimension, the vocabulary"
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: the vocabulary is empty")
    if not logits.is_floating_point():
        raise TypeError(f"logits has dtype {logits.dtype}: it must be a floating-point dtype")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets has dtype {targets.dtype}: it must hold integer labels")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing}: it must lie in [0, 1]")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: it must be positive, or None for no cap")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss={z_loss}: it must be 0 (none) or positive")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: it must be 'mean', 'sum' or 'none'")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items replaces the mean's denominator; reduction is {reduction!r}")
    # A tensor's value is not read: that would wait for the device.
    if isinstance(num_items, Tensor):
        if num_items.dim():
            raise ValueError(f"num_items has shape {tuple(num_items.shape)}: it must be 0-d")
    elif num_items is not None and not num_items > 0:
        raise ValueError(f"num_items={num_items}: it must be positive")


def _check_labels(targets: Tensor, V: int, ignore_index: int) -> None:
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= V))
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"targets{list(position)} = {int(targets[position])}: labels must lie in [0, {V}) "
            f"or be ignore_index ({ignore_index})"
        )
