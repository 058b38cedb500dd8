"""The row kernels of the CPU, csrc/cross_entropy.cpp: no result depends on the number of threads.

The functions of fastlm.kernels.cross_entropy_op.RowKernels. N rows, V vocabulary.
"""

import torch
from torch import Tensor

from fastlm.extension import extension
from fastlm.kernels.cross_entropy_op import bad_label
from fastlm.kernels.loss_options import Options

KIND = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def empty_saved(N: int, device: torch.device) -> Tensor:
    """(N, 2) fp64: the largest l and the sum of exp(l - largest). Not the lse: of logits near 1e4
    its rounding to fp32 would be an error of 1e-3 in every probability."""
    return torch.empty((N, 2), dtype=torch.float64, device=device)


def denominator_scale(
    targets: Tensor, V: int, ignore_index: int, num_items: Tensor | None, mean: bool
) -> Tensor:
    """As RowKernels; ValueError names the first label out of range and its position."""
    flat = targets.reshape(-1).contiguous()
    bad, count = extension().check_labels(_numpy(flat), V, ignore_index)
    if bad >= 0:
        position = []
        for size in reversed(targets.shape):
            position.insert(0, bad % size)
            bad //= size
        raise bad_label(str(position), int(targets[tuple(position)]), V, ignore_index)
    items = float(count if num_items is None else num_items) if mean and count else 1.0
    return _scalar(1.0 / items if items else float("inf"))


def row_losses(
    logits: Tensor, targets: Tensor, options: Options, *, all_lse: bool = False,
    gradient_scale: Tensor | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device="cpu")
    lse, saved = torch.empty_like(losses), empty_saved(logits.shape[0], logits.device)
    gradient = None
    if gradient_scale is not None:
        # Not empty_like, which would keep the distance of rows that are far apart.
        gradient = out if out is not None else logits.new_empty(logits.shape)
    extension().cross_entropy_losses(
        _numpy(logits), KIND[logits.dtype], _numpy(targets), options.ignore_index, options.numbers,
        all_lse, _numpy(losses), _numpy(lse), _numpy(saved),
        None if gradient is None else _numpy(gradient),
        0.0 if gradient_scale is None else float(gradient_scale),
    )  # fmt: skip
    return losses, lse, saved, gradient


def row_gradients(
    logits: Tensor, targets: Tensor, saved: Tensor, grad_losses: Tensor | None,
    grad_lse: Tensor | None, options: Options, out: Tensor,
) -> None:  # fmt: skip
    extension().cross_entropy_gradients(
        _numpy(logits), KIND[logits.dtype], _numpy(targets), _numpy(saved), options.ignore_index,
        options.numbers, _numpy(_scalar(0.0) if grad_losses is None else grad_losses),
        None if grad_lse is None else _numpy(grad_lse), _numpy(out),
    )  # fmt: skip


def sum_rows(losses: Tensor, scale: Tensor) -> Tensor:
    return _scalar(extension().ordered_sum(_numpy(losses)) * float(scale))


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    if (value := float(factor)) != 1.0:
        extension().scale_in_place(_numpy(x.view(-1)), KIND[x.dtype], value)


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _numpy(x: Tensor):
    """The tensor's memory as an array; 16-bit floats, which NumPy lacks, as int16."""
    x = x.detach()
    return (x.view(torch.int16) if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
