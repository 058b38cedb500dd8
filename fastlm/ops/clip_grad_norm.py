"""Clipping by the global L2 norm (Pascanu et al., arXiv:1211.5063):

norm = sqrt(sum over all gradients g of |g|^2);  g *= max_norm / (norm + eps)  where norm > max_norm
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastlm.kernels import shards
from fastlm.kernels.collect import Collected, collect_gradients, write_back
from fastlm.ops.dispatch import implementation


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
    max_norm = float(max_norm)
    params = [params] if isinstance(params, Tensor) else list(params)
    for p in params:
        if not isinstance(p, Tensor):
            raise TypeError(
                f"params holds a {type(p).__name__}: it must be a parameter or an iterable of them "
                f"(model.parameters())"
            )
    collected = collect_gradients([p.grad for p in params if p.grad is not None])
    norm = _norm(collected, impl)
    if max_norm < norm < math.inf:
        for table in collected.tables:
            kernels = implementation("clip_grad_norm", impl, table.device)
            kernels.scale_gradients(table, max_norm / (norm + eps))
        write_back(collected)
        increment_version([p.grad for p in params if p.grad is not None])
    return norm


def _norm(collected: Collected, impl: str) -> float:
    total = 0.0
    for table in collected.tables:
        kernels = implementation("clip_grad_norm", impl, table.device)
        sums = kernels.square_sums(table, by_class=True).values
        total += float(shards.add_over_ranks(sums, collected.classes).sum())
    return math.sqrt(total)


def global_norm(tensors: Iterable[Tensor], *, impl: str = "auto") -> float:
    """The L2 norm of all `tensors` taken as one vector, summed in fp64."""
    return _norm(collect_gradients(tensors), impl)


@torch.no_grad()
def clip_gradients_reference(params: Iterable[Tensor], max_norm: float, eps: float = 1e-6) -> float:
    """The formula above in fp64: what every implementation is tested against."""
    gradients = [p.grad for p in params if p.grad is not None]
    norm = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
    if max_norm < norm < float("inf"):
        for gradient in gradients:
            gradient.copy_(gradient.double() * (max_norm / (norm + eps)))
    return norm
