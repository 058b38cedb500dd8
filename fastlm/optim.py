"""AdamW with the clipping of gradients in the step, and clip_gradients for loops of one's own."""

from typing import Any

import torch
from torch import Tensor

from fastlm.extension import extension
from fastlm.kernels.collect import PARAM, Collected, TensorTable
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

    def _by_torch(self) -> bool:
        """Does torch's own step run? Asked when it matters: a model may be moved at any time."""
        devices = {p.device for p in self._params()}
        modules = [self.kernels_for(device, self._impl) for device in devices]
        if optimizer_torch in modules and self._split:
            raise ValueError('param_precision="split" needs impl "cpp" or "triton"; use "native"')
        return optimizer_torch in modules

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return not self._by_torch()

    def _check_last_group(self) -> None:
        super()._check_last_group()
        self._by_torch()

    def _create_state(self, params: Any) -> None:
        if self._by_torch():
            optimizer_torch.create_state(self, params)
        else:
            super()._create_state(params)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._by_torch():
            torch.optim.AdamW.load_state_dict(self, state_dict)
        else:
            super().load_state_dict(state_dict)

    def _update(self) -> None:
        collected = self._read_tables()  # most steps': the faster way, which asks no more
        if collected is None and self._by_torch():
            optimizer_torch.update(self)
        else:
            self._update_collected(collected or self._collect())

    def _read_tables(self) -> Collected | None:
        """What collect_step returns, read in C++; None if there is something to convert or refuse,
        or torch's own step runs."""
        found = extension().read_table(
            Tensor, torch.nn.Parameter, self.param_groups, self.state, self._split
        )
        if found is None:
            return None
        rows, tensors = found
        device = tensors[PARAM][0].device
        if self.kernels_for(device, self._impl) is optimizer_torch:
            return None
        cache = self._caches.setdefault((device, None), {})
        table = TensorTable(device, None, torch.from_numpy(rows), cache)
        return Collected([table], tensors[PARAM], tensors)
