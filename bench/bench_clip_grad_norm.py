"""clip_gradients on the fp32 gradients of GPT-2 124M, with a norm that is too large."""

import peers
import torch
from harness import Candidate, Work, compare
from torch.nn.utils import clip_grad_norm_

from fastlm import clip_gradients
from fastlm.ops.clip_grad_norm import clip_gradients_reference

MAX_NORM = 1.0


def bench_clip_gradients(benchmark, device):
    check_against_reference(device)
    parameters = peers.gpt2_parameters(device)
    gradients = [p.grad for p in parameters]
    unclipped = [g.clone() for g in gradients]

    def candidate(clip) -> Candidate:
        return Candidate(
            lambda: clip(parameters, MAX_NORM),
            setup=lambda: torch._foreach_copy_(gradients, unclipped),
        )

    compare(
        benchmark,
        "clip_grad_norm",
        "clip_gradients, 124 M fp32 gradients in 75 tensors",
        device,
        candidate(clip_gradients),
        {
            "clip_grad_norm_": candidate(clip_grad_norm_),
            "clip_grad_norm_, foreach": candidate(lambda p, n: clip_grad_norm_(p, n, foreach=True)),
            "notebook's clip_gradients": candidate(peers.notebook_clip),
        },
        Work(
            "12 bytes a gradient: read for the norm, read and written to be scaled",
            12 * sum(g.numel() for g in gradients),
        ),
        seconds=4,
    )


def check_against_reference(device: torch.device) -> None:
    ours, expected = (
        peers.random_parameters([(3000, 500), (7,), (1, 1)], device) for _ in range(2)
    )
    norm = clip_gradients(ours, MAX_NORM)
    reference_norm = clip_gradients_reference(expected, MAX_NORM)
    # torch's own norm sums long tensors one after the other in fp32: 2e-5 off here, 3e-3 for the
    # 38.6 M gradients of GPT-2's embedding (CPU, torch 2.13).
    assert reference_norm > MAX_NORM and abs(norm / reference_norm - 1) < 1e-12
    for p, q in zip(ours, expected, strict=True):
        # Two roundings of fp32, of the factor and of the product.
        torch.testing.assert_close(p.grad, q.grad, rtol=2**-22, atol=0)
