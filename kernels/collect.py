"""From parameters, gradients and optimizer state to the tables of pointers that the kernels take.

Here everything unusual is made usual, or refused: views with gaps, gradients of other strides than
their parameter's, DTensors (of which the local parts are taken), parameters on several devices, of
several dtypes. Tables are made for one step and not kept. Imports torch and siblings only.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# The codes of element types in a table, those of csrc/float_type.h. SPLIT: a bfloat16 parameter
# whose fp32 master's lower 16 bits lie in an int16 tensor beside it (the column REMAINDER).
FLOAT32, BFLOAT16, FLOAT16, FLOAT64, SPLIT = range(5)
CODE = {
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.float64: FLOAT64,
}

# The columns of a table: six addresses, what describes the row, and which parameter it is.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, REMAINDER, STEP = range(6)
NUMEL, PARAM_CODE, GRAD_CODE, CLASS, GROUP, INDEX, COLUMNS = range(6, 13)


@dataclass(eq=False)
class TensorTable:
    """n parameters on one device with their gradients and optimizer state, all dense in memory.

    Element i of a gradient, of the moments and of the remainder belongs to element i of the
    parameter's memory. Moments are float32, of float64 parameters float64; the step counter is one
    float32. rows: (n, COLUMNS) int64 on the CPU: addresses (0 for what a row lacks), number of
    elements, codes of parameter and gradient, which sum of squares the gradient goes into, and the
    parameter's place: its param_group and its index in that.
    """

    device: torch.device
    rows: Tensor
    num_classes: int
    # Lives on from step to step: what a kernel module keeps of the tables on this device.
    cache: dict

    @property
    def norm_dtype(self) -> torch.dtype:
        """Of the gradients' norm: float64 if one of the gradients is, else float32."""
        return torch.float64 if (self.rows[:, GRAD_CODE] == FLOAT64).any() else torch.float32


@dataclass(eq=False)
class GradientSums:
    """Sums of squares of the gradients of a table, on its device.

    bad: the first row of the table with a gradient that is not finite, -1 if there is none; valid
    once the step that got these sums is done.
    """

    values: Tensor  # (num_classes,) float64: together they are the square of the global norm
    bad: Tensor  # 0-d int64


@dataclass(frozen=True, eq=False)
class StepOptions:
    """What one step of AdamW does besides reading the table."""

    # One row a param_group: lr (a float, or a 0-d or one-element tensor on the table's device,
    # which is read on the device), beta1, beta2, eps, weight_decay.
    hyper: Sequence[tuple[float | Tensor, float, float, float, float]]
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    # What a torch.amp.GradScaler hands over: gradients are to be divided by grad_scale; nothing is
    # to change if found_inf is not 0. One-element float32 tensors on the table's device.
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


@dataclass(eq=False)
class Collected:
    tables: list[TensorTable] = field(default_factory=list)  # one a device
    classes: list[Any] = field(default_factory=list)  # sum_class of each sum of squares
    updated: list[Tensor] = field(default_factory=list)  # the parameters that have a gradient
    held: list[Any] = field(default_factory=list)  # what the addresses point into
    # Views with gaps and the dense copies that are updated in their place.
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def class_of(self, tensor: Tensor) -> int:
        """Which sum of squares the gradient, or the gradient of the parameter, goes into."""
        of_class = sum_class(tensor)
        if of_class not in self.classes:
            self.classes.append(of_class)
        return self.classes.index(of_class)

    def dense(self, local: Tensor) -> Tensor:
        """`local`, or the copy that is worked on in its place."""
        if is_dense(local):
            return local
        # Moments have the layout that torch gives to copies of the parameter.
        copy = torch.empty_like(local).copy_(local)
        self.copies.append((local, copy))
        return copy

    def addresses(self, what: str, *tensors: Tensor | None) -> list[int]:
        """Where the tensors of a row lie."""
        self.held.append(tensors)
        found = [0 if t is None else t.data_ptr() for t in tensors]
        for address, t in zip(found, tensors, strict=True):
            if not address and t is not None and t.numel():
                raise ValueError(
                    f"{what}, its gradient or its state has no memory of its own "
                    f"({type(t).__name__} on {t.device}): it cannot be updated"
                )
        return found

    def add_tables(
        self, rows: dict[torch.device, list[list[int]]], caches: dict[torch.device, dict]
    ) -> None:
        """Makes the devices' rows tables; of no rows at all one table, for the first device: of a
        norm over all ranks this rank may have no part."""
        some = {device: of_device for device, of_device in rows.items() if of_device}
        for device, of_device in (some or dict(list(rows.items())[:1])).items():
            values = torch.tensor(of_device, dtype=torch.int64, device="cpu").reshape(-1, COLUMNS)
            cache = caches.setdefault(device, {})
            self.tables.append(TensorTable(device, values, len(self.classes), cache))

    def write_back(self) -> None:
        """Puts the dense copies' values into the views that they stand for."""
        for view, copy in self.copies:
            view.copy_(copy)


