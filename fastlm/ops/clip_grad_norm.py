"""Clipping by the global L2 norm (Pascanu et al., arXiv:1211.5063):

norm = sqrt(sum over all gradients g of |g|^2);  g *= max_norm / (norm + eps)  where norm > max_norm
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastlm.ops.dispatch import resolve_implementation

_PART = 1 << 16  # elements; larger parts are no faster


def global_norm(tensors: list[Tensor]) -> Tensor:
    """The L2 norm of all `tensors` taken as one vector: 0-d, at least fp32, on the first's device.

    Summed in fp32 or wider whatever the tensors' dtype, without a host sync.
    """
    if not tensors:
        return torch.zeros(())
    device = tensors[0].device
    norms = [
        torch.linalg.vector_norm(part, dtype=_wide(t.dtype)).to(device)
        for t in tensors
        for part in _parts(t)
    ]
    dtype = torch.float64 if torch.float64 in {n.dtype for n in norms} else torch.float32
    return torch.linalg.vector_norm(torch.stack([n.to(dtype) for n in norms]))


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """`tensor` in parts whose norms torch sums accurately.

    On the CPU it adds squares up one by one in fp32: of 60 M elements the norm came out 0.5 % low.
    """
    if tensor.device.type != "cpu" or tensor.numel() <= _PART:
        return (tensor,)
    return tensor.split(max(1, _PART * len(tensor) // tensor.numel()))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


@torch.no_grad()
def clip_gradients(
    params: Tensor | Iterable[Tensor], max_norm: float, eps: float = 1e-6, *, impl: str = "auto"
) -> float:
    """Scales the gradients of `params` in place so that their global L2 norm is at most `max_norm`.

    params: a parameter or any iterable of them (a generator too); those without a gradient are
    passed over. Returns the norm before clipping. A norm that is infinite or NaN is returned and
    the gradients are left as they are: no factor could repair them.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm}: it must be positive (float('inf') never clips)")
    # Materialised once: a generator would be empty when the gradients come to be scaled.
    params = [params] if isinstance(params, Tensor) else list(params)
    gradients = [p.grad for p in params if p.grad is not None]
    if gradients:
        resolve_implementation("clip_grad_norm", impl, gradients[0].device)
    norm = float(global_norm(gradients))
    if max_norm < norm < float("inf"):
        for gradient in gradients:
            gradient.mul_(max_norm / (norm + eps))
    return norm


@torch.no_grad()
def clip_gradients_reference(params: Iterable[Tensor], max_norm: float, eps: float = 1e-6) -> float:
    """The formula above in fp64: what every implementation is tested against."""
    gradients = [p.grad for p in params if p.grad is not None]
    norm = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
    if max_norm < norm < float("inf"):
        for gradient in gradients:
            gradient.copy_(gradient.double() * (max_norm / (norm + eps)))
    return norm
