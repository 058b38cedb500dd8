"""The AdamW update (Loshchilov & Hutter, arXiv:1711.05101), as torch.optim.AdamW computes it:

p   <- p * (1 - lr * weight_decay)
m   <- beta1 * m + (1 - beta1) * g
v   <- beta2 * v + (1 - beta2) * g^2
p   <- p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)          t = 1, 2, …

The class around it is fastlm.optim.AdamW, its kernels are csrc/adamw.cpp and kernels/adamw.py. They
change tensors that they find by their addresses, so the update is no torch.library op.
"""

import torch
from torch import Tensor


@torch.no_grad()
def adamw_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,  # t: 1 at the first update
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One update of `param`, `exp_avg` (m) and `exp_avg_sq` (v) in place, all of one shape.

    The formula above line by line, in the tensors' own dtype: fp64 tensors make it the oracle that
    every implementation is tested against.
    """
    beta1, beta2 = betas
    param.mul_(1 - lr * weight_decay)
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).add_(grad.square(), alpha=1 - beta2)
    mean = exp_avg / (1 - beta1**step)
    variance = exp_avg_sq / (1 - beta2**step)
    param.sub_(lr * mean / (variance.sqrt() + eps))
