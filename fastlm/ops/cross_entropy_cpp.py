"""The row kernels of the CPU, csrc/cross_entropy.cpp: no result depends on the number of threads.

The functions of fastlm.kernels.cross_entropy_op.RowKernels.
"""

import torch
from torch import Tensor

from fastlm.extension import extension
from fastlm.kernels.arguments import Options

_KIND = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

STATS_COLUMNS = 2  # the largest l and the sum of exp(l - largest)


def denominator_scale(
    targets: Tensor, V: int, ignore_index: int, num_items: Tensor | None, mean: bool
) -> Tensor:
    """As RowKernels; ValueError names the first label out of range and where it stands."""
    flat = targets.reshape(-1).contiguous()
    bad, count = extension().check_labels(_numpy(flat), V, ignore_index)
    if bad >= 0:
        position = [int(i) for i in torch.unravel_index(torch.tensor(bad), targets.shape)]
        raise ValueError(
            f"targets{position} = {int(flat[bad])}: labels must lie in [0, {V}) or be "
            f"ignore_index ({ignore_index})"
        )
    if not mean:
        return torch.ones(())
    return 1.0 / (torch.tensor(float(max(count, 1))) if num_items is None else num_items.float())


def row_losses(
    logits: Tensor,
    targets: Tensor,
    options: Options,
    *,
    all_lse: bool = False,
    gradient_scale: Tensor | None = None,
    out: Tensor | None = None,
    stats: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    N = logits.shape[0]
    losses, lse = torch.empty(N), torch.empty(N)
    if stats is None:
        stats = torch.empty(N, 2, dtype=torch.float64)
    gradient = None
    if gradient_scale is not None:
        gradient = torch.empty(logits.shape, dtype=logits.dtype) if out is None else out
    extension().cross_entropy_losses(
        _numpy(logits),
        _KIND[logits.dtype],
        _numpy(targets),
        *_fields(options),
        all_lse,
        _numpy(losses),
        _numpy(lse),
        _numpy(stats),
        None if gradient is None else _numpy(gradient),
        0.0 if gradient_scale is None else float(gradient_scale),
    )
    return losses, lse, gradient


def row_gradients(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad_losses: Tensor | None,
    grad_lse: Tensor | None,
    options: Options,
    out: Tensor,
    *,
    stats: Tensor,
) -> None:
    if grad_losses is None:
        grad_losses = torch.zeros(())
    extension().cross_entropy_gradients(
        _numpy(logits),
        _KIND[logits.dtype],
        _numpy(targets),
        _numpy(stats),
        *_fields(options),
        _numpy(grad_losses),
        None if grad_lse is None else _numpy(grad_lse),
        _numpy(out),
    )


def sum_rows(losses: Tensor, scale: Tensor) -> Tensor:
    return torch.tensor(extension().ordered_sum(_numpy(losses)) * float(scale))


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    if (value := float(factor)) != 1.0:
        extension().scale_in_place(_numpy(x.view(-1)), _KIND[x.dtype], value)


def _numpy(x: Tensor):
    """The tensor's memory as an array; 16-bit floats, which NumPy lacks, as int16."""
    x = x.detach()
    return (x.view(torch.int16) if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()


def _fields(options: Options) -> tuple[int, float, float, float]:
    softcap = 0.0 if options.softcap is None else options.softcap
    return options.ignore_index, options.label_smoothing, softcap, options.z_loss
