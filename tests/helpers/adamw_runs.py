"""Runs of AdamW on the same parameters and gradients, by fastlm, by torch, by the reference."""

import os

import torch

import fastlm
from fastlm.ops.adamw import adamw_reference

AdamW = fastlm.AdamW
if os.environ.get("TRITON_INTERPRET") == "1":  # the same cases on the Triton kernels

    class AdamW(fastlm.AdamW):  # type: ignore[no-redef]
        def __init__(self, *args, impl="triton", **options):
            super().__init__(*args, impl=impl, **options)


HYPER = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}

# One element, none, 0-d, odd sizes, a matrix, more than a block of the fused kernel.
SHAPES = [(1,), (0,), (), (7,), (33, 65), (5000,)]


def parameters(dtype=torch.float32, device="cpu", shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        for shape in shapes
    ]


def set_gradients(params, step, scale=1.0):
    """The gradients of step number `step`: the same in every dtype, rounded to it."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype)


def run(optimizer, params, steps, scale=1.0):
    for step in steps:
        set_gradients(params, step, scale)
        optimizer.step()
    return params


def reference_run(
    steps, update=adamw_reference, max_grad_norm=None, scale=1.0, dtype=torch.float32
):
    """What `steps` updates in fp64 make of the same parameters, with gradients rounded to dtype."""
    params = [p.detach().double() for p in parameters(dtype)]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    for t, step in enumerate(steps, start=1):
        rounded = [torch.empty_like(p, dtype=dtype) for p in params]
        set_gradients(rounded, step, scale)
        gradients = [p.grad.double() for p in rounded]
        if max_grad_norm is not None:
            norm = sum(g.square().sum() for g in gradients).sqrt()
            gradients = [g * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0) for g in gradients]
        for p, gradient, (exp_avg, exp_avg_sq) in zip(params, gradients, moments, strict=True):
            update(p, gradient, exp_avg, exp_avg_sq, t, **HYPER)
    return params, moments


def assert_close(params, expected):
    """The suite's comparison for fp64 runs: rounding of a hundred steps, no more."""
    for i, (p, true_p) in enumerate(zip(params, expected, strict=True)):
        torch.testing.assert_close(
            p.detach(), true_p, rtol=1e-11, atol=1e-13, msg=lambda text, i=i: f"{i}: {text}"
        )


def snapshot(optimizer, params):
    """All that a step may change: parameters, moments, step counters."""
    tensors = [p.detach() for p in params]
    for p in params:
        if p in optimizer.state:
            tensors += [optimizer.state[p][key] for key in ("step", "exp_avg", "exp_avg_sq")]
    return [t.clone() for t in tensors]
