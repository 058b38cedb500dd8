"""linear_cross_entropy_loss: its chunks, how they are planned, and the memory that they take.

N rows, D model width, V vocabulary.
"""

import subprocess
import sys

import pytest
import torch
from linear_cross_entropy_cases import assert_right, make, results

from fastlm import (
    LinearCrossEntropyPlan,
    linear_cross_entropy_loss,
    linear_cross_entropy_plan,
)
from fastlm.ops import head

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_change_nothing(reduction, dtype):
    # Down to one row at a time; without a bias, too.
    for bias in (True, False):
        tensors = make((24, 16, 500), dtype, bias=bias)
        hidden, weight, b, _ = tensors
        whole = linear_cross_entropy_plan(hidden, weight, bias=b)
        assert whole.chunks == 1 and whole.rows_per_chunk == 24
        with pytest.raises(ValueError, match="memory_budget=1: it must be at least") as error:
            linear_cross_entropy_plan(hidden, weight, bias=b, memory_budget=1)
        least = int(str(error.value).split("at least ")[1].split(" ")[0].replace(",", ""))
        seen = set()
        for budget in (whole.extra_bytes, whole.extra_bytes * 2 // 3, least):
            plan = linear_cross_entropy_plan(hidden, weight, bias=b, memory_budget=budget)
            assert plan.extra_bytes <= budget and plan.chunks * plan.rows_per_chunk >= 24
            seen.add(plan.rows_per_chunk)
            got = results(
                linear_cross_entropy_loss, *tensors, reduction=reduction, memory_budget=budget
            )
            assert_right(got, tensors, reduction=reduction)
        assert len(seen) == 3 and min(seen) == 1


HEADS = {
    "Llama 3": (8192, 4096, 128256), "Gemma 2": (8192, 2304, 256000),
    "Qwen 2.5": (16384, 3584, 152064), "GPT-2": (16384, 768, 50304),
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta is planned as a GPU is
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_default_plan_of_known_heads(head, weight_dtype, device):
    N, D, V = HEADS[head]
    hidden = torch.empty(1, dtype=torch.bfloat16, device=device).expand(N, D)
    weight = torch.empty(1, dtype=weight_dtype, device=device).expand(V, D)
    plan = linear_cross_entropy_plan(hidden, weight)
    assert isinstance(plan, LinearCrossEntropyPlan)
    assert plan.chunks <= 16 and plan.rows_per_chunk * plan.chunks >= N
    assert plan.rows_per_chunk >= 1024 and plan.rows_per_chunk % 256 == 0
    logits = 2 * N * V
    assert plan.scratch_bytes >= logits // plan.chunks
    if V >= 128256 and device == "cpu":
        assert plan.scratch_bytes < logits / 4
    elif device == "meta":  # within the 3.2 GiB that 8192 x 4096 x 128256 may take
        assert plan.rows_per_chunk >= 4096 and plan.scratch_bytes < 0.6 * logits
        assert head != "Llama 3" or (plan.chunks == 2 and plan.extra_bytes < 3.2 * 2**30)
    # bf16: an fp32 sum of its gradient; fp32: a bf16 copy, the sum is what is returned.
    assert plan.weight_bytes == (2 if weight_dtype == torch.float32 else 4) * V * D
    assert plan.extra_bytes == plan.scratch_bytes + plan.weight_bytes
    # What a budget forbids it says; the same number of bytes is enough.
    assert linear_cross_entropy_plan(hidden, weight, memory_budget=plan.extra_bytes).chunks <= 16
    with pytest.raises(ValueError, match=f"{plan.weight_bytes:,} of them for the weight"):
        linear_cross_entropy_plan(hidden, weight, memory_budget=plan.weight_bytes)


def test_default_plan_of_small_heads():
    for N in (0, 1, 300, 1024, 4096):
        hidden, weight = torch.empty(1).expand(N, 512), torch.empty(1).expand(10_000, 512)
        plan = linear_cross_entropy_plan(hidden, weight)
        assert (plan.rows_per_chunk, plan.chunks) == (N, min(N, 1))
        assert plan.weight_bytes == 0 and plan.scratch_bytes >= 4 * N * 10_000


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_default_chunks_of_a_large_head(weight_dtype, monkeypatch):
    # Llama 3's ratios at a hundredth of its size, through several chunks of the default plan.
    monkeypatch.setattr(head, "_SCRATCH", 600_000)
    monkeypatch.setattr(head, "_LEAST_ROWS", 16), monkeypatch.setattr(head, "_ROWS", 8)
    tensors = make((500, 40, 1283), torch.bfloat16, master=weight_dtype == torch.float32)
    plan = linear_cross_entropy_plan(*tensors[:2], bias=tensors[2])
    assert plan.chunks == 4 and plan.rows_per_chunk % 8 == 0
    assert_right(results(linear_cross_entropy_loss, *tensors), tensors)


def test_budgets_are_refused_with_what_works():
    hidden, weight, bias, _ = make((24, 16, 500), torch.bfloat16, master=False)
    for budget in (0, 1, 40_000):
        with pytest.raises(ValueError, match=f"memory_budget={budget}: it must be") as error:
            linear_cross_entropy_plan(hidden, weight, bias=bias, memory_budget=budget)
        least = int(str(error.value).split("at least ")[1].split(" ")[0].replace(",", ""))
        assert linear_cross_entropy_plan(hidden, weight, bias=bias, memory_budget=least)
        with pytest.raises(ValueError, match=f"it must be at least {least:,}"):
            linear_cross_entropy_plan(hidden, weight, bias=bias, memory_budget=least - 1)


def test_the_gpus_sum_of_chunks(monkeypatch):
    # Its two matmuls with fp32 results, by stand-ins that take what CUDA's take.
    def product(a, b, out_dtype, out):
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == out.dtype == torch.float32
        return a.float() @ b.float()

    mm, addmm, calls = torch.mm, torch.addmm, []

    def gpu_mm(a, b, *, out_dtype=None, out=None):
        if out_dtype is None:
            return mm(a, b, out=out)
        calls.append("mm")
        return out.copy_(product(a, b, out_dtype, out))

    def gpu_addmm(c, a, b, *, out_dtype=None, out=None, **rest):
        if out_dtype is None:
            return addmm(c, a, b, out=out, **rest)
        calls.append("addmm")
        assert c is out
        return out.copy_(c + product(a, b, out_dtype, out))

    monkeypatch.setattr(head.Head, "sliced", False)
    monkeypatch.setattr(torch, "mm", gpu_mm), monkeypatch.setattr(torch, "addmm", gpu_addmm)
    for master in (True, False):
        tensors = make((60, 16, 500), torch.bfloat16, master=master)
        got = results(linear_cross_entropy_loss, *tensors, memory_budget=90_000)
        assert calls == ["mm", "addmm"], calls
        assert_right(got, tensors)
        calls.clear()


PEAK = """
import re, sys, torch
from fastlm import linear_cross_entropy_loss, linear_cross_entropy_plan

torch.set_num_threads(1)
N, D, V = 2048, 128, 20000
weight_dtype, biased = getattr(torch, sys.argv[1]), sys.argv[2] == "bias"
hidden = torch.randn(N, D).bfloat16().requires_grad_()
weight = torch.randn(V, D).to(weight_dtype).requires_grad_()
bias = torch.randn(V).to(weight_dtype).requires_grad_() if biased else None
targets = torch.randint(V, (N,))

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def extra(budget):
    # The kernel's own count of the process's pages: what is used inside of a matmul counts, too.
    hidden.grad = weight.grad = None
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = status("VmRSS")
    loss = linear_cross_entropy_loss(hidden, weight, targets, bias=bias, memory_budget=budget)
    loss.backward()
    returned = hidden.grad.nbytes + weight.grad.nbytes
    return status("VmHWM") - before - returned

extra(2**30)  # what libraries allocate once
for budget in (2**30, 2**26, 2**25):
    plan = linear_cross_entropy_plan(hidden, weight, bias=bias, memory_budget=budget)
    print(budget, plan.chunks, plan.extra_bytes, extra(budget))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    "weight, bias",  # of bf16 products
    [
        ("float32", "bias"),
        pytest.param("bfloat16", "none", marks=pytest.mark.exhaustive),
        pytest.param("float32", "none", marks=pytest.mark.exhaustive),
        pytest.param("bfloat16", "bias", marks=pytest.mark.exhaustive),
        pytest.param("float16", "bias", marks=pytest.mark.exhaustive),
        pytest.param("float16", "none", marks=pytest.mark.exhaustive),
    ],
)
def test_peak_memory_stays_in_the_budget(weight, bias):
    command = [sys.executable, "-c", PEAK, weight, bias]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [[int(word) for word in line.split()] for line in run.stdout.splitlines()]
    assert lines[0][1] == 1 and len({line[1] for line in lines}) == 3
    for budget, _, planned, measured in lines:
        assert planned <= budget
        assert measured <= planned + 6 * 2**20, run.stdout  # allocator's and matmul's own
