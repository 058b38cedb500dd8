"""What others run, written here anew: the notebook loop that TrainingConfig comes from (eager fp32,
readable formulas) and nanoGPT's way of making a batch.

Shapes: B batch, T context length, N = B * T rows, V vocabulary.
"""

import contextlib
import math
from collections.abc import Callable

import harness
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def notebook_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-sum-exp minus the target's logit, in fp32 and one operation at a time."""
    logits = logits.float()
    largest = logits.amax(dim=-1, keepdim=True)
    lse = (logits - largest).exp().sum(dim=-1).log() + largest.squeeze(-1)
    return (lse - torch.take_along_dim(logits, targets[..., None], dim=-1).squeeze(-1)).mean()


class NotebookAdamW(torch.optim.Optimizer):
    """A Python loop over the parameters, decay after the update, epsilon not bias-corrected."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                t = state["step"] = int(state.get("step", 0)) + 1
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                size = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
                p.addcdiv_(m, v.sqrt().add_(eps), value=-size)
                p.add_(p, alpha=-lr * group["weight_decay"])


@torch.no_grad()
def notebook_clip(params: list[Tensor], max_norm: float) -> float:
    """A host read per parameter. Given a list: the notebook gives a generator, which its second
    loop finds empty, so that it never clips."""
    norm = math.sqrt(sum(float(p.grad.float().square().sum()) for p in params))
    if norm > max_norm:
        for p in params:
            p.grad.mul_(max_norm / (norm + 1e-6))
    return norm


def notebook_batch(data: np.ndarray, B: int, T: int, device) -> tuple[Tensor, Tensor]:
    """Slices stacked by NumPy, copied and widened by torch.tensor."""
    starts = np.random.randint(0, len(data) - T, size=B)
    x = np.stack([data[i : i + T] for i in starts])
    y = np.stack([data[i + 1 : i + 1 + T] for i in starts])
    return (
        torch.tensor(x, dtype=torch.long, device=device),
        torch.tensor(y, dtype=torch.long, device=device),
    )


def nanogpt_batch(data: np.ndarray, B: int, T: int, device) -> tuple[Tensor, Tensor]:
    """Every window widened and made a tensor by itself, then stacked."""
    starts = torch.randint(len(data) - T, (B,))
    x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
    if torch.device(device).type == "cuda":
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def numpy_batch(data: np.ndarray, B: int, T: int, device) -> tuple[Tensor, Tensor]:
    """One fancy-indexed read of T + 1 tokens a window; x and y are views of one copy."""
    starts = np.random.randint(0, len(data) - T, size=(B, 1))
    windows = torch.from_numpy(data[starts + np.arange(T + 1)].astype(np.int64)).to(device)
    return windows[:, :-1], windows[:, 1:]


def gpt2_parameters(device) -> list[torch.nn.Parameter]:
    """124 M fp32 parameters in 75 tensors: GPT-2 small without biases, with gradients."""
    D, V, T = (16, 257, 32) if harness.TINY else (768, 50257, 1024)
    layer = [(D,), (3 * D, D), (D, D), (D,), (4 * D, D), (D, 4 * D)]
    return random_parameters([(V, D), (T, D), *layer * 12, (D,)], device)


def random_parameters(shapes: list[tuple[int, ...]], device) -> list[torch.nn.Parameter]:
    """Parameters of N(0, 0.02^2) with gradients of N(0, 1e-3^2)."""
    generator = torch.Generator(device).manual_seed(0)
    parameters = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.randn(shape, device=device, generator=generator) * 0.02)
        p.grad = torch.randn(shape, device=device, generator=generator) * 1e-3
        parameters.append(p)
    return parameters


def other_cross_entropies(device: torch.device) -> dict[str, Callable]:
    """Cross-entropies of other packages, as far as they are installed and run on `device`."""
    found: dict[str, Callable] = {}
    if device.type == "cuda":
        with contextlib.suppress(ImportError):
            from liger_kernel.transformers.functional import liger_cross_entropy

            found["Liger"] = liger_cross_entropy
        with contextlib.suppress(ImportError):
            from quack import cross_entropy

            def quack(x, y):
                # Its backward (0.2.4) refuses the gradient of a mean, which is one number expanded.
                share = torch.full((len(y),), 1 / len(y), device=y.device)
                return (cross_entropy(x, y, reduction="none") * share).sum()

            found["QuACK"] = quack
    return found


def other_linear_cross_entropies(device: torch.device) -> dict[str, Callable]:
    """(hidden, weight, targets) -> loss of other packages, and of torch where it has one."""
    found: dict[str, Callable] = {}
    if hasattr(F, "linear_cross_entropy"):
        # It does not know autocast: the casts that a user would write.
        found["F.linear_cross_entropy"] = lambda x, w, y: F.linear_cross_entropy(
            x.bfloat16(), w.bfloat16(), y
        )
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13
        options = torch.nn.LinearCrossEntropyOptions()
        found["F.linear_cross_entropy, chunked"] = lambda x, w, y: F.linear_cross_entropy(
            x.bfloat16(), w.bfloat16(), y, options=options
        )
    if device.type == "cuda":
        with contextlib.suppress(ImportError):
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            found["Liger"] = lambda x, w, y: liger_fused_linear_cross_entropy(
                x.bfloat16(), w.bfloat16(), y
            )
    return found
