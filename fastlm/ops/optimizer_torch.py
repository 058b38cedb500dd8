"""torch's own optimizer kernels, fused where torch has them, for devices without any of ours.

The functions of optimizer_cpp.py. The tables are used once: `keep` holds the gradients. 16-bit
parameters, and gradients that are scaled, are copied for the time of the step.
"""

import torch
from torch import Tensor
from torch.optim.adamw import adamw

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

takes_tensors = True


def square_sums(table: TensorTable, *, by_class: bool = False) -> GradientSums:
    dtype = torch.float32 if table.device.type == "mps" else torch.float64  # mps has no fp64
    sums = torch.stack([_square_sum(row[GRAD], dtype) for row in table.keep])
    index = table.classes.to(table.device)
    values = torch.zeros(table.num_classes, dtype=dtype, device=table.device)
    bad = ~sums.isfinite()
    first = torch.where(bad.any(), bad.int().argmax(), -1)
    return GradientSums(values.index_add(0, index, sums), first)


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
