"""Several ranks do a thing together: what fails on one of them is raised on all, and none waits."""

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import torch.distributed as dist

from fastlm.errors import UserError

# Of the ranks that take part, on the CPU; None: this process alone.
Group: TypeAlias = "dist.ProcessGroup | None"
T = TypeVar("T")


def together(group: Group, function: Callable[[], T]) -> T:
    """function() of this rank, once it has succeeded on every rank.

    If it fails on one, every rank raises that error, the lowest rank's first; an OSError's
    attribute `rank` tells where.
    """
    error, result = None, None
    try:
        result = function()
    except Exception as e:
        error = e
    for rank, failure in enumerate(gathered(group, _picklable(error, group))):
        if failure is not None:
            failure = error if rank == rank_in(group) else failure
            failure.rank = getattr(failure, "rank", rank)
            raise failure
    return result


def gathered(group: Group, value: T) -> list[T]:
    """The values of all ranks."""
    values = [value] * size_of(group)
    if group is not None:
        dist.all_gather_object(values, value, group=group)
    return values


def _picklable(error: Exception | None, group: Group) -> Exception | None:
    if error is None or group is None or isinstance(error, UserError | OSError | MemoryError):
        return error
    return RuntimeError(f"rank {rank_in(group)}: {type(error).__name__}: {error}")


def rank_in(group: Group) -> int:
    return 0 if group is None else dist.get_rank(group)


def size_of(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)
