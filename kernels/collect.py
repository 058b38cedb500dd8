"""Makes tables of pointers, which the kernels take, from parameters, gradients and state.

Converts or refuses everything unusual: views with gaps, gradients whose strides differ from their
parameter's, DTensors (takes the local parts), parameters on several devices, of several dtypes.
Tables are made for one step and not kept. Imports torch and siblings only.
"""

import functools
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The codes of element types in a table, as in csrc/float_type.h. SPLIT: a bfloat16 parameter; an
# int16 tensor beside it (column REMAINDER) holds the lower 16 bits of its fp32 master.
FLOAT32, BFLOAT16, FLOAT16, FLOAT64, SPLIT = range(5)
CODE = {
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.float64: FLOAT64,
}

_PLAIN = {Tensor, torch.nn.Parameter}

# The columns of a table: six addresses, sizes and types, the parameter's place.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, REMAINDER, STEP = range(6)
NUMEL, PARAM_CODE, GRAD_CODE, GROUP, INDEX, COLUMNS = range(6, 12)


@dataclass(eq=False)
class TensorTable:
    """n parameters on one device with their gradients and optimizer state, all dense in memory.

    Element i of a gradient, of the moments and of the remainder belongs to element i of the
    parameter's memory. Moments are float32, of float64 parameters float64; the step counter is one
    float32. rows: (n, COLUMNS) int64 on the CPU: addresses (0 for what a row lacks), number of
    elements, codes of parameter and gradient, and the parameter's place: its param_group and its
    index in that.
    """

    device: torch.device
    ranks: "Ranks | None"  # they hold other parts of these tensors
    rows: Tensor
    cache: dict  # a kernel module's own; lives on from step to step
    on_device: Any = None  # a kernel module's own copy

    @property
    def norm_dtype(self) -> torch.dtype:
        """The gradients' norm is float64 if one of them is, else float32."""
        return torch.float64 if (self.rows[:, GRAD_CODE] == FLOAT64).any() else torch.float32


class SquareSum(NamedTuple):
    """The sum of squares of a table's gradients, on the table's device."""

    sum: Tensor  # 0-d float64
    bad: Tensor  # 0-d int64: the first row with a gradient that is not finite, or -1


@dataclass(frozen=True, eq=False)
class StepOptions:
    """The numbers of one AdamW step."""

    # One row a param_group: lr (a float, or a 0-d or one-element tensor on the table's device, read
    # on the device), beta1, beta2, eps, weight_decay.
    hyper: Sequence[tuple[float | Tensor, float, float, float, float]]
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    # From a torch.amp.GradScaler: divide gradients by grad_scale; change nothing if found_inf is
    # not 0. One-element float32 tensors on the table's device.
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


