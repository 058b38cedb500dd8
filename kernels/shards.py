"""The local parts of DTensors (FSDP2, tensor parallelism), and sums over all of a mesh's parts.

Imports torch only; torch.distributed.tensor is loaded by whoever makes the first DTensor.
"""

import sys
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """The tensor's memory on this rank: of an ordinary tensor, itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def placed_like(grad: Tensor, param: Tensor, what: str) -> Tensor:
    """The gradient's part that belongs to the local part of `param`. ValueError where none does."""
    if not is_dtensor(param):
        if is_dtensor(grad):
            raise ValueError(f"{what} is an ordinary tensor and its gradient a DTensor")
        return grad
    if not is_dtensor(grad):
        raise ValueError(f"{what} is a DTensor and its gradient an ordinary tensor")
    if grad.placements != param.placements:  # type: ignore[attr-defined]
        # A sum still outstanding (Partial) is done here, too.
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local_part(grad)


def sum_class(tensor: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """(mesh, its dimensions that hold different parts of `tensor`), None where all is here."""
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
    """sums: (k,), of each class its local sum. The same sums over all ranks that hold parts."""
    sums = sums.clone()
    for i, of_class in enumerate(classes):
        if of_class is not None:
            mesh, dimensions = of_class
            for dimension in dimensions:
                torch.distributed.all_reduce(sums[i : i + 1], group=mesh.get_group(dimension))
    return sums


def like(local: Tensor, tensor: Tensor) -> Tensor:
    """`local` as the local part of a tensor that is distributed as `tensor` is."""
    if not is_dtensor(tensor):
        return local
    return type(tensor).from_local(  # type: ignore[attr-defined]
        local, tensor.device_mesh, tensor.placements, run_check=False,  # type: ignore[attr-defined]
        shape=tensor.shape, stride=tensor.stride(),
    )  # fmt: skip