def collect_step(
    groups: Sequence[dict], state: Any, split: bool, caches: dict[torch.device, dict]
) -> Collected:
    """Tables of every parameter that has a gradient, with its state, which exists already.

    `caches` gives each device's table its cache.
    """
    found, rows = Collected(), {}
    for group, members in enumerate(groups):
        for index, param in enumerate(members["params"]):
            # For every parameter, in the same order on all ranks.
            of_class = found.class_of(param)
            of_device = rows.setdefault(param.device, [])
            if (grad := param.grad) is None:
                continue
            found.updated.append(param)
            what = position_name(groups, group, index)
            check_gradient(grad, what)
            entry = state[param]
            local = local_part(param)
            grad = _placed_like(grad, param, what)
            if grad.dtype != local.dtype and torch.float64 in (grad.dtype, local.dtype):
                grad = grad.to(moment_dtype(local))
            if grad.shape != local.shape:
                raise ValueError(
                    f"the gradient of {what} has shape {tuple(grad.shape)}, the parameter "
                    f"{tuple(local.shape)}"
                )
            if local.is_neg():
                raise ValueError(f"{what} is a view that negates its memory: clone it")
            target = found.dense(local)
            grad = _laid_out_as(grad.resolve_neg(), target)
            moments = [
                _state_part(entry, name, param, target, moment_dtype(local), what)
                for name in ("exp_avg", "exp_avg_sq")
            ]
            code, rest = CODE[local.dtype], None
            if has_remainder(param, split):
                code = SPLIT
                rest = _state_part(entry, "remainder", param, target, torch.int16, what)
            step = _step_counter(entry, local.device)
            addresses = found.addresses(what, target, grad, *moments, rest, step)
            codes = [code, CODE[grad.dtype]]
            of_device.append([*addresses, local.numel(), *codes, of_class, group, index])
    found.add_tables(rows, caches)
    return found


def collect_gradients(params: Iterable[Tensor]) -> Collected:
    """Tables of the parameters' gradients alone, each once, to be summed and scaled in place."""
    found, rows, seen = Collected(), {}, set()
    for param in params:
        found.class_of(param)
        rows.setdefault(param.device, [])
        if (grad := param.grad) is None or id(grad) in seen:
            continue
        seen.add(id(grad))
        found.updated.append(grad)
        check_gradient(grad, "a parameter")
        target = found.dense(local_part(grad))
        addresses = found.addresses("a parameter", None, target, None, None, None, None)
        codes = [CODE[target.dtype]] * 2
        described = [target.numel(), *codes, found.class_of(grad), 0, 0]
        rows.setdefault(target.device, []).append([*addresses, *described])
    found.add_tables(rows, {})
    return found


def position_name(groups: Sequence[dict], group: int, index: int) -> str:
    """What to call a parameter in a message."""
    names = groups[group].get("param_names")
    if names:
        return f"parameter {names[index]!r}"
    shape = tuple(groups[group]["params"][index].shape)
    return f"parameter {index} of group {group} (shape {shape})"


def check_gradient(grad: Tensor, what: str) -> None:
    if grad.layout != torch.strided:
        raise ValueError(
            f"the gradient of {what} is sparse ({grad.layout}): only dense ones are supported "
            f"(for nn.Embedding: sparse=False)"
        )
    check_dtype(grad, f"the gradient of {what}")


