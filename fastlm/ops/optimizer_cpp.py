"""The optimizer's kernels for CPUs, csrc/{adamw,clip_grad_norm}.cpp: the same bits for any number
of threads.

sum_squares, step and scale_gradients do what kernels/adamw.py and kernels/clip_grad_norm.py say of
theirs, for the n rows of a fastlm.kernels.collect.TensorTable.
"""

import math

import numpy as np
import torch
from torch import Tensor

from fastlm.extension import extension
from fastlm.kernels.collect import SquareSum, StepOptions, TensorTable
from fastlm.ops.clip_grad_norm import clip_factor


def sum_squares(table: TensorTable) -> SquareSum:
    total, bad = extension().sum_squares(table.rows.numpy())
    total = torch.tensor(total, dtype=torch.float64, device="cpu")
    return SquareSum(total, torch.tensor(bad, device="cpu"))


def step(table: TensorTable, options: StepOptions, square_sum: Tensor | None) -> Tensor | None:
    factor, norm, skip = 1.0, None, False
    if options.grad_scale is not None:
        factor = 1.0 / float(options.grad_scale)
    if square_sum is not None:
        norm = factor * math.sqrt(float(square_sum))
        if not math.isfinite(norm):
            skip = options.skip_nonfinite
        elif options.max_grad_norm is not None:
            factor *= clip_factor(norm, options.max_grad_norm)
    if options.found_inf is not None:
        skip |= bool(options.found_inf)
    if not skip:
        hyper = np.array([[float(value) for value in row] for row in options.hyper])
        extension().adamw(table.rows.numpy(), hyper, factor)
    return None if norm is None else torch.tensor(norm, dtype=table.norm_dtype, device="cpu")


def scale_gradients(table: TensorTable, factor: float) -> None:
    extension().scale_gradients(table.rows.numpy(), factor)
