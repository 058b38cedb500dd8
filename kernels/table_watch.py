"""Whether a table of pointers still describes an optimizer's parameters, gradients and state.

Imports torch only.
"""

from typing import Any

import torch
from torch import Tensor

from .tensor_table import GRAD, PARAM

_STATE = ("exp_avg", "exp_avg_sq", "step", "remainder")


class TableWatch:
    """For tables of torch.Tensor and torch.nn.Parameter themselves (Collected.plain)."""

    def __init__(self, param_groups: list[dict], state: Any, rows: list[int], pointers: Tensor):
        """rows: of each parameter, group by group, its row in `pointers`, -1 without gradient."""
        self._param_groups, self._state, self._pointers = param_groups, state, pointers
        self._params = [p for group in param_groups for p in group["params"]]
        self._rows = rows
        self._kinds = [(_kind(p), None if p.grad is None else _kind(p.grad)) for p in self._params]
        self._param_addresses = pointers[:, PARAM].tolist()
        self._grad_addresses = pointers[:, GRAD].tolist()
        self._entries = [
            (
                param,
                entry,
                {key: (entry[key], _place(entry[key])) for key in _STATE if key in entry},
            )
            for param, entry in state.items()
        ]

    def refresh(self) -> str:
        """ "same", "moved" (gradients have new addresses, which `pointers` now holds), or "stale":
        the table has to be built anew."""
        params = [p for group in self._param_groups for p in group["params"]]
        if len(params) != len(self._params):
            return "stale"
        addresses = list(self._grad_addresses)
        for param, known, row, kinds in zip(
            params, self._params, self._rows, self._kinds, strict=True
        ):
            if param is not known:
                return "stale"
            grad = param.grad
            if row < 0 or grad is None:
                if (row < 0) != (grad is None):
                    return "stale"
                continue
            if (
                type(grad) is not Tensor
                or (_kind(param), _kind(grad)) != kinds
                or param.data_ptr() != self._param_addresses[row]
            ):
                return "stale"
            addresses[row] = grad.data_ptr()
        if not self._states_hold():
            return "stale"
        if addresses == self._grad_addresses:
            return "same"
        self._grad_addresses = addresses
        self._pointers[:, GRAD] = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        return "moved"

    def _states_hold(self) -> bool:
        if len(self._state) != len(self._entries):
            return False
        for (param, entry), (known, known_entry, values) in zip(
            self._state.items(), self._entries, strict=True
        ):
            if param is not known or entry is not known_entry:
                return False
            for key, (value, place) in values.items():
                if entry.get(key) is not value or _place(value) != place:
                    return False
        return True


def _kind(tensor: Tensor) -> tuple:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _place(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), _kind(tensor)
