"""cross_entropy_loss, forward and backward. N rows, V vocabulary."""

import peers
import pytest
import torch
import torch.nn.functional as F
from harness import TINY, Candidate, Work, compare

from fastlm import cross_entropy_loss
from fastlm.ops.cross_entropy import cross_entropy_loss_reference

SHAPES = {"cpu": [(4096, 10000), (2048, 50304)], "cuda": [(8192, 32000), (8192, 50304)]}
SHAPES["cuda"].append((8192, 128256))
if TINY:
    SHAPES = {key: [(300, 40), (300, 100), (300, 101)] for key in SHAPES}


@pytest.mark.parametrize("shape", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def bench_cross_entropy(benchmark, device, inplace, dtype, shape):
    if shape >= len(SHAPES[device.type]):
        pytest.skip("two shapes on the CPU")
    if inplace and shape == 0:
        pytest.skip("the larger shapes show it")
    N, V = SHAPES[device.type][shape]
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(N, V, device=device, generator=generator).to(dtype)
    targets = torch.randint(V, (N,), device=device, generator=generator)
    # In place the gradient takes the logits' memory: each run gets them anew, before the clock.
    work = torch.empty_like(logits).requires_grad_()

    def forward_backward(loss_function):
        loss = loss_function(work, targets)
        return loss, torch.autograd.grad(loss, work)[0]

    def restore():
        work.detach().copy_(logits)

    def ours(x, y):
        return cross_entropy_loss(x, y, inplace=inplace)

    restore()
    loss, gradient = forward_backward(ours)
    rows = slice(0, 256)
    wide = logits[rows].float().requires_grad_()
    expected = cross_entropy_loss_reference(wide, targets[rows], num_items=N)
    expected.backward()
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient[rows].float(), wide.grad, rtol=rounding, atol=1e-6 / N)
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), targets), rtol=1e-5, atol=0)
    del loss, gradient, wide, expected

    def candidate(loss_function) -> Candidate:
        return Candidate(lambda: forward_backward(loss_function), setup=restore)

    torch.compiler.reset()
    rivals = {
        "F.cross_entropy": candidate(F.cross_entropy),
        "F.cross_entropy, compiled": candidate(torch.compile(F.cross_entropy, dynamic=False)),
        **{
            name: candidate(function)
            for name, function in peers.other_cross_entropies(device).items()
        },
    }
    if shape == 0:  # its own shape; twenty times ours, most of a round
        rivals["notebook's cross_entropy_loss"] = candidate(peers.notebook_cross_entropy)
    compare(
        benchmark,
        "cross_entropy",
        f"{N} x {V} {str(dtype).removeprefix('torch.')}{', in place' * inplace}",
        device,
        candidate(ours),
        rivals,
        Work("logits read once, gradients written once", 2 * N * V * dtype.itemsize),
        seconds=3,
    )