def check_dtype(tensor: Tensor, what: str) -> None:
    if tensor.dtype not in CODE:
        raise TypeError(
            f"{what} has dtype {tensor.dtype}: it must be float32, bfloat16, float16 or float64"
        )


def moment_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def has_remainder(param: Tensor, split: bool) -> bool:
    return split and param.dtype == torch.bfloat16


def is_dense(tensor: Tensor) -> bool:
    """Do its elements fill a block of memory, in whatever order of dimensions?"""
    # empty_like keeps the order of such dimensions and makes any other layout dense.
    return tensor.is_contiguous() or _same_layout(tensor, torch.empty_like(tensor, device="meta"))


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Does the same index lead to the same place in memory?"""
    strides = zip(a.stride(), b.stride(), a.shape, strict=True)
    return a.shape == b.shape and all(x == y for x, y, size in strides if size > 1)


def _laid_out_as(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, or a copy of it, in the layout of `other`, which is dense."""
    return tensor if _same_layout(tensor, other) else torch.empty_like(other).copy_(tensor)


def _state_part(
    entry: dict, name: str, param: Tensor, target: Tensor, dtype: torch.dtype, what: str
) -> Tensor:
    """The local memory of a state tensor in `target`'s layout."""
    if name not in entry:
        raise ValueError(f"the state of {what} has no {name!r}")
    value = local_part(entry[name])
    if value.dtype != dtype or value.device != target.device or value.shape != target.shape:
        raise ValueError(
            f"{name} of {what} is {tuple(value.shape)} {value.dtype} on {value.device}; it must be "
            f"{tuple(target.shape)} {dtype} on {target.device}"
        )
    if not _same_layout(value, target):
        value = torch.empty_like(target, dtype=dtype).copy_(value)
        entry[name] = placed_as(value, param)
    return value


def _step_counter(entry: dict, device: torch.device) -> Tensor:
    """The step of the state, made what kernels count in: one fp32 number on `device`."""
    step = entry["step"]
    kept = isinstance(step, Tensor) and step.dtype == torch.float32 and step.device == device
    if not kept or step.numel() != 1:
        step = entry["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
    return step


# DTensors (FSDP2, tensor parallelism): whoever makes the first has loaded their module


def is_dtensor(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """The tensor's memory on this rank: of an ordinary tensor, itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def placed_as(local: Tensor, tensor: Tensor) -> Tensor:
    """`local` as the local part of a tensor that is distributed as `tensor` is."""
    if not is_dtensor(tensor):
        return local
    return type(tensor).from_local(  # type: ignore[attr-defined]
        local, tensor.device_mesh, tensor.placements, run_check=False,  # type: ignore[attr-defined]
        shape=tensor.shape, stride=tensor.stride(),
    )  # fmt: skip


def _placed_like(grad: Tensor, param: Tensor, what: str) -> Tensor:
    """The gradient's part that belongs to the local part of `param`. ValueError if none does."""
    if is_dtensor(param) != is_dtensor(grad):
        kinds = "a DTensor", "an ordinary tensor"
        own, other = kinds if is_dtensor(param) else kinds[::-1]
        raise ValueError(f"{what} is {own} and its gradient {other}")
    if is_dtensor(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        # A sum still outstanding (Partial) is done here, too.
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local_part(grad)


def sum_class(tensor: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """(mesh, its dimensions that hold different parts of `tensor`), None if all is here."""
    if not is_dtensor(tensor):
        return None
    placements = tensor.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"a gradient has the placements {placements}: sum it over its mesh first "
            f"(grad.redistribute)"
        )
    split = tuple(i for i, placement in enumerate(placements) if not placement.is_replicate())
    return (tensor.device_mesh, split) if split else None  # type: ignore[attr-defined]


def add_over_ranks(sums: Tensor, classes: list) -> Tensor:
    """sums: (num_classes,), local sums. The same sums over all ranks that hold parts."""
    sums = sums.clone()
    for i, of_class in enumerate(classes):
        if of_class is not None:
            mesh, dimensions = of_class
            for dimension in dimensions:
                torch.distributed.all_reduce(sums[i : i + 1], group=mesh.get_group(dimension))
    return sums
