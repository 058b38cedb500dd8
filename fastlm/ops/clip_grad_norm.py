"""Clipping by the global L2 norm (Pascanu et al., arXiv:1211.5063):

norm = sqrt(sum over all gradients g of |g|^2);  g *= max_norm / (norm + eps)  if norm > max_norm
"""

import math
import threading
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastlm.kernels.collect import collect_gradients
from fastlm.ops.dispatch import implementation, resolve_implementation

# What kernels keep of a call (TensorTable.cache): the next one, mostly with the same sizes and
# addresses, sends nothing to the device. Of each thread: two may clip at the same time.
_kept = threading.local()


def clip_factor(norm: float, max_norm: float, eps: float = 1e-6) -> float:
    """What to multiply gradients of this norm by. No factor repairs NaN or infinity: 1."""
    return max_norm / (norm + eps) if max_norm < norm < math.inf else 1.0


@torch.no_grad()
def clip_gradients(
    params: Tensor | Iterable[Tensor], max_norm: float, eps: float = 1e-6, *, impl: str = "auto"
) -> float:
    """Scales the gradients of `params` in place so that their global L2 norm is at most `max_norm`.

    params: a parameter or any iterable of them (a generator too); those without a gradient are
    passed over, and one that is there twice counts once. Of DTensors the norm is that of the whole
    tensors. Squares are summed in fp64. Returns the norm before clipping. A norm that is infinite
    or NaN is returned and the gradients are left as they are: no factor could repair them.
    """
    if not float(max_norm) > 0:
        raise ValueError(f"max_norm={max_norm}: it must be positive (float('inf') never clips)")
    params = [params] if isinstance(params, Tensor) else list(params)
    for p in params:
        if not isinstance(p, Tensor):
            raise TypeError(
                f"params holds a {type(p).__name__}: it must be a parameter or an iterable of them "
                f"(model.parameters())"
            )
    max_norm, devices = float(max_norm), {p.device for p in params}
    if "torch" in [resolve_implementation("clip_grad_norm", impl, d) for d in devices]:
        gradients = list({id(p.grad): p.grad for p in params if p.grad is not None}.values())
        module = implementation("clip_grad_norm", "torch", "cpu")
        norm = float(module.gradient_norm(gradients))
        if (factor := clip_factor(norm, max_norm, eps)) < 1:
            module.scale_gradients(gradients, factor)
        return norm
    collected = collect_gradients(params, _kept.__dict__.setdefault("caches", {}))
    kernels = [implementation("clip_grad_norm", impl, t.device) for t in collected.tables]
    norm = math.sqrt(collected.square_sum(kernels)[0]) if kernels else 0.0
    if (factor := clip_factor(norm, max_norm, eps)) < 1:
        for table, module in zip(collected.tables, kernels, strict=True):
            module.scale_gradients(table, factor)
        collected.write_back()
        increment_version(collected.updated)
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
