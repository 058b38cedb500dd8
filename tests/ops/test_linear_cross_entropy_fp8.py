"""linear_cross_entropy_loss(fp8=True): what rounding the logits' operands to float8 costs.

On a CPU torch._scaled_mm computes what a GPU's does, up to the order of the sums.
N rows, D model width, V vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F
from linear_cross_entropy_cases import results
from tolerance import DEVICES

from fastlm import linear_cross_entropy_loss, linear_cross_entropy_plan
from fastlm.ops.head import fp8_product, to_fp8

pytestmark = pytest.mark.usefixtures("one_thread")
if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
    DEVICES = [device for device in DEVICES if device != "cuda"]  # it has no such product

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def case(N=96, D=64, V=512, *, dtype=torch.bfloat16, device="cpu", bias=False):
    """Rows of unit root mean square, as the last norm makes them, and logits of order 1."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=draw)
    hidden /= hidden.square().mean(-1, keepdim=True).sqrt()
    weight = torch.randn(V, D, generator=draw) / D**0.5
    targets = torch.randint(V, (N,), generator=draw)
    targets[::7] = -100
    leaves = [hidden.to(dtype), weight, torch.randn(V, generator=draw) if bias else None]
    leaves = [None if t is None else t.to(device).requires_grad_() for t in leaves]
    return *leaves, targets.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 1e-7, 448.0, 449.0, 3e4])
def test_rounding_to_float8_is_of_half_a_unit_in_the_last_place(dtype, magnitude, device):
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    x = (x / x.abs().max() * magnitude).to(dtype).to(device)
    values, scale = to_fp8(x)
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    back, largest = values.double() * scale.double(), x.abs().max().double()
    if dtype == torch.float16 and magnitude == 1e-7:
        largest = torch.tensor(448 * 2.0**-15, dtype=torch.float64)  # fp16 has no larger factor
    # 4 bits, and below 2^-6 of 448 the spacing of the smallest normal numbers.
    bound = torch.maximum(x.double().abs() / 16, largest / 448 * 2.0**-8)
    assert ((back - x.double()).abs() <= bound).all()
    assert scale.log2() % 1 == 0


def test_nothing_and_zeros_and_not_a_number():
    values, scale = to_fp8(torch.zeros(3, 16))
    assert not values.float().any() and scale.isfinite()
    assert to_fp8(torch.empty(0, 16))[0].shape == (0, 16)
    hidden, weight, _, targets = case()
    with torch.no_grad():
        hidden[3, 4] = torch.nan
    assert linear_cross_entropy_loss(hidden, weight, targets, fp8=True).isnan()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_is_that_of_the_rounded_operands(dtype, bias, device):
    hidden, weight, b, targets = case(dtype=dtype, device=device, bias=bias)
    loss = linear_cross_entropy_loss(hidden, weight, targets, bias=b, fp8=True)
    x, w = (values.double() * scale for values, scale in map(to_fp8, (hidden, weight.to(dtype))))
    logits = x @ w.t() + (0 if b is None else b.double())
    expected = F.cross_entropy(logits, targets)
    # The logits are rounded to dtype, as those of any product are.
    unit = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-14}[dtype]
    assert abs(loss.double() - expected) <= 4 * unit


@pytest.mark.parametrize("device", DEVICES)
def test_what_it_costs_in_accuracy(device):
    """Losses within 0.01 nats on average, of 6.7; gradients of 0.998 of the direction, without a
    bias towards large or small ones."""
    hidden, weight, _, targets = case(1024, 128, 1024, device=device)
    exact, *gradients = results(linear_cross_entropy_loss, hidden.float(), weight, None, targets)
    rounded, *got = results(linear_cross_entropy_loss, hidden, weight, None, targets, fp8=True)
    assert abs(rounded - exact) < 0.01
    for gradient, expected in zip(got, gradients, strict=True):
        a, b = gradient.double().flatten(), expected.double().flatten()
        assert F.cosine_similarity(a, b, dim=0) > 0.998
        assert abs(a.norm() / b.norm() - 1) < 0.01


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"return_lse": True}, {}])
def test_every_way_back_reads_the_same_logits(options):
    """In float16, and where the log-sum-exp is asked for, backward computes the logits again."""
    hidden, weight, _, targets = case(dtype=torch.float16)
    with torch.no_grad():
        weight.copy_(weight.half())  # no cast rounds it
    found = {}
    for budget in (None, 400_000):  # one chunk, and several
        outputs = linear_cross_entropy_loss(
            hidden, weight, targets, fp8=True, memory_budget=budget, **options
        )
        loss = outputs[0] if isinstance(outputs, tuple) else outputs
        found[budget] = torch.autograd.grad(loss.sum() * 100, (hidden, weight))
        if options.get("reduction") == "none":
            continue
        wide = [hidden.detach().float().requires_grad_(), weight]
        mean = linear_cross_entropy_loss(*wide, targets, fp8=True)
        torch.testing.assert_close(loss, mean, rtol=1e-3, atol=0)
        expected = torch.autograd.grad(mean * 100, wide)
        for got, gradient in zip(found[budget], expected, strict=True):
            torch.testing.assert_close(got.float(), gradient, rtol=0.02, atol=2e-3)
    for one, several in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, several, rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_the_product_into_given_memory(device):
    hidden, weight, *_ = case(33, 32, 48, device=device)
    x, w = to_fp8(hidden), to_fp8(weight.bfloat16())
    memory = torch.full((40, 48), torch.nan, dtype=torch.bfloat16, device=device)
    fp8_product(x, w, out=memory[:33])
    expected = (x[0].double() * x[1]) @ (w[0].double() * w[1]).t()
    torch.testing.assert_close(memory[:33].double(), expected, rtol=2.0**-8, atol=1e-3)
    assert memory[33:].isnan().all()


def test_opcheck():
    hidden, weight, _, targets = case(4, 16, 32)
    torch.library.opcheck(
        torch.ops.fastlm.linear_cross_entropy_loss.default,
        (hidden, weight, None, targets, None, "mean", False, torch.bfloat16, [True, True, False],
         True, None, None, True, -100, 0.0, None, 0.0),
    )  # fmt: skip


@pytest.mark.parametrize(
    "D, V, impl, message",
    [
        (24, 512, "auto", "fp8: D=24 and V=512 must be multiples of 16"),
        (64, 500, "auto", "fp8: D=64 and V=500 must be multiples of 16"),
        (64, 512, "torch", "fp8: impl 'torch' has none"),
    ],
)
def test_what_it_does_not_take(D, V, impl, message):
    hidden, weight, _, targets = case(D=D, V=V)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy_loss(hidden, weight, targets, fp8=True, impl=impl)


def test_the_plan_counts_the_float8_weight():
    hidden, weight, _, targets = case()
    plain, fp8 = (linear_cross_entropy_plan(hidden, weight, fp8=on) for on in (False, True))
    assert fp8.weight_bytes - plain.weight_bytes == weight.numel() * (1 + 2)
    assert fp8.chunks == plain.chunks == 1
    # What fits without float8 alone is refused, by the loss as by the plan.
    least = linear_cross_entropy_plan(hidden[:1], weight).extra_bytes
    linear_cross_entropy_loss(hidden, weight, targets, memory_budget=least)
    with pytest.raises(ValueError, match="memory_budget"):
        linear_cross_entropy_plan(hidden, weight, fp8=True, memory_budget=least)
    with pytest.raises(ValueError, match="memory_budget"):
        linear_cross_entropy_loss(hidden, weight, targets, fp8=True, memory_budget=least)
