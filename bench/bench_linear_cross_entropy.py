"""linear_cross_entropy_loss under autocast to bf16, fp32 weights, forward and backward.

N rows, D model width, V vocabulary.
"""

import peers
import pytest
import torch
import torch.nn.functional as F
from harness import TINY, Candidate, Work, compare

from fastlm import linear_cross_entropy_loss, linear_cross_entropy_plan

SHAPES = {"cpu": [(4096, 512, 10000), (2048, 768, 50304)], "cuda": [(8192, 4096, 128256)]}
if TINY:
    SHAPES = {"cpu": [(64, 16, 300), (32, 16, 400)], "cuda": [(64, 16, 300)]}
CASES = ["default budget", "small budget", "half ignored"]


def naive(hidden, weight, targets):
    """What most trainers do: logits in bf16, their loss in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


@pytest.mark.parametrize("shape", range(2))
@pytest.mark.parametrize("case", CASES)
def bench_linear_cross_entropy(benchmark, device, case, shape):
    if shape >= len(SHAPES[device.type]):
        pytest.skip("one shape on the GPU")
    if shape == 1 and case != "default budget":
        pytest.skip("seconds a round; the first shape shows it")
    N, D, V = SHAPES[device.type][shape]
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, D, device=device, generator=generator, requires_grad=True)
    weight = torch.randn(V, D, device=device, generator=generator) / D**0.5
    weight.requires_grad_()
    targets = torch.randint(V, (N,), device=device, generator=generator)
    if case == "half ignored":
        targets[::2] = -100
    # The naive way holds at least the logits and their log-softmax, in bf16: a third of that.
    budget = 4 * N * V // 3 if case == "small budget" else None
    num_valid = N // 2 if case == "half ignored" else None

    def ours(x, w, y):
        return linear_cross_entropy_loss(x, w, y, memory_budget=budget, num_valid=num_valid)

    def forward_backward(loss_function):
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_function(hidden, weight, targets)
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    for got, expected in zip(forward_backward(ours), forward_backward(naive), strict=True):
        torch.testing.assert_close(
            got, expected, rtol=3e-2, atol=3e-2 * float(expected.abs().max())
        )
    del got, expected
    with torch.autocast(device.type, torch.bfloat16):
        plan = linear_cross_entropy_plan(hidden, weight, memory_budget=budget)

    def candidate(loss_function) -> Candidate:
        return Candidate(lambda: forward_backward(loss_function))

    torch.compiler.reset()
    rows = N // 2 if case == "half ignored" else N
    rivals = {
        "linear + F.cross_entropy in fp32, compiled": candidate(torch.compile(naive, dynamic=False))
    }
    # Without a saving for ignored rows; a round of all would take ten seconds on a CPU.
    if case != "half ignored" and (shape == 0 or device.type == "cuda"):
        others = peers.other_linear_cross_entropies(device)
        chunked = case == "small budget"
        rivals |= {
            name: candidate(function)
            for name, function in others.items()
            if device.type == "cuda" or name.endswith("chunked") == chunked
        }
    compare(
        benchmark,
        "linear_cross_entropy",
        f"{N} x {D} x {V} bf16, {case}",
        device,
        candidate(ours),
        rivals,
        Work(
            "three products of rows that count x D x V", flops=6 * rows * D * V,
            dtype=torch.bfloat16,
        ),
        note=f"{plan.chunks} chunks, {plan.extra_bytes / 2**20:.0f} MiB extra",
        seconds=5,
        least_rounds=3,
    )  # fmt: skip
