"""linear_cross_entropy_loss over the Triton kernels, on a GPU or in Triton's interpreter.

test_triton_cross_entropy.py runs this file in a process of its own (tests/helpers/interpreter.py).
"""

import contextlib
import threading

import pytest
import torch
from fastlm.kernels import cross_entropy as triton_kernels
from interpreter import DEVICE, INTERPRETED

from fastlm import linear_cross_entropy_loss, linear_cross_entropy_plan
from fastlm.ops import cross_entropy_cpp, linear_cross_entropy

OPTIONS = dict(label_smoothing=0.2, softcap=8.0, z_loss=0.02, ignore_index=0)


@pytest.mark.parametrize("memory_budget", [None, 2_000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_the_same_chunks_around_either_kernels(return_lse, reduction, memory_budget, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 8, generator=generator, device="cpu")
    weight = torch.randn(50, 8, generator=generator, device="cpu")
    targets = torch.randint(50, (12,), generator=generator, device="cpu")
    targets[::3] = OPTIONS["ignore_index"]
    plan = linear_cross_entropy_plan(hidden, weight, memory_budget=memory_budget)
    assert plan.chunks == (1 if memory_budget is None else 3)
    results = []
    for kernels, device in ((triton_kernels, DEVICE), (cross_entropy_cpp, "cpu")):
        if INTERPRETED:  # else the device decides
            monkeypatch.setattr(linear_cross_entropy, "row_kernels", lambda device, k=kernels: k)
        leaves = [x.to(device, copy=True).requires_grad_() for x in (hidden, weight)]
        got = linear_cross_entropy_loss(
            *leaves, targets.to(device), reduction=reduction, return_lse=return_lse,
            memory_budget=memory_budget, **OPTIONS,
        )  # fmt: skip
        loss, lse = got if return_lse else (got, torch.zeros((), device=device))
        (0.7 * loss.sum() + (lse * torch.arange(12, device=device)).sum()).backward()
        results.append([x.cpu() for x in (loss, lse, *(leaf.grad for leaf in leaves))])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_label_state_is_made_outside_of_captures_and_pools(monkeypatch):
    # By no allocation of this thread, whose allocations a CUDA graph's pool may take.
    places, full = [], torch.full

    def note(*arguments, **options):
        places.append(threading.current_thread())
        return full(*arguments, **options)

    monkeypatch.setattr(triton_kernels, "_bad_labels", {})
    monkeypatch.setattr(torch, "full", note)
    triton_kernels.denominator_scale(torch.tensor([99]), 11, -100, None, True)
    triton_kernels.denominator_scale(torch.tensor([1]), 11, -100, None, True)
    assert len(places) == 1 and places[0] is not threading.current_thread()
    with pytest.raises(ValueError, match=r"\[0\] = 99"):
        triton_kernels.check_labels()
    asked = []  # torch without CUDA cannot make cuda:3 current
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: asked.append(device) or contextlib.nullcontext()
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"first loss on cuda:3.*outside of a capture first"):
        triton_kernels._bad_label_buffer(torch.device("cuda:3"))
    assert asked == [torch.device("cuda:3")]