@dataclass(eq=False)
class Collected:
    tables: list[TensorTable] = field(default_factory=list)
    updated: list[Tensor] = field(default_factory=list)  # the parameters that have a gradient
    held: list[Any] = field(default_factory=list)  # the tensors at the addresses
    # Views with gaps, and dense copies that kernels update in their place.
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    # The rows of each table to be, end to end, by device and Ranks.
    rows: dict[Any, list[int]] = field(default_factory=dict)

    def rows_of(self, tensor: Tensor) -> list[int]:
        """To be asked for every parameter, with a gradient or not: all ranks then have the same
        tables, and add up their sums in the same order."""
        key = tensor.device, other_ranks(tensor)
        if (rows := self.rows.get(key)) is None:
            rows = self.rows[key] = []
        return rows

    def addresses(self, what: str, *tensors: Tensor | None) -> list[int]:
        """Where the tensors of a row lie."""
        self.held.append(tensors)
        found = [0 if t is None else t.data_ptr() for t in tensors]
        for t, address in zip(tensors, found, strict=True):
            if not address and t is not None and t.numel():
                raise ValueError(
                    f"{what}, its gradient or its state has no memory of its own "
                    f"({type(t).__name__} on {t.device}): it cannot be updated"
                )
        return found

    def make_tables(self, caches: dict) -> None:
        for key, rows in self.rows.items():
            # Not torch.tensor, which takes three times as long.
            values = torch.frombuffer(array("q", rows or [0]), dtype=torch.int64)
            values = values[: len(rows)].view(-1, COLUMNS)
            self.tables.append(TensorTable(*key, values, caches.setdefault(key, {})))

    def dense(self, local: Tensor) -> Tensor:
        """`local`, or a copy for kernels to work on."""
        if is_dense(local):
            return local
        # The moments are laid out like torch's copies of the parameter.
        copy = torch.empty_like(local).copy_(local)
        self.copies.append((local, copy))
        return copy

    def square_sum(self, kernels: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
        """The square of the global norm, 0-d float64, and each table's SquareSum.bad; `kernels`:
        each table's module."""
        found = [k.sum_squares(table) for k, table in zip(kernels, self.tables, strict=True)]
        sums = [
            x.sum if table.ranks is None else table.ranks.add(x.sum)
            for x, table in zip(found, self.tables, strict=True)
        ]
        return sum((x.to(sums[0].device) for x in sums[1:]), sums[0]), [x.bad for x in found]

    def write_back(self) -> None:
        """Copies the dense copies back into their views."""
        for view, copy in self.copies:
            view.copy_(copy)


def collect_step(groups: Sequence[dict], state: Any, split: bool, caches: dict) -> Collected:
    """Tables of every parameter that has a gradient, with its state, which exists already.

    `caches` gives each table its cache.
    """
    found = Collected()
    for group, members in enumerate(groups):
        for index, param in enumerate(members["params"]):
            rows = found.rows_of(param)
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
            rows += *addresses, local.numel(), code, CODE[grad.dtype], group, index
    found.make_tables(caches)
    return found


def collect_gradients(params: Iterable[Tensor], caches: dict | None = None) -> Collected:
    """Tables of the parameters' gradients alone, each once, to be summed and scaled in place.

    `caches` gives each table its cache, as in collect_step.
    """
    params = list(params)
    caches = {} if caches is None else caches
    if (found := _plain_gradients(params, caches)) is not None:
        return found
    found, seen = Collected(), set()
    for param in params:
        found.rows_of(param)
        if (grad := param.grad) is None or id(grad) in seen:
            continue
        seen.add(id(grad))
        found.updated.append(grad)
        check_gradient(grad, "a parameter")
        target = found.dense(local_part(grad))
        (address,) = found.addresses("a parameter", target)
        code = CODE[target.dtype]
        rows = found.rows_of(grad)
        rows += 0, address, 0, 0, 0, 0, target.numel(), code, code, 0, 0
    found.make_tables(caches)
    return found


def _plain_gradients(params: Sequence[Tensor], caches: dict) -> Collected | None:
    """collect_gradients column by column, in half the time, if there is one table of ordinary dense
    tensors; else None."""
    grads = list({id(g): g for p in params if (g := p.grad) is not None}.values())
    if not {*map(type, params), *map(type, grads)} <= _PLAIN or len({g.device for g in grads}) != 1:
        return None
    if {g.layout for g in grads} != {torch.strided} or not all([g.is_contiguous() for g in grads]):
        return None
    addresses, codes = [g.data_ptr() for g in grads], [CODE.get(g.dtype) for g in grads]
    if not all(addresses) or None in codes:
        return None
    columns = torch.frombuffer(
        array("q", [*addresses, *(g.numel() for g in grads), *codes]), dtype=torch.int64
    )
    rows = torch.zeros(len(grads), COLUMNS, dtype=torch.int64, device="cpu")
    rows[:, GRAD], rows[:, NUMEL], rows[:, PARAM_CODE] = columns.view(3, -1)
    rows[:, GRAD_CODE] = rows[:, PARAM_CODE]
    key = grads[0].device, None
    return Collected([TensorTable(*key, rows, caches.setdefault(key, {}))], grads)


def position_name(groups: Sequence[dict], group: int, index: int) -> str:
    """Names a parameter in a message."""
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
    """Do its elements fill a block of memory, in any order of dimensions?"""
    # empty_like keeps the order of such dimensions and makes any other layout dense.
    return tensor.is_contiguous() or _same_layout(tensor, torch.empty_like(tensor, device="meta"))


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Does the same index lead to the same place in memory?"""
    if a.shape == b.shape and a.stride() == b.stride():
        return True
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
    """Converts the step counter to one fp32 number on `device`, as kernels count."""
    step = entry["step"]
    kept = isinstance(step, Tensor) and step.dtype == torch.float32 and step.device == device
    if not kept or step.numel() != 1:
        step = entry["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
    return step


# DTensors (FSDP2, tensor parallelism). Their module is loaded before the first one is made.


def is_dtensor(tensor: Tensor) -> bool:
    if type(tensor) in _PLAIN:  # the quickest answer, to what is asked for every tensor
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """A DTensor's part on this rank; an ordinary tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def placed_as(local: Tensor, tensor: Tensor) -> Tensor:
    """A tensor distributed like `tensor`, with `local` as its local part."""
    if not is_dtensor(tensor):
        return local
    return type(tensor).from_local(  # type: ignore[attr-defined]
        local, tensor.device_mesh, tensor.placements, run_check=False,  # type: ignore[attr-defined]
        shape=tensor.shape, stride=tensor.stride(),
    )  # fmt: skip


def _placed_like(grad: Tensor, param: Tensor, what: str) -> Tensor:
    """The gradient's part for the local part of `param`. ValueError if there is none."""
    if is_dtensor(param) != is_dtensor(grad):
        kinds = "a DTensor", "an ordinary tensor"
        own, other = kinds if is_dtensor(param) else kinds[::-1]
        raise ValueError(f"{what} is {own} and its gradient {other}")
    if is_dtensor(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        # A sum still outstanding (Partial) is done here, too.
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local_part(grad)


class Ranks(NamedTuple):
    mesh: Any
    dimensions: tuple[int, ...]  # of the mesh: along these, ranks hold different parts of a tensor

    def add(self, local: Tensor) -> Tensor:
        """The sum of `local` over the ranks."""
        total = local.clone()
        for dimension in self.dimensions:
            torch.distributed.all_reduce(total, group=self.mesh.get_group(dimension))
        return total


def other_ranks(tensor: Tensor) -> Ranks | None:
    """The ranks with other parts of `tensor`; None if all of it is here."""
    if not is_dtensor(tensor):
        return None
    split = _split_dimensions(tensor.placements)  # type: ignore[attr-defined]
    return Ranks(tensor.device_mesh, split) if split else None  # type: ignore[attr-defined]


@functools.lru_cache
def _split_dimensions(placements: tuple) -> tuple[int, ...]:
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"a gradient has the placements {placements}: sum it over its mesh first "
            f"(grad.redistribute)"
        )
    return tuple(i for i, placement in enumerate(placements) if not placement.is_replicate())
