"""From parameters, gradients and optimizer state to the tables of pointers that the kernels take.

Here everything unusual is made usual, or refused: views with gaps, gradients of other strides than
their parameter's, DTensors, parameters without a gradient, on several devices, of several dtypes.
Imports torch and siblings only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import shards
from .tensor_table import CODE, SPLIT, TensorTable


@dataclass(eq=False)
class Collected:
    tables: list[TensorTable] = field(default_factory=list)  # one a device
    positions: list[list[tuple[int, int]]] = field(default_factory=list)  # of each row of a table
    classes: list[Any] = field(default_factory=list)  # shards.sum_class of each sum of squares
    rows: list[int] = field(default_factory=list)  # of every parameter, -1: it has no gradient
    updated: list[Tensor] = field(default_factory=list)  # the parameters that have one
    # Views with gaps and the dense copies that are updated in their place.
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    # Nothing had to be converted, all is on one device and of torch's own classes: the table holds
    # as long as the same tensors stand in the same places.
    plain: bool = True

    def class_of(self, tensor: Tensor) -> int:
        """Which sum of squares the gradient, or the gradient of the parameter, goes into."""
        of_class = shards.sum_class(tensor)
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


def moment_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def is_dense(tensor: Tensor) -> bool:
    """Do its elements fill a block of memory, in whatever order of dimensions?"""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Does the same index lead to the same place in memory?"""
    strides = zip(a.stride(), b.stride(), a.shape, strict=True)
    return a.shape == b.shape and all(x == y for x, y, size in strides if size > 1)


def laid_out_as(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, or a copy of it, in the layout of `other`, which is dense."""
    return tensor if same_layout(tensor, other) else torch.empty_like(other).copy_(tensor)


def collect_step(groups: Sequence[dict], state: Any, split: bool) -> Collected:
    """Every parameter that has a gradient, with its state, which exists already."""
    found = Collected()
    builders: dict[torch.device, _Builder] = {}
    for group, members in enumerate(groups):
        for index, param in enumerate(members["params"]):
            if param.grad is None:
                found.rows.append(-1)
                continue
            found.updated.append(param)
            what = position_name(groups, group, index)
            check_gradient(param.grad, what)
            entry = state[param]
            local = shards.local_part(param)
            grad = shards.placed_like(param.grad, param, what)
            if grad.dtype != local.dtype and torch.float64 in (grad.dtype, local.dtype):
                grad = grad.to(moment_dtype(local))
            if grad.shape != local.shape:
                raise ValueError(
                    f"the gradient of {what} has shape {tuple(grad.shape)}, the parameter "
                    f"{tuple(local.shape)}"
                )
            if local.is_neg():
                raise ValueError(f"{what} is a view that negates its memory: clone it")
            grad = grad.resolve_neg()
            target = found.dense(local)
            grad_in_place = laid_out_as(grad, target)
            parts = [target, grad_in_place]
            for name in ("exp_avg", "exp_avg_sq", "remainder"):
                parts.append(_state_part(entry, name, param, target, split, what))
            builder = builders.setdefault(local.device, _Builder(local.device))
            found.rows.append(len(builder.parts))
            kind = SPLIT if parts[4] is not None else CODE[local.dtype]
            builder.add(
                [*parts, _step_counter(entry, local.device)],
                (kind, CODE[grad_in_place.dtype]),
                group,
                found.class_of(param),
                (group, index),
            )
            # Classes, not isinstance: a subclass may do anything when it is asked for its memory.
            found.plain &= (
                type(param) in (Tensor, torch.nn.Parameter)
                and grad_in_place is param.grad
                and type(grad) is Tensor
                and target is local
                and param.dim() <= 4  # what the extension's watch has room for
            )
    found.plain &= len(builders) == 1
    for builder in builders.values():
        found.tables.append(builder.table(len(found.classes)))
        found.positions.append(builder.positions)
    return found


def collect_gradients(gradients: Iterable[Tensor]) -> Collected:
    """Gradients alone, each once, to be summed and scaled in place."""
    found = Collected()
    builders: dict[torch.device, _Builder] = {}
    for grad in {id(g): g for g in gradients}.values():
        check_gradient(grad, "a parameter")
        local = shards.local_part(grad)
        target = found.dense(local)
        builder = builders.setdefault(local.device, _Builder(local.device))
        builder.add(
            [None, target, None, None, None, None],
            (CODE[target.dtype],) * 2,
            0,
            found.class_of(grad),
            (0, 0),
        )
    found.tables = [builder.table(len(found.classes)) for builder in builders.values()]
    return found


def write_back(found: Collected) -> None:
    """Puts the dense copies' values into the views that they stand for."""
    for view, copy in found.copies:
        view.copy_(copy)


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
    if grad.dtype not in CODE:
        raise TypeError(
            f"the gradient of {what} has dtype {grad.dtype}: it must be float32, bfloat16, float16 "
            f"or float64"
        )


def _state_part(
    entry: dict, name: str, param: Tensor, target: Tensor, split: bool, what: str
) -> Tensor | None:
    """The local memory of a state tensor in `target`'s layout; None for what is not needed."""
    dtype = moment_dtype(param)
    if name == "remainder":
        if not (split and param.dtype == torch.bfloat16):
            return None
        dtype = torch.int16
    if name not in entry:
        raise ValueError(f"the state of {what} has no {name!r}")
    value = shards.local_part(entry[name])
    if value.dtype != dtype or value.device != target.device or value.shape != target.shape:
        raise ValueError(
            f"{name} of {what} is {tuple(value.shape)} {value.dtype} on {value.device}; it must be "
            f"{tuple(target.shape)} {dtype} on {target.device}"
        )
    if not same_layout(value, target):
        value = torch.empty_like(target, dtype=dtype).copy_(value)
        entry[name] = shards.like(value, param)
    return value


def _step_counter(entry: dict, device: torch.device) -> Tensor:
    """The step of the state, made what kernels count in: one fp32 number on `device`."""
    step = entry["step"]
    kept = isinstance(step, Tensor) and step.dtype == torch.float32 and step.device == device
    if not kept or step.numel() != 1:
        step = entry["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
    return step


class _Builder:
    """Rows of one device's table."""

    def __init__(self, device: torch.device):
        self.device = device
        self.parts: list[list[Tensor | None]] = []
        self.kinds: list[tuple[int, int]] = []
        self.groups: list[int] = []
        self.classes: list[int] = []
        self.positions: list[tuple[int, int]] = []

    def add(self, parts, kinds, group, of_class, position) -> None:
        if any(t is not None and t.numel() and not t.data_ptr() for t in parts):
            classes = sorted({type(t).__name__ for t in parts if t is not None})
            raise ValueError(
                f"a parameter, its gradient or its state on {self.device} has no memory of its own "
                f"({', '.join(classes)}): it cannot be updated"
            )
        self.parts.append(parts)
        self.kinds.append(kinds)
        self.groups.append(group)
        self.classes.append(of_class)
        self.positions.append(position)

    def table(self, num_classes: int) -> TensorTable:
        def column(values: list) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device="cpu")

        return TensorTable(
            device=self.device,
            pointers=column(
                [[0 if t is None else t.data_ptr() for t in row] for row in self.parts]
            ),
            numel=column([row[1].numel() for row in self.parts]),
            kinds=column(self.kinds),
            groups=column(self.groups),
            classes=column(self.classes),
            num_classes=num_classes,
            keep=[tuple(row) for row in self.parts],
        )
