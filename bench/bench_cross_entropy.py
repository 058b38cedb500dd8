"""cross_entropy_loss, forward and backward."""

import peers
import pytest
import torch
import torch.nn.functional as F
from harness import Candidate, Work, compare

from fastlm import active_implementation, cross_entropy_loss
from fastlm.ops.cross_entropy import cross_entropy_loss_reference

N, V = 4096, 10000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_cross_entropy(benchmark, device, dtype):
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(N, V, device=device, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), device=device, generator=generator)

    def forward_backward(loss_function):
        loss = loss_function(logits, targets)
        (gradient,) = torch.autograd.grad(loss, logits)
        return loss, gradient

    loss, gradient = forward_backward(cross_entropy_loss)
    wide = logits.detach().float().requires_grad_()
    expected = cross_entropy_loss_reference(wide, targets)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient.float(), wide.grad, rtol=rounding, atol=1e-6 / N)
    del loss, gradient, wide, expected

    def candidate(loss_function) -> Candidate:
        return Candidate(lambda: forward_backward(loss_function))

    compiled = torch.compile(lambda x, y: F.cross_entropy(x.float(), y), dynamic=False)
    compare(
        benchmark,
        f"cross-entropy forward + backward {N} x {V} {str(dtype).removeprefix('torch.')}, "
        f'impl "{active_implementation("cross_entropy", device)}"',
        device,
        candidate(cross_entropy_loss),
        {
            "notebook's cross_entropy_loss": candidate(peers.notebook_cross_entropy),
            "F.cross_entropy": candidate(F.cross_entropy),
            "F.cross_entropy in fp32, compiled": candidate(compiled),
        },
        Work("logits read once, gradients written once", 2 * N * V * dtype.itemsize),
    )
