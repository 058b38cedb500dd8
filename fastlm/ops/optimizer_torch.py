"""AdamW's step and the norm of gradients by torch's own functions, for devices without kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.kernels.collect import is_dtensor
from fastlm.ops.clip_grad_norm import clip_factor


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all gradients, 0-d; of DTensors that of the whole tensors."""
    if not gradients:
        return torch.zeros((), device="cpu")
    # Not by torch's get_total_norm: it rounds norms to the gradients' dtypes. mps has no fp64.
    wide = torch.float32 if gradients[0].device.type == "mps" else torch.float64
    norms = [torch.linalg.vector_norm(g, dtype=wide) for g in gradients]
    norms = [n.full_tensor() if is_dtensor(n) else n for n in norms]
    return torch.linalg.vector_norm(torch.stack([n.to(gradients[0].device) for n in norms]))


def scale_gradients(gradients: Sequence[Tensor], factor: float) -> None:
    for gradient in gradients:
        gradient.mul_(factor)  # not a tensor, which would be rounded to the gradient's dtype


def create_state(optimizer: torch.optim.AdamW, params: Sequence[Tensor]) -> None:
    """The state that torch.optim.AdamW's own step creates."""
    for param in params:
        if not optimizer.state.get(param):
            moments = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros((), dtype=torch.float32, device="cpu")
            optimizer.state[param] = {"step": step, **moments}


def update(optimizer: Any) -> None:
    """One step of a fastlm.AdamW: the gradients are clipped in place, then torch updates."""
    if clipped(optimizer):
        torchs_step(optimizer)


def clipped(optimizer: Any) -> bool:
    """Takes the norm of all gradients and clips them in place. False: skip the step.

    That is also said by optimizer.found_inf, which torch's own step does not take here.
    """
    found_inf = optimizer.__dict__.pop("found_inf", None)
    found = {
        (g, i): param.grad
        for g, group in enumerate(optimizer.param_groups)
        for i, param in enumerate(group["params"])
        if param.grad is not None
    }
    gradients = list(found.values())
    if optimizer._takes_norm:
        norm = gradient_norm(gradients)
        wide = any(g.dtype == torch.float64 for g in gradients)
        optimizer.last_grad_norm = norm if wide else norm.float()
        bad = (i for i, g in enumerate(gradients) if not norm.isfinite() and not g.isfinite().all())
        optimizer._last = [(next(bad, -1), list(found))]
        if optimizer.skip_nonfinite and not norm.isfinite():
            return False
    if found_inf is not None and bool(found_inf):
        return False
    if optimizer.max_grad_norm is not None:
        factor = clip_factor(float(norm), optimizer.max_grad_norm)
        if factor < 1:
            scale_gradients(gradients, factor)
    return True


def torchs_step(optimizer: Any) -> None:
    """torch.optim.AdamW's own, of the groups as they are."""
    step = torch.optim.AdamW.step
    if getattr(step, "hooked", False):  # this class's step has run the hooks already
        step = step.__wrapped__
    step(optimizer)
