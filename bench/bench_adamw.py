"""AdamW.step, alone and with the norm and the clipping of the gradients, all tensors of a model."""

import peers
import pytest
import torch
from harness import Candidate, Work, compare

from fastlm import AdamW
from fastlm.ops.adamw import adamw_reference

OPTIONS = dict(lr=1e-6, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
MAX_NORM = 1.0
TENSORS = {
    "124 M parameters in 75": peers.gpt2_parameters,
    "2 M parameters in 2000": lambda device: peers.random_parameters([(1000,)] * 2000, device),
}


class Run:
    """Candidates over one set of parameters, gradients and moments: less memory, the same work."""

    def __init__(self, tensors: str, device: torch.device):
        self.parameters = TENSORS[tensors](device)
        self.count = sum(p.numel() for p in self.parameters)
        self.gradients = [p.grad for p in self.parameters]
        self.unclipped = [g.clone() for g in self.gradients]
        state = AdamW(self.parameters, **OPTIONS)
        state.init_state()
        keys = ("exp_avg", "exp_avg_sq")
        self.moments = [{key: state.state[p][key] for key in keys} for p in self.parameters]

    def candidate(self, optimizer, clip=None) -> Candidate:
        def run() -> None:
            if clip is not None:
                clip(self.parameters, MAX_NORM)
            optimizer.step()

        run()
        for p, moments in zip(self.parameters, self.moments, strict=True):
            optimizer.state[p].update(moments)
        self.restore()
        return Candidate(run, setup=self.restore)

    def restore(self) -> None:
        torch._foreach_copy_(self.gradients, self.unclipped)

    def torchs(self, clip=None, **options) -> Candidate:
        return self.candidate(torch.optim.AdamW(self.parameters, **OPTIONS, **options), clip)


@pytest.mark.parametrize("tensors", TENSORS)
def bench_adamw(benchmark, device, tensors):
    check_against_reference(device, None)
    run = Run(tensors, device)
    compare(
        benchmark,
        "adamw",
        f"step, {tensors} fp32 tensors",
        device,
        run.candidate(AdamW(run.parameters, **OPTIONS)),
        {
            "torch fused": run.torchs(fused=True),
            "torch foreach": run.torchs(foreach=True),
            "torch for-loop": run.torchs(foreach=False),
            "notebook's AdamW": run.candidate(peers.NotebookAdamW(run.parameters, **OPTIONS)),
        },
        Work("28 bytes a parameter: 4 reads and 3 writes", 28 * run.count),
        seconds=3,
    )


@pytest.mark.parametrize("tensors", TENSORS)
def bench_adamw_with_clipping(benchmark, device, tensors):
    check_against_reference(device, MAX_NORM)
    run = Run(tensors, device)
    clip = torch.nn.utils.clip_grad_norm_
    notebooks = peers.NotebookAdamW(run.parameters, **OPTIONS)
    compare(
        benchmark,
        "adamw",
        f"norm + clip + step, {tensors} fp32 tensors",
        device,
        run.candidate(AdamW(run.parameters, **OPTIONS, max_grad_norm=MAX_NORM)),
        {
            "clip_grad_norm_ + torch fused": run.torchs(clip, fused=True),
            "clip_grad_norm_ + torch foreach": run.torchs(clip, foreach=True),
            "clip_grad_norm_ + torch for-loop": run.torchs(clip, foreach=False),
            "notebook's clip and AdamW": run.candidate(notebooks, peers.notebook_clip),
        },
        Work("32 bytes a parameter: 4 reads and 3 writes, the gradient read twice", 32 * run.count),
        seconds=3,
    )


def bench_adamw_split(benchmark, device):
    """bf16 parameters with their exact fp32 masters, against torch on fp32 parameters."""
    run = Run("124 M parameters in 75", device)
    halves = [torch.nn.Parameter(p.detach().bfloat16()) for p in run.parameters]
    for p, gradient in zip(halves, run.gradients, strict=True):
        p.grad = gradient.bfloat16()
    optimizer = AdamW(halves, **OPTIONS, max_grad_norm=MAX_NORM, param_precision="split")
    optimizer.step()
    compare(
        benchmark,
        "adamw",
        "norm + clip + step, 124 M parameters in 75 tensors, split bf16 + int16",
        device,
        Candidate(optimizer.step, setup=run.restore),
        {
            "clip_grad_norm_ + torch fused, fp32": run.torchs(
                torch.nn.utils.clip_grad_norm_, fused=True
            ),
        },
        Work("28 bytes a parameter: of bf16 + int16, two fp32, bf16 twice", 28 * run.count),
        seconds=4,
    )


def check_against_reference(device: torch.device, max_grad_norm: float | None) -> None:
    """Three steps on small tensors against the formula in fp64."""
    parameters = peers.random_parameters([(300, 5), (7,), (1, 1)], device)
    for p in parameters:
        p.grad.mul_(1e4)  # so that clipping happens
    expected = [p.detach().double() for p in parameters]
    state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected]
    norm = sum(float(p.grad.double().square().sum()) for p in parameters) ** 0.5
    assert norm > MAX_NORM
    factor = 1.0 if max_grad_norm is None else max_grad_norm / (norm + 1e-6)
    gradients = [p.grad.double() * factor for p in parameters]
    options = {**OPTIONS, "lr": 1e-2}
    optimizer = AdamW(parameters, **options, max_grad_norm=max_grad_norm)
    for step in (1, 2, 3):
        optimizer.step()
        for p, g, (m, v) in zip(expected, gradients, state, strict=True):
            adamw_reference(p, g, m, v, step, **options)
    for p, reference in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), reference, rtol=1e-6, atol=1e-7)
