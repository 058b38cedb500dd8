"""AdamW with the clipping of gradients in the step, and clip_gradients for loops of one's own."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlm.extension import extension
from fastlm.kernels.collect import GROUP, PARAM, Collected, TensorTable
from fastlm.kernels.optimizer import FusedAdamW, ParameterPosition
from fastlm.ops import optimizer_torch
from fastlm.ops.clip_grad_norm import clip_gradients
from fastlm.ops.dispatch import implementation

__all__ = ["AdamW", "ParameterPosition", "clip_gradients"]


class AdamW(FusedAdamW):
    __doc__ = FusedAdamW.__doc__

    @staticmethod
    def kernels_for(device: torch.device, impl: str) -> Any:
        return implementation("adamw", impl, device)

    def _check_last_group(self) -> None:
        super()._check_last_group()
        devices = {p.device for p in self._params()}
        modules = [self.kernels_for(device, self._impl) for device in devices]
        self._by_torch = optimizer_torch in modules
        if self._by_torch and self._split:
            raise ValueError('param_precision="split" needs impl "cpp" or "triton"; use "native"')
        self._step_supports_amp_scaling = not self._by_torch

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._check_last_group()

    def _create_state(self, params: Any) -> None:
        if self._by_torch:
            optimizer_torch.create_state(self, params)
        else:
            super()._create_state(params)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._by_torch:
            torch.optim.AdamW.load_state_dict(self, state_dict)
        else:
            super().load_state_dict(state_dict)

    def _update(self) -> None:
        if self._by_torch:
            optimizer_torch.update(self)
        else:
            super()._update()

    def _read_tables(self) -> Collected | None:
        found = extension().read_table(
            Tensor, torch.nn.Parameter, self.param_groups, self.state, self._split
        )
        if found is None:
            return None
        rows, indices, held = found
        device = held[PARAM][0].device
        table = TensorTable(device, torch.from_numpy(rows), 1, self._caches.setdefault(device, {}))
        positions = np.stack([rows[:, GROUP], indices], 1)
        return Collected([table], [positions], [None], held[PARAM], held)
