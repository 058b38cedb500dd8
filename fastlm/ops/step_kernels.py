"""The kernels of AdamW and of clipping for each device, behind one interface.

square_sums, step and scale_gradients do what kernels/adamw.py and kernels/clip_grad_norm.py say of
theirs, for the rows of a fastlm.kernels.tensor_table.TensorTable.
"""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fastlm.extension import extension
from fastlm.kernels.optimizer_state import joined, split_into
from fastlm.kernels.tensor_table import (
    EXP_AVG,
    EXP_AVG_SQ,
    GRAD,
    PARAM,
    REMAINDER,
    STEP,
    GradientSums,
    StepOptions,
    TensorTable,
)
from fastlm.ops.dispatch import resolve_implementation


class CppStepKernels:
    """csrc/ on CPU tensors: in fp64, and the same bits for any number of threads."""

    takes_tensors = False

    @staticmethod
    def square_sums(table: TensorTable, *, by_class: bool = False) -> GradientSums:
        sums = np.zeros(table.num_classes)
        bad = extension().sum_squares(*_columns(table), table.classes.numpy(), sums)
        return GradientSums(torch.from_numpy(sums), torch.tensor(bad, device="cpu"))

    @staticmethod
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

    @staticmethod
    def scale_gradients(table: TensorTable, factor: float) -> None:
        extension().scale_gradients(*_columns(table), factor)


def _columns(table: TensorTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return table.pointers.numpy(), table.numel.numpy(), table.kinds.numpy()


class TorchStepKernels:
    """torch's own kernels, fused where torch has them, for devices without any of ours.

    Its tables are used once: `keep` holds the gradients. 16-bit parameters, and gradients that are
    scaled, are copied for the time of the step.
    """

    takes_tensors = True

    @staticmethod
    def square_sums(table: TensorTable, *, by_class: bool = False) -> GradientSums:
        dtype = torch.float32 if table.device.type == "mps" else torch.float64  # mps has no fp64
        sums = torch.stack([_square_sum(row[GRAD], dtype) for row in table.keep])
        index = table.classes.to(table.device)
        values = torch.zeros(table.num_classes, dtype=dtype, device=table.device)
        bad = ~sums.isfinite()
        first = torch.where(bad.any(), bad.int().argmax(), -1)
        return GradientSums(values.index_add(0, index, sums), first)

    @staticmethod
    def step(table: TensorTable, options: StepOptions, sums: GradientSums | None) -> Tensor | None:
        factor = None if options.grad_scale is None else options.grad_scale.reciprocal()
        norm, found_inf = None, options.found_inf
        if sums is not None:
            norm = sums.values.sum().sqrt()
            norm = norm if factor is None else norm * factor
            finite = norm.isfinite()
            if options.max_grad_norm is not None:
                clip = (options.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                clip = torch.where(finite, clip, 1.0)
                factor = clip if factor is None else clip * factor
            if options.skip_nonfinite:
                not_finite = (~finite).float()
                found_inf = not_finite if found_inf is None else found_inf.maximum(not_finite)
            norm = norm.to(table.norm_dtype)
        fused = table.device.type in ("cpu", "cuda", "mps")
        if found_inf is not None and not fused:  # torch's others cannot skip by themselves
            if bool(found_inf):
                return norm
            found_inf = None
        groups = table.groups.tolist()
        for group, hyper in enumerate(options.hyper):
            rows = [row for row, of in zip(table.keep, groups, strict=True) if of == group]
            if rows:
                _torch_update(rows, hyper, factor, found_inf, fused)
        return norm

    @staticmethod
    def scale_gradients(table: TensorTable, factor: float) -> None:
        for row in table.keep:
            row[GRAD].mul_(factor)  # not a tensor, which would be rounded to the gradient's dtype


def _square_sum(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(gradient, dtype=dtype).square()


def _torch_update(rows, hyper, factor: Tensor | None, found_inf: Tensor | None, fused: bool):
    """One group, by torch.optim.adamw's function, on full-precision copies where it needs them."""
    lr, beta1, beta2, eps, weight_decay = hyper
    params, grads = [], []
    for row in rows:
        param, grad, remainder = row[PARAM], row[GRAD], row[REMAINDER]
        wide = row[EXP_AVG].dtype
        params.append(joined(param, remainder) if remainder is not None else param.to(wide))
        grad = grad.to(wide)
        grads.append(grad if factor is None else (grad * factor).to(wide))
    adamw(
        params,
        grads,
        [row[EXP_AVG] for row in rows],
        [row[EXP_AVG_SQ] for row in rows],
        [],
        [row[STEP] for row in rows],
        foreach=False if fused else None,
        fused=fused,
        found_inf=found_inf,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    for row, param in zip(rows, params, strict=True):
        if row[REMAINDER] is not None:
            split_into(param, row[PARAM], row[REMAINDER])
        elif param is not row[PARAM]:
            row[PARAM].copy_(param)


def _triton_step_kernels():
    """The module fastlm.kernels.adamw; ImportError where Triton is not installed."""
    from fastlm.kernels import adamw as module

    return module


_KERNELS = {
    "cpp": cache(CppStepKernels),
    "torch": cache(TorchStepKernels),
    "triton": cache(_triton_step_kernels),
}


def step_kernels(op: str, device: torch.device, impl: str):
    """Those that `impl` names for `op` ("adamw" or "clip_grad_norm") on `device`, or ValueError."""
    return _KERNELS[resolve_implementation(op, impl, device)]()
