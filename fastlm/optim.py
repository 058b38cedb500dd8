"""AdamW with the clipping of gradients in the step, and clip_gradients for loops of one's own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlm.ops.clip_grad_norm import clip_gradients, global_norm
from fastlm.ops.dispatch import resolve_implementation

__all__ = ["AdamW", "clip_gradients"]

_FUSED_DEVICES = ("cpu", "cuda", "mps")  # where torch's fused AdamW runs


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with the defaults of GPT training, clipping, and skipping of bad steps.

    The mathematics and the state dict are torch.optim.AdamW's (formula: fastlm/ops/adamw.py); state
    dicts load both ways.

    max_grad_norm: clip the gradients to this global L2 norm inside `step`, without a host sync.
    skip_nonfinite: a step whose norm is NaN or infinite leaves parameters, moments and step counter
        as they were. Default: on where max_grad_norm is set.
    After a step, `last_grad_norm` is the norm before clipping: a 0-d tensor on the device, so that
    reading it, and nothing else, waits for the device.
    """

    last_grad_norm: Tensor | None = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool | None = None,
        impl: str = "auto",
    ):
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm}: it must be positive, or None")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = (
            max_grad_norm is not None if skip_nonfinite is None else skip_nonfinite
        )
        self._impl = impl
        self._choose_implementation()

    @property
    def _clips_in_step(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite

    def _choose_implementation(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        devices = {p.device for p in params}
        for device in devices:
            resolve_implementation("adamw", self._impl, device)
        gaps = [tuple(p.shape) for p in params if not _is_dense(p)]
        self._fused = all(device.type in _FUSED_DEVICES for device in devices) and not gaps
        if self._clips_in_step and len(devices) > 1:
            raise ValueError("max_grad_norm and skip_nonfinite need all parameters on one device")
        if self.skip_nonfinite and not self._fused:
            where = f"views with gaps in memory (shape {gaps[0]})" if gaps else "this device"
            raise ValueError(
                f"skip_nonfinite=True: torch's fused AdamW, which skips without a host sync, does "
                f"not run on {where}: {', '.join(map(str, devices))}; pass skip_nonfinite=False"
            )
        for group in self.param_groups:
            group["fused"], group["foreach"] = (True, False) if self._fused else (None, None)
        # What torch's own constructor sets for fused=True: GradScaler then hands its found_inf to
        # the step, which skips on the device, where it would otherwise read it on the host.
        self._step_supports_amp_scaling = self._fused

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, of torch.optim.AdamW, or of the seeds' optimizers."""
        # Its groups bring the other optimizer's choice of implementation along. With ours in its
        # place, torch puts the step counters where the fused kernel reads them.
        ours = [{key: group[key] for key in ("fused", "foreach")} for group in self.param_groups]
        groups = state_dict["param_groups"]
        if len(groups) == len(ours):  # else torch says what is wrong
            groups = [{**group, **choice} for group, choice in zip(groups, ours, strict=True)]
        super().load_state_dict({**state_dict, "param_groups": groups})

    def __getstate__(self) -> dict[str, Any]:
        # torch's holds groups, state and defaults only: a copy could not step.
        names = ("max_grad_norm", "skip_nonfinite", "_impl", "_fused", "_step_supports_amp_scaling")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if not hasattr(self, "_impl"):
            return  # called by the constructor
        try:
            self._choose_implementation()
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter with a gradient; returns the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._clips_in_step:
            self._update()
            return loss

        gradients = [
            p.grad for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = global_norm(gradients)
        # Set by a GradScaler whose unscale_ was not called: the fused step divides by it later.
        if (grad_scale := getattr(self, "grad_scale", None)) is not None:
            norm = norm / grad_scale.to(norm.device)
        self.last_grad_norm = norm
        finite = torch.isfinite(norm)
        if self.max_grad_norm is not None and gradients:
            factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, torch.where(finite, factor, 1.0))

        if not self.skip_nonfinite:
            self._update()
            return loss
        # torch's fused step skips where found_inf is 1; a GradScaler may have set its own.
        scalers_found_inf = getattr(self, "found_inf", None)
        found_inf = (~finite).to(torch.float32)
        if scalers_found_inf is not None:
            found_inf = torch.maximum(found_inf, scalers_found_inf)
        self.found_inf = found_inf
        try:
            self._update()
        finally:
            if scalers_found_inf is None:
                del self.found_inf
            else:
                self.found_inf = scalers_found_inf
        return loss

    def _update(self) -> None:
        """torch's step without its hooks, which run around ours.

        torch wraps the step of its own class, too, as soon as somebody has made a
        torch.optim.AdamW: every hook would run twice.
        """
        if self._fused:
            # The fused kernels walk the raw memory. For a gradient of another layout than its
            # parameter's, CUDA's raises, and the CPU's (torch 2.13) updates with wrong elements.
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None and p.grad.stride() != p.stride():
                        p.grad = torch.empty_like(p).copy_(p.grad)
        step = torch.optim.AdamW.step
        while getattr(step, "hooked", False):
            step = step.__wrapped__
        step(self)


def _is_dense(param: Tensor) -> bool:
    """Do its elements fill a block of memory, in whatever order of dimensions?"""
    return param.is_contiguous() or param.stride() == torch.empty_like(param).stride()
