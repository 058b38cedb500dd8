"""The losses' options: what there is, what fits together, how ops and type checkers name it.

Shapes: N = any leading dimensions, V vocabulary.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """What the loss of a row depends on besides its logits and its label.

    A new option is a field here, its check in LossOptions, its type in LossKeywords; a term in
    ops/cross_entropy.py (reference, torch's path), kernels/cross_entropy.py and
    csrc/cross_entropy.inc; a field of csrc/cross_entropy.h, in the same order. Signatures, schemas
    and bindings follow from the field.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    z_loss: float = 0.0

    @property
    def numbers(self) -> list[float]:
        """All but ignore_index, None as 0."""
        return [float(getattr(self, name) or 0.0) for name in OF_ROWS[1:]]


@dataclass(frozen=True)
class LossOptions(Options):
    """The options that every loss takes, checked: ValueError if they do not fit together."""

    reduction: str = "mean"
    num_items: Tensor | float | None = None
    return_lse: bool = False

    @classmethod
    def of(cls, function: Callable[..., Any], options: dict[str, Any]) -> "LossOptions":
        """What `function`, decorated with shows_options, takes as **options."""
        for name in options:
            if name not in cls.__dataclass_fields__:
                known = ", ".join(inspect.signature(function).parameters)
                raise TypeError(f"{function.__name__} has no argument {name!r}, but {known}")
        return cls(**options)

    def __post_init__(self):
        index = self.ignore_index
        if not isinstance(index, int) and not hasattr(index, "__index__"):  # NumPy's integers
            raise TypeError(f"ignore_index={index!r}: it must be an integer")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing={self.label_smoothing}: it must lie in [0, 1]")
        if self.softcap is not None and not 0.0 < self.softcap < math.inf:
            raise ValueError(f"softcap={self.softcap}: it must be positive, or None for no cap")
        if not 0.0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss={self.z_loss}: it must be 0 (none) or positive")
        if self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction={self.reduction!r}: it must be 'mean', 'sum' or 'none'")
        items = self.num_items
        if items is not None and self.reduction != "mean":
            raise ValueError(
                f"num_items replaces the mean's denominator; reduction is {self.reduction!r}"
            )
        # A tensor's value is not read: that would wait for the device.
        if isinstance(items, Tensor):
            if items.numel() != 1:
                raise ValueError(f"num_items has shape {tuple(items.shape)}: it must be one number")
        elif items is not None and not items > 0:
            raise ValueError(f"num_items={items}: it must be positive")

    @property
    def of_rows(self) -> tuple:
        """The fields of Options, as the ops take them."""
        return tuple(getattr(self, name) for name in OF_ROWS)

    def items_on(self, device: torch.device) -> Tensor | None:
        """num_items as a 0-d tensor on `device`."""
        if self.num_items is None:
            return None
        if isinstance(self.num_items, Tensor):
            return self.num_items.detach().to(device).reshape(())
        # Not torch.full: by it a compiled graph would have the number as a constant.
        return torch.ones((), dtype=torch.float32, device=device) * self.num_items


class LossKeywords(TypedDict, total=False):
    """LossOptions for type checkers, without return_lse, on which the result's type depends."""

    ignore_index: int
    label_smoothing: float
    softcap: float | None
    z_loss: float
    reduction: str
    num_items: Tensor | float | None


F = TypeVar("F", bound=Callable[..., Any])
OF_ROWS = tuple(field.name for field in fields(Options))
_SCHEMA_TYPES = {int: "int", float: "float", float | None: "float?"}
OPTIONS_SCHEMA = ", ".join(f"{_SCHEMA_TYPES[f.type]} {f.name}" for f in fields(Options))


def shows_options(function: F) -> F:
    """Lets help() name what `function` takes as **options."""
    own = inspect.signature(function)
    shown = {p.name: p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD}
    for f in fields(LossOptions):
        option = inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default)
        shown.setdefault(f.name, option)
    function.__signature__ = own.replace(parameters=list(shown.values()))  # type: ignore[attr-defined]
    return function
