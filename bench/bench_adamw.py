"""AdamW.step with clipping: fp32, all tensors of a model in one call."""

import peers
import pytest
import torch
from harness import Candidate, Work, compare

from fastlm import AdamW, active_implementation
from fastlm.ops.adamw import adamw_reference

OPTIONS = dict(lr=1e-6, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
MAX_NORM = 1.0


@pytest.mark.parametrize("tensors", ["124 M parameters in 75", "2 M parameters in 2000"])
def bench_adamw_with_clipping(benchmark, device, tensors):
    check_against_reference(device)
    if tensors.startswith("124"):
        parameters = peers.gpt2_parameters(device)
    else:
        parameters = peers.random_parameters([(1000,)] * 2000, device)
    numbers = sum(p.numel() for p in parameters)
    gradients = [p.grad for p in parameters]
    unclipped = [g.clone() for g in gradients]
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in parameters}

    def restore() -> None:
        torch._foreach_copy_(gradients, unclipped)

    def candidate(optimizer, clip) -> Candidate:
        def run() -> None:
            clip(parameters, MAX_NORM)
            optimizer.step()

        run()
        for p in parameters:  # all share one set of moments: less memory, the same work
            state = optimizer.state[p]
            state["exp_avg"], state["exp_avg_sq"] = moments[p]
        restore()
        return Candidate(run, setup=restore)

    def torchs(**options) -> Candidate:
        optimizer = torch.optim.AdamW(parameters, **OPTIONS, **options)
        return candidate(optimizer, torch.nn.utils.clip_grad_norm_)

    compare(
        benchmark,
        f"norm + clip + AdamW, {tensors} fp32 tensors, "
        f'impl "{active_implementation("adamw", device)}"',
        device,
        candidate(
            AdamW(parameters, **OPTIONS, max_grad_norm=MAX_NORM),
            lambda *_: None,  # clips in the step
        ),
        {
            "clip_grad_norm_ + torch fused": torchs(fused=True),
            "clip_grad_norm_ + torch foreach": torchs(foreach=True),
            "clip_grad_norm_ + torch for-loop": torchs(foreach=False),
            "notebook's clip and AdamW": candidate(
                peers.NotebookAdamW(parameters, **OPTIONS), peers.notebook_clip
            ),
        },
        Work("32 bytes a parameter: 4 reads and 3 writes, the gradient read twice", 32 * numbers),
        seconds=12,
    )


def check_against_reference(device: torch.device) -> None:
    """Three steps on small tensors against the formula in fp64."""
    parameters = peers.random_parameters([(300, 5), (7,), (1, 1)], device)
    for p in parameters:
        p.grad.mul_(1e4)  # so that clipping happens
    expected = [p.detach().double() for p in parameters]
    state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected]
    norm = sum(float(p.grad.double().square().sum()) for p in parameters) ** 0.5
    gradients = [p.grad.double() * (MAX_NORM / (norm + 1e-6)) for p in parameters]
    options = {**OPTIONS, "lr": 1e-2}
    optimizer = AdamW(parameters, **options, max_grad_norm=MAX_NORM)
    originals = [p.grad.clone() for p in parameters]
    for step in (1, 2, 3):
        for p, original in zip(parameters, originals, strict=True):
            p.grad.copy_(original)
        optimizer.step()
        for p, g, (m, v) in zip(expected, gradients, state, strict=True):
            adamw_reference(p, g, m, v, step, **options)
    assert norm > MAX_NORM
    for p, reference in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), reference, rtol=1e-5, atol=1e-6)
