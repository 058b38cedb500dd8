"""The optimizer's kernels of the CPU, csrc/{adamw,clip_grad_norm}.cpp: in fp64, and the same bits
for any number of threads.

square_sums, step and scale_gradients do what kernels/adamw.py and kernels/clip_grad_norm.py say of
theirs, for the rows of a fastlm.kernels.tensor_table.TensorTable.
"""

import math

import numpy as np
import torch
from torch import Tensor

from fastlm.extension import extension
from fastlm.kernels.tensor_table import GradientSums, StepOptions, TensorTable

takes_tensors = False


def square_sums(table: TensorTable, *, by_class: bool = False) -> GradientSums:
    sums = np.zeros(table.num_classes)
    bad = extension().sum_squares(*_columns(table), table.classes.numpy(), sums)
    return GradientSums(torch.from_numpy(sums), torch.tensor(bad, device="cpu"))


def step(table: TensorTable, options: StepOptions, sums: GradientSums | None) -> Tensor | None:
    factor, norm, skip = 1.0, None, False
    if options.grad_scale is not None:
        factor = 1.0 / float(options.grad_scale)
    if sums is not None:
        norm = factor * math.sqrt(float(sums.values.sum()))
        if not math.isfinite(norm):
            skip = options.skip_nonfinite
        elif options.max_grad_norm is not None:
            factor *= min(1.0, options.max_grad_norm / (norm + 1e-6))
    if options.found_inf is not None:
        skip |= bool(options.found_inf)
    if not skip:
        hyper = np.array([[float(value) for value in row] for row in options.hyper])
        extension().adamw(*_columns(table), table.groups.numpy(), hyper, factor)
    return None if norm is None else torch.tensor(norm, dtype=table.norm_dtype, device="cpu")


def scale_gradients(table: TensorTable, factor: float) -> None:
    extension().scale_gradients(*_columns(table), factor)


def _columns(table: TensorTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return table.pointers.numpy(), table.numel.numpy(), table.kinds.numpy()
