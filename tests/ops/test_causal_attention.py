"""causal_attention: every implementation against fp64 truth, for PyTorch's own error.

B batch, H query heads, H_kv key heads, T positions, d head width.
"""

import copy
import subprocess
import sys

import pytest
import torch
from causal_attention_cases import DTYPES, NAMES, assert_right, make, results, sdpa
from tolerance import DEVICES, assert_bitwise_equal

from fastlm import active_implementation, causal_attention
from fastlm.extension import extension
from fastlm.ops.causal_attention import (
    apply_rope,
    causal_attention_reference,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def exhaustive(*values):
    return [pytest.param(*value, marks=pytest.mark.exhaustive) for value in values]


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
every_implementation = pytest.mark.parametrize(
    "impl, device", [("cpp", "cpu"), *(("torch", device) for device in DEVICES)]
)


def check(case, impl="cpp", **tolerance):
    assert_right(results(causal_attention, case, impl=impl), case, **tolerance)


# --- Sizes. Around vectors, tiles and blocks, and far from them. ---


@pytest.mark.parametrize(
    "T", [1, 16, 17, 257, *exhaustive((2,), (15,), (31,), (32,), (33,), (255,), (1024,), (4099,))]
)
@every_dtype
@every_implementation
def test_lengths(impl, device, dtype, T):
    shape = (2, 2, 2) if T < 1024 else (1, 1, 1)
    check(make(shape, T, 64 if T < 1024 else 40, dtype, device=device), impl)


@pytest.mark.parametrize(
    "d", [17, 40, 128, 256, *exhaustive(*((d,) for d in (1, 2, 8, 16, 24, 33, 64, 80, 96, 255)))]
)
@every_dtype
@every_implementation
def test_head_widths(impl, device, dtype, d):
    check(make((1, 2, 2), 67, d, dtype, device=device), impl)


@pytest.mark.exhaustive
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257])
@pytest.mark.parametrize("d", [16, 17, 24, 33, 40, 64, 80, 128, 256])
@every_dtype
def test_every_pair_of_sizes(dtype, d, T):
    check(make((1, 3, 1), T, d, dtype))
    if d % 2 == 0:
        check(make((1, 3, 1), T, d, dtype, rope=True))
    check(make((1, 2, 2), T, d, dtype, Tq=(T + 1) // 2))


@pytest.mark.parametrize("heads", [(8, 2), (6, 1), (3, 3)], ids=str)
@every_dtype
@every_implementation
def test_grouped_heads(impl, device, dtype, heads):
    check(make((2, *heads), 37, 24, dtype, device=device), impl)


@pytest.mark.parametrize("Tq, T", [(1, 40), (5, 40), (39, 40), *exhaustive((17, 300), (256, 257))])
@every_dtype
@every_implementation
def test_fewer_queries_than_keys(impl, device, dtype, Tq, T):
    check(make((2, 4, 2), T, 32, dtype, Tq=Tq, device=device), impl)


@pytest.mark.parametrize("scale", [0.03, 1.0])
@every_implementation
def test_scale(impl, device, scale):
    check(make(T=20, scale=scale, device=device), impl)


@every_implementation
def test_sizes_of_zero(impl, device):
    for shape, T, Tq in (((0, 2, 2), 5, None), ((2, 2, 1), 0, None), ((1, 2, 2), 5, 0)):
        case = make(shape, T, 8, Tq=Tq, device=device)
        got = results(causal_attention, case, impl=impl)
        for name, x, like in zip(NAMES, got, (case.q, case.q, case.k, case.v), strict=True):
            assert x.shape == like.shape and not x.any(), name


# --- Rotary positions ---


@pytest.mark.parametrize("T, d", [(1, 8), (37, 40), (130, 64)])
@every_dtype
@every_implementation
def test_rope(impl, device, dtype, T, d):
    case = make((2, 4, 2), T, d, dtype, rope=True, device=device)
    check(case, impl)
    cos, sin = case.rope
    before = causal_attention(apply_rope(case.q, cos, sin), apply_rope(case.k, cos, sin), case.v)
    folded = causal_attention(case.q, case.k, case.v, rope=case.rope, impl=impl)
    # Rotated before, q and k are rounded once more.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
    torch.testing.assert_close(folded, before, rtol=tolerance, atol=tolerance)


def test_the_pairs_that_are_rotated():
    cos, sin = torch.tensor([[0.6, 0.0]]), torch.tensor([[0.8, 1.0]])
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    torch.testing.assert_close(apply_rope(x, cos, sin), torch.tensor([[-1.0, 2.0, -4.0, 3.0]]))
    assert apply_rope(x.double(), cos, sin).dtype == torch.float64


# --- Layouts ---


def projected(case):
    """q, k and v as views of one projection's output, (B, T, (H + 2 H_kv) * d)."""
    whole = torch.cat([x.transpose(1, 2).flatten(-2) for x in (case.q, case.k, case.v)], dim=-1)
    H, H_kv = case.q.shape[1], case.k.shape[1]
    return whole.unflatten(-1, (H + 2 * H_kv, -1)).transpose(1, 2).split((H, H_kv, H_kv), dim=1)


LAYOUTS = {
    "dense": lambda case: (case.q, case.k, case.v),
    "projection": projected,
    "expanded batch": lambda case: [x[:1].expand_as(x) for x in (case.q, case.k, case.v)],
    "every second head": lambda case: [
        torch.stack((x, x + 1), dim=2).flatten(1, 2)[:, ::2] for x in (case.q, case.k, case.v)
    ],
    "every second position": lambda case: [
        torch.stack((x, x + 1), dim=3).flatten(2, 3)[..., ::2, :] for x in (case.q, case.k, case.v)
    ],
    "heads' elements apart": lambda case: [x.mT.contiguous().mT for x in (case.q, case.k, case.v)],
    "part of wider heads": lambda case: [
        torch.nn.functional.pad(x, (3, 4), value=9.0)[..., 3:-4] for x in (case.q, case.k, case.v)
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@every_dtype
@every_implementation
def test_layouts(impl, device, dtype, layout):
    case = make((3, 4, 2), 19, 24, dtype, rope=True, device=device)
    case.q, case.k, case.v = LAYOUTS[layout](case)
    before = [x.clone() for x in (case.q, case.k, case.v)]

    def check_layout():
        if impl != "cpp":
            return check(case, impl)
        # SDPA takes another kernel for some layouts, with other errors; ours gives the same bits.
        dense = copy.copy(case)
        for name in ("q", "k", "v", "grad_out"):
            setattr(dense, name, getattr(case, name).contiguous())
        check(dense)
        found, expected = (results(causal_attention, c, impl=impl) for c in (case, dense))
        for name, x, y in zip(NAMES, found, expected, strict=True):
            assert_bitwise_equal(x, y, name)

    for grad_out in (case.grad_out, case.grad_out.mT.contiguous().mT):
        case.grad_out = grad_out
        out = causal_attention(case.q, case.k, case.v, rope=case.rope, impl=impl)
        assert out.transpose(1, 2).is_contiguous()  # so that its heads are joined without a copy
        check_layout()
    for x, copied in zip((case.q, case.k, case.v), before, strict=True):
        assert_bitwise_equal(x, copied, "an input")
    case.grad_out = torch.ones((), dtype=dtype, device=device).expand_as(case.q)  # of out.sum()
    check_layout()


@every_implementation
def test_any_leading_dimensions(impl, device):
    case = make((6, 4, 2), 9, 8, device=device)
    expected = results(causal_attention, case, impl=impl)
    for leading in ((2, 3), (1, 6, 1)):
        shaped = make((6, 4, 2), 9, 8, device=device)
        for name in ("q", "k", "v", "grad_out"):
            setattr(shaped, name, getattr(shaped, name).unflatten(0, leading))
        for got, x in zip(results(causal_attention, shaped, impl=impl), expected, strict=True):
            assert_bitwise_equal(got.flatten(0, len(leading) - 1), x)
    out = causal_attention(case.q[0], case.k[0], case.v[0], impl=impl)
    torch.testing.assert_close(out, expected[0][0], rtol=1e-5, atol=1e-6)


# --- Values that break a softmax ---


@pytest.mark.parametrize("largest", [100.0, 1e4])
@every_dtype
@every_implementation
def test_large_scores(impl, device, dtype, largest):
    # An fp32 score of 1e4 is itself off by 1e-3, and so is its probability.
    case = make((1, 2, 2), 70, 32, dtype, device=device)
    size = (largest / (case.q.float() @ case.k.float().mT / 32**0.5).abs().max()) ** 0.5
    case.q, case.k = (case.q * size).to(dtype), (case.k * size).to(dtype)
    check(case, impl, loosened=1 + largest / 4)


@every_dtype
@every_implementation
def test_one_huge_key(impl, device, dtype):
    # Every maximum moves when a block meets it, by more than an exp can take.
    for place in (0, 20, 69):
        case = make((1, 2, 2), 70, 32, dtype, device=device)
        case.k[:, :, place] *= 300
        check(case, impl, loosened=200)


@every_dtype
@every_implementation
def test_equal_scores_are_a_mean(impl, device, dtype):
    case = make((1, 2, 2), 67, 16, dtype, device=device)
    case.k[:] = case.k[:, :, :1].clone()
    check(case, impl)
    case.q[:] = 0
    check(case, impl)
    count = torch.arange(1, 68, device=device).view(-1, 1)
    out = causal_attention(case.q, case.k, case.v, impl=impl)
    mean = case.v.double().cumsum(-2) / count
    torch.testing.assert_close(out.double(), mean, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["q", "k", "v", "grad_out"])
@every_dtype
def test_infinity_and_nan_go_no_further_than_pytorchs(dtype, where, value):
    # Its masked products are 0 * NaN, too: by SDPA within its blocks, by the formula everywhere.
    case = make((1, 2, 2), 40, 16, dtype)
    t = 21
    getattr(case, where)[0, 1, t, 5] = value
    got = results(causal_attention, case, impl="cpp")
    allowed = zip(results(sdpa, case), results(causal_attention_reference, case), strict=True)
    for name, x, (a, b) in zip(NAMES, got, allowed, strict=True):
        strange = ~x.isfinite() & a.isfinite() & b.isfinite()
        assert not strange.any(), f"{name}: {strange.nonzero()[:3].tolist()}"
        assert x[0, 0].isfinite().all(), f"{name}: the other head"
    if value != value:  # nor is it hidden
        rows = {"q": slice(t, t + 1), "grad_out": slice(0)}.get(where, slice(t, 40))
        assert got[0][0, 1, rows, 5].isnan().all()
        rows = slice(t, t + 1) if where in ("q", "grad_out") else rows
        assert got[1][0, 1, rows].isnan().all()
        assert got[2][0, 1, : t + 1].isnan().all()
        assert where == "v" or got[3][0, 1, : t + 1, 5].isnan().all()


# --- Instruction sets, threads, memory ---


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
@every_dtype
def test_instruction_sets(isa, dtype):
    module = extension()
    try:
        module.force_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        for T, d in ((1, 8), (19, 40), (70, 64), (33, 17)):
            check(make((1, 4, 2), T, d, dtype))
        check(make((1, 4, 2), 70, 64, dtype, rope=True))
        check(make((1, 4, 2), 70, 64, dtype, Tq=21))
    finally:
        module.force_isa(None)


@pytest.mark.parametrize(
    "shape, T, d", [((2, 4, 2), 130, 64), ((1, 1, 1), 300, 40), *exhaustive(((3, 6, 1), 1030, 64))]
)
@every_dtype
def test_threads_do_not_change_any_bit(dtype, shape, T, d):
    case = make(shape, T, d, dtype, rope=True)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(causal_attention, case, impl="cpp"))
    for other in found[1:]:
        for name, got, expected in zip(NAMES, other, found[0], strict=True):
            assert_bitwise_equal(got, expected, name)


PEAK = """
import re, sys, torch
from fastlm import causal_attention

torch.set_num_threads(1)

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def extra(T):
    # The kernel's own count of the process's pages.
    q, k, v = (torch.randn(1, 1, T, 16).requires_grad_() for _ in range(3))
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = status("VmRSS")
    causal_attention(q, k, v, impl="cpp").sum().backward()
    return status("VmHWM") - before

extra(64)  # what libraries allocate once
print(extra(4096), "torch._dynamo" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_no_memory_of_the_square_and_no_compiler():
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # Results and gradients are 7 x 0.25 MiB, all scores at once would be 64 MiB.
    extra, compiler = run.stdout.split()
    assert int(extra) < 8 * 2**20
    # By torch.library.custom_op it would be loaded: seconds at the start of every generation.
    assert compiler == "False"


def test_which_implementation_is_active():
    assert active_implementation("causal_attention") == "cpp"
    assert active_implementation("causal_attention", "cuda") == "torch"
    assert active_implementation("causal_attention", dtype=torch.float64) == "torch"


@every_implementation
def test_the_reference_against_loops(impl, device):
    case = make((1, 2, 1), 6, 4, torch.float64, Tq=4)
    out = causal_attention_reference(case.q, case.k, case.v)
    assert out.dtype == torch.float64
    for h in range(2):
        for i in range(4):
            scores = [float(case.q[0, h, i] @ case.k[0, 0, j]) / 2 for j in range(i + 3)]
            weights = torch.tensor(scores, dtype=torch.float64).exp()
            mean = (weights / weights.sum()) @ case.v[0, 0, : i + 3]
            torch.testing.assert_close(out[0, h, i], mean)
