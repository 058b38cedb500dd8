"""The losses on a GPU: compiled by Inductor, in its CUDA graphs, and the head in chunks.

N rows, D model width, V vocabulary.
"""

import pytest
import torch
from gpu import COMPILED_DEVICES, DEVICES, recorded
from linear_cross_entropy_cases import assert_right, make, results

from fastlm import (
    check_labels,
    cross_entropy_loss,
    linear_cross_entropy_loss,
    linear_cross_entropy_plan,
)

pytestmark = pytest.mark.usefixtures("one_thread")

D, V = 32, 500


def by_logits(x, w, y):
    return cross_entropy_loss(torch.tanh(x) @ w.t(), y, softcap=30.0)


def by_head(x, w, y):
    return linear_cross_entropy_loss(torch.tanh(x), w, y, label_smoothing=0.1)


def inputs(N, device, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, D, generator=generator) / D**0.25 for n in (N, V))
    y = torch.randint(V, (N,), generator=generator)
    y[::3] = -100
    leaves = [t.to(device, dtype).requires_grad_() for t in (x, w)]
    return *leaves, y.to(device)


@pytest.mark.parametrize("device", COMPILED_DEVICES)
@pytest.mark.parametrize("loss_function", [by_logits, by_head])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_by_inductor(mode, dtype, loss_function, device):
    """The same losses and gradients as eagerly, over new batches: in CUDA graphs for
    reduce-overhead, whose memory the next call takes again."""
    torch.compiler.reset()
    compiled = torch.compile(loss_function, fullgraph=True, mode=mode, dynamic=False)
    for seed in range(5):  # the third call of a CUDA graph tree is a replay
        x, w, y = inputs(24, device, dtype, seed)
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(x, w, y)
        got = [loss.detach().clone(), *torch.autograd.grad(2.0 * loss, (x, w))]
        eager = loss_function(x, w, y)
        expected = [eager.detach(), *torch.autograd.grad(2.0 * eager, (x, w))]
        rounding = 2e-2 if dtype == torch.bfloat16 else 1e-4
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=rounding, atol=rounding * float(b.abs().max()))
    check_labels()


@pytest.mark.parametrize("device", COMPILED_DEVICES)
def test_a_bad_label_in_a_compiled_graph(device):
    torch.compiler.reset()
    compiled = torch.compile(by_head, fullgraph=True, mode="reduce-overhead", dynamic=False)
    for _ in range(3):
        x, w, y = inputs(24, device, torch.float32)
        torch.compiler.cudagraph_mark_step_begin()
        assert compiled(x, w, y).isfinite()
    y[4] = V + 2
    message = rf"\[4\] = {V + 2}"
    if device == "cpu":
        with pytest.raises(ValueError, match=message):
            compiled(x, w, y)
        return
    assert compiled(x, w, y).isnan()
    with pytest.raises(ValueError, match=message):
        check_labels()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("master", [True, False])
def test_the_head_in_chunks(master, dtype, device):
    """With an fp32 weight and with one of 16 bits, whose gradient is summed in fp32."""
    tensors = make((64, 8, 300), dtype, device, master=master)
    hidden, weight, bias, _ = tensors
    # What else a budget has to hold depends on dtypes and device.
    budget = next(
        budget
        for budget in range(60_000, 0, -2_000)
        if linear_cross_entropy_plan(hidden, weight, bias=bias, memory_budget=budget).chunks > 2
    )
    for options in ({}, {"reduction": "none"}, {"label_smoothing": 0.2, "softcap": 8.0}):
        got = results(linear_cross_entropy_loss, *tensors, memory_budget=budget, **options)
        assert got[2].dtype == weight.dtype
        assert_right(got, tensors, **options)


@pytest.mark.parametrize("device", DEVICES)
def test_the_default_chunks_under_autocast(device):
    """Vocabulary and rows for which the default takes two chunks; bf16 products, fp32 weight."""
    N, wide = (8192, 65_536) if device == "cuda" else (2048, 512)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(N, 8, device=device, generator=generator, requires_grad=True)
    w = torch.randn(wide, 8, device=device, generator=generator, requires_grad=True)
    y = torch.randint(wide, (N,), device=device, generator=generator)
    budget = None if device == "cuda" else 1_000_000
    with torch.autocast(device, torch.bfloat16):
        assert linear_cross_entropy_plan(x, w, memory_budget=budget).chunks >= 2
        loss = linear_cross_entropy_loss(x, w, y, memory_budget=budget)
        expected = torch.nn.functional.cross_entropy((x @ w.t()).float(), y)
    got = torch.autograd.grad(loss, (x, w))
    for a, b in zip(got, torch.autograd.grad(expected, (x, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loss_function", [by_logits, by_head])
def test_a_recorded_loss_notes_a_bad_label(loss_function, device):
    device = torch.device(device)
    x, w, y = inputs(24, device, torch.float32)
    losses, gradient = torch.zeros((), device=device), torch.zeros_like(w)

    def work() -> None:
        loss = loss_function(x, w, y)
        gradient.copy_(torch.autograd.grad(loss, w)[0])
        losses.copy_(loss.detach())

    work()
    expected = losses.item(), gradient.clone()
    replay = recorded(work, device)
    gradient.zero_()
    replay()
    assert losses.item() == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(gradient, expected[1])
    check_labels()
    y[4] = -7
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"\[4\] = -7"):
            replay()
        return
    replay()
    assert losses.isnan().item()
    with pytest.raises(ValueError, match=r"\[4\] = -7"):
        check_labels()
    y[4] = 1
    replay()
    assert losses.isfinite().item()
    check_labels()
