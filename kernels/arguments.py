"""What the losses accept: checks shared by every implementation, and the options that kernels take.

Imports torch only, so that the checks run where Triton is not installed.
Shapes: N rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """What the loss of a row depends on besides its logits and its label."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    z_loss: float = 0.0


def check_labels_fit(shape: tuple[int, ...], V: int, targets: Tensor, what: str = "logits") -> None:
    """`targets` must be integers of the shape of the rows, `shape` without its last dimension."""
    if not shape or tuple(shape[:-1]) != tuple(targets.shape):
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, {what} {tuple(shape)}: targets must have "
            f"the shape of {what} without its last dimension"
        )
    if V == 0:
        raise ValueError(f"{what} has shape {tuple(shape)} and the vocabulary no entry: V is 0")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets has dtype {targets.dtype}: it must hold integer labels")


def check_options(
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
    num_items: Tensor | float | None,
) -> None:
    """The options that every loss takes, and whether they fit together."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing}: it must lie in [0, 1]")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap}: it must be positive, or None for no cap")
    if not 0.0 <= z_loss < math.inf:
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
