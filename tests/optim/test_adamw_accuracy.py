"""How exact AdamW is: one step, long runs, both ends of fp32's range, bits of split parameters."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_bitwise_equal

from fastlm import AdamW
from fastlm.extension import extension
from fastlm.ops.adamw import adamw_reference

pytestmark = pytest.mark.usefixtures("one_thread")

ISAS = ["portable", "avx2", "avx512"]


@pytest.fixture(params=ISAS)
def isa(request):
    try:
        extension().force_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    extension().force_isa(None)


def spacing(magnitude, dtype):
    """One unit in the last place of `dtype` at each magnitude (fp64)."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(magnitude.clamp(min=info.tiny)))
    return info.eps * torch.exp2(exponent)


def wild_values(generator, n):
    """(p, m, v, g) in fp64 that are fp32 numbers: of all sizes, with zeros and subnormals."""

    def sized(low, high):
        size = torch.exp2(
            low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)
        )
        sign = torch.randint(2, (n,), generator=generator) * 2 - 1
        return size * sign

    p, g, m = sized(-30, 6), sized(-50, 30), sized(-50, 30)
    v = sized(-60, 60).abs()
    likely = torch.rand(n, generator=generator) < 0.5  # as a run would make them
    m = torch.where(likely, g * 0.3, m)
    v = torch.where(likely, g.square() * 0.5, v)
    for i, x in enumerate((p, g, m, v)):
        x[i::37] = 0.0
        x[i + 5 :: 41] *= 2.0**-100  # subnormal for most
    both = slice(7, None, 53)
    m[both], v[both] = 0.0, 0.0
    return [x.float().double() for x in (p, m, v, g)]


def one_step(p, m, v, g, t, dtype, grad_dtype, split=False, **options):
    """One step of AdamW from the given state. (p, m, v) as the optimizer knows them."""
    param = torch.nn.Parameter(p.to(torch.bfloat16 if split else dtype, copy=True))
    if grad_dtype != param.dtype:
        param.grad_dtype = None  # any
    optimizer = AdamW([param], **options, param_precision="split" if split else "native")
    optimizer.init_state()
    if split:
        optimizer.load_master_weights([p.float()])
    state = optimizer.state[param]
    state["exp_avg"].copy_(m)
    state["exp_avg_sq"].copy_(v)
    state["step"].fill_(t - 1)
    param.grad = g.to(grad_dtype)
    optimizer.step()
    (weights,) = optimizer.master_weights()
    assert state["step"].item() == t
    return weights, state["exp_avg"], state["exp_avg_sq"], optimizer


KINDS = [  # parameter, gradient
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    ("split", torch.bfloat16),
    ("split", torch.float32),
]


def assert_one_step(actual, before, g, t, dtype, **options):
    """(p, m, v) after a step from `before`, fp64: the formula's, each rounded about once."""
    p, m, v = (x.clone() for x in before)
    adamw_reference(p, g, m, v, t, **options)
    beta1, beta2 = options["betas"]
    decayed = before[0] * (1 - options["lr"] * options["weight_decay"])
    # Terms may cancel, and subnormal ones have fewer bits.
    terms = (beta1 * before[1]).abs() + ((1 - beta1) * g).abs() + torch.finfo(torch.float32).tiny
    change = (decayed - p).abs() * (terms / m.abs()).nan_to_num(0.0, posinf=0.0)
    moment = torch.float64 if dtype == torch.float64 else torch.float32
    new_mean, new_square = ((1 - beta1) * g).abs(), (1 - beta2) * g.square()
    # A ULP of the result (or of what cancels in it), and what the terms before are off by.
    eps = torch.finfo(moment).eps
    for name, got, true, size, slack in (
        ("p", actual[0], p, torch.maximum(before[0].abs(), p.abs()), 4 * change),
        ("m", actual[1], m, torch.maximum((beta1 * before[1]).abs(), m.abs()), 2 * new_mean),
        ("v", actual[2], v, v, 2 * new_square),
    ):
        kept = dtype if name == "p" else moment
        overflow = true.abs() > torch.finfo(kept).max
        assert got[overflow].isinf().all(), name
        error = (got.double() - true).abs()
        allowed = spacing(size, kept) + eps * slack
        if name == "p" and (options["eps"] < 1e-8 or kept == torch.float64):
            # The root of a subnormal second moment has its few bits; fp64's oracle is no better.
            allowed += (before[2] + g.square() < 1e-36) * change + 1e-14 * change
        worst = (error / allowed)[~overflow].max()
        assert worst <= 1.01, f"{name}: {worst} of what is allowed"


EXHAUSTIVE = pytest.mark.exhaustive


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("t", [1, pytest.param(1000, marks=EXHAUSTIVE), 10**6])
@pytest.mark.parametrize(
    "beta2, eps",
    [(0.95, 1e-8), pytest.param(0.9999, 1e-3, marks=EXHAUSTIVE), (0.999, 1e-15)],
)
def test_one_step(kind, t, beta2, eps, isa):
    dtype, grad_dtype = kind
    split = dtype == "split"
    dtype = torch.float32 if split else dtype
    options = dict(lr=1e-3, betas=(0.9, beta2), eps=eps, weight_decay=0.1)
    p, m, v, g = wild_values(torch.Generator().manual_seed(t), 6007)
    p, g = p.to(dtype).double(), g.to(grad_dtype).double()
    finite = p.isfinite() & g.isfinite()
    p, m, v, g = p[finite], m[finite], v[finite], g[finite]
    actual = one_step(p, m, v, g, t, dtype, grad_dtype, split, **options)[:3]
    assert_one_step(actual, (p, m, v), g, t, dtype, **options)


@pytest.mark.parametrize("max_grad_norm", [1e-6, 1e-20, 3.0])
def test_one_clipped_step(max_grad_norm, isa):
    options = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    p, m, v, g = wild_values(torch.Generator().manual_seed(0), 5000)
    actual = one_step(
        p, m, v, g, 5, torch.float32, torch.float32, max_grad_norm=max_grad_norm, **options
    )
    norm = float(g.square().sum().sqrt())
    assert math.isclose(actual[3].last_grad_norm.item(), norm, rel_tol=1e-7)
    g = g * min(1.0, max_grad_norm / (norm + 1e-6))
    assert_one_step(actual[:3], (p, m, v), g, 5, torch.float32, **options)


@pytest.mark.parametrize("scale", [1e-22, 1e-15, 1e15, 1e18, 3e19, 1e30, 3e38])
def test_both_ends_of_the_range(scale, isa):
    # Squares that underflow or overflow: element by element no worse than torch's for-loop.
    options = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4096, generator=generator)
    ours, torchs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    truth, m, v = start.double(), torch.zeros(4096).double(), torch.zeros(4096).double()
    optimizers = (
        AdamW([ours], **options),
        torch.optim.AdamW([torchs], **options, foreach=False, fused=False),
    )
    for t in range(1, 6):
        g = (torch.rand(4096, generator=generator) * 2 - 1) * scale
        for param, optimizer in zip((ours, torchs), optimizers, strict=True):
            param.grad = g
            optimizer.step()
        adamw_reference(truth, g.double(), m, v, t, **options)
        states = optimizers[0].state[ours], optimizers[1].state[torchs]
        for name, true, size in (
            ("p", truth, truth.abs() + 1e-2), ("exp_avg", m, m.abs() + 0.1 * scale),
            ("exp_avg_sq", v, v),
        ):  # fmt: skip
            results = (ours.detach(), torchs.detach())
            if name != "p":
                results = [state[name] for state in states]
            error, torchs_error = ((x.double() - true).abs().nan_to_num(torch.inf) for x in results)
            allowed = 1.05 * torchs_error + 2 * spacing(size.float().double(), torch.float32)
            held = results[1].isfinite() | results[0].isnan()  # where torch is infinite, no NaN
            assert (error <= allowed)[held].all(), (name, t)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_infinite_numbers_stay(weight_decay, isa):
    # -inf as a mask in a bias, and second moments that have overflowed: torch's stay, too.
    param = torch.nn.Parameter(torch.full((40,), -torch.inf))
    frozen = torch.nn.Parameter(torch.ones(40))
    optimizer = AdamW([param, frozen], lr=1e-3, weight_decay=weight_decay)
    for g in (0.0, 1e38, 1.0):
        param.grad, frozen.grad = torch.zeros(40), torch.full((40,), g)
        optimizer.step()
    assert (param == -torch.inf).all()
    assert optimizer.state[frozen]["exp_avg_sq"].isinf().all()
    torch.testing.assert_close(
        frozen.detach(), torch.full((40,), (1 - 1e-3 * weight_decay) ** 3), rtol=1e-6, atol=0
    )


def test_an_lr_of_0_changes_no_parameter(isa):
    # As warm-up starts. The decay's two halves must add up to 1 for every number.
    bits = torch.randint(0, 0x7F800000, (100_000,), generator=torch.Generator().manual_seed(0))
    bits[:1000] = torch.arange(1000)  # subnormal
    bits[1000:1400] = (torch.arange(400) * 0x8000).clamp(max=0x7F7FFFFF)
    values = bits.to(torch.int32).view(torch.float32)
    param = torch.nn.Parameter(values.clone())
    optimizer = AdamW([param], lr=0.0, weight_decay=0.1)
    for _ in range(2):
        param.grad = torch.randn(len(values))
        optimizer.step()
    assert_bitwise_equal(param.detach(), values)


@pytest.mark.parametrize("beta2", [0.95, 0.999, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_of_a_thousand_steps(dtype, beta2, isa):
    # Max and RMS over all steps and elements, against fp64: at most torch's for-loop's.
    hyper = dict(lr=1e-3, betas=(0.9, beta2), eps=1e-8, weight_decay=0.1)
    start = torch.randn(4096, generator=torch.Generator().manual_seed(0)).mul(0.1).to(dtype)
    ours, torchs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    truth, m, v = start.double(), torch.zeros(4096).double(), torch.zeros(4096).double()
    optimizers = (
        AdamW([ours], **hyper),
        torch.optim.AdamW([torchs], **hyper, foreach=False, fused=False),
    )
    generator = torch.Generator().manual_seed(1)
    errors = {name: ([], []) for name in "pmv"}  # of each step: (max, mean square)
    for t in range(1, 1001):
        # Gradients with a mean, so that weights travel, and of changing size.
        g = torch.randn(4096, generator=generator) * (1 + math.sin(t / 30)) + 0.1
        g = g.to(dtype)
        for param, optimizer in zip((ours, torchs), optimizers, strict=True):
            param.grad = g
            optimizer.step()
        adamw_reference(truth, g.double(), m, v, t, **hyper)
        states = optimizers[0].state[ours], optimizers[1].state[torchs]
        for i, (param, state) in enumerate(zip((ours, torchs), states, strict=True)):
            results = (param.detach(), state["exp_avg"], state["exp_avg_sq"])
            for name, result, true in zip("pmv", results, (truth, m, v), strict=True):
                error = (result.double() - true).abs() / (true if name == "v" else 1.0)
                errors[name][i].append((error.max().item(), error.square().mean().item()))
    for name, of_both in errors.items():
        (largest, mean_square), (torchs_largest, torchs_mean_square) = (
            (max(e[0] for e in of_one), sum(e[1] for e in of_one)) for of_one in of_both
        )
        assert largest <= 1.05 * torchs_largest, name
        assert mean_square <= 1.05**2 * torchs_mean_square, name


def test_bias_correction_is_fp64s():
    # fl32(1 - 0.9999) is off by 1.7e-4: what kernels with fp32 constants lose in the first step.
    param = torch.nn.Parameter(torch.zeros(8))
    optimizer = AdamW([param], lr=1.0, betas=(0.9, 0.9999), eps=0.0)
    param.grad = torch.linspace(0.1, 3.0, 8)
    optimizer.step()
    torch.testing.assert_close(param.detach(), -torch.ones(8), rtol=2e-7, atol=0)


# Split parameters: bf16, and int16 with the rest of the fp32 value


def test_split_has_the_bits_of_fp32_over_3000_steps():
    generator = torch.Generator().manual_seed(0)
    shapes = [(37, 11), (5,), (), (0,), (1000,)]
    whole = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    halves = [torch.nn.Parameter(p.detach().bfloat16()) for p in whole]
    options = dict(lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, max_grad_norm=20.0)
    exact = AdamW(whole, **options)
    split = AdamW(halves, **options, param_precision="split")
    split.load_master_weights([p.detach() for p in whole])
    for step in range(3000):
        for p, q in zip(whole, halves, strict=True):
            q.grad = torch.randn(p.shape, generator=generator).bfloat16()
            p.grad = q.grad.float()
        if step == 1000:
            whole[0].grad[0, 0] = halves[0].grad[0, 0] = torch.nan  # both skip it
        exact.step()
        split.step()
        if step % 250 == 0 or step == 2999:
            for p, master, q in zip(whole, split.master_weights(), halves, strict=True):
                assert_bitwise_equal(master, p.detach())
                # The bf16 parameter is the master, rounded: off by half a unit in its last place.
                error = (q.detach().double() - p.detach().double()).abs()
                assert (error <= 0.5 * spacing(p.detach().double().abs(), torch.bfloat16)).all()
    for p, q in zip(whole, halves, strict=True):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert_bitwise_equal(split.state[q][key], exact.state[p][key])
    assert (
        whole[0].detach().sub(halves[0].detach().float()).abs().max() > 0
    )  # and bf16 alone is not


def test_every_fp32_survives_the_split(isa):
    # Every exponent, both signs, all kinds of lower halves; through the kernel with lr = 0.
    patterns = torch.arange(1 << 16, dtype=torch.int32) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    bits = (patterns[:, None] | low).flatten()
    weights = bits.view(torch.float32)
    param = torch.nn.Parameter(weights.bfloat16())
    optimizer = AdamW([param], lr=0.0, param_precision="split")
    optimizer.load_master_weights([weights])
    for _ in range(2):
        (master,) = optimizer.master_weights()
        number = ~weights.isnan()
        assert_bitwise_equal(master[number], weights[number])
        assert master[~number].isnan().all() and param[~number].isnan().all()
        assert not param[number].isnan().any()
        param.grad = torch.zeros_like(param)
        optimizer.step()  # moments stay 0, lr is 0: what comes out is what went in


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_split_shows_a_nan(value, isa):
    param = torch.nn.Parameter(torch.ones(20, dtype=torch.bfloat16))
    optimizer = AdamW([param], param_precision="split")
    param.grad = torch.zeros_like(param)
    param.grad[3] = value
    optimizer.step()
    assert (~param.isfinite()).nonzero().flatten().tolist() == [3]
    assert (~optimizer.master_weights()[0].isfinite()).sum() == 1


# Any shape, layout and dtype

LAYOUTS = ("contiguous", "transposed", "columns", "rows", "reversed order")


def laid_out(values, layout):
    if layout == "transposed" and values.dim() >= 2:
        return values.mT.contiguous().mT
    if layout == "columns" and values.dim() >= 1:
        return torch.cat([values, values], dim=-1)[..., : values.shape[-1]]
    if layout == "rows" and values.dim() >= 1:
        return torch.stack([values, values], dim=1)[:, 0]
    if layout == "reversed order":
        order = list(reversed(range(values.dim())))
        return values.permute(order).contiguous().permute(order)
    return values.clone()


TENSORS = st.tuples(
    st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 17, 130]), max_size=3).filter(
        lambda shape: math.prod(shape) <= 20_000
    ),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
    st.booleans(),  # has a gradient
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    tensors=st.lists(TENSORS, min_size=1, max_size=6),
    groups=st.integers(1, 3),
    clip=st.sampled_from([None, 0.5, 1e9]),
    split=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_tensors(tensors, groups, clip, split, seed):
    generator = torch.Generator().manual_seed(seed)
    params, gradients = [], []
    for shape, dtype, layout, grad_layout, has_gradient in tensors:
        if split and dtype == torch.float16:
            dtype = torch.bfloat16
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        params.append(torch.nn.Parameter(laid_out(values, layout)))
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        gradients.append(laid_out(gradient, grad_layout) if has_gradient else None)
    hypers = [dict(lr=1e-2 * (k + 1), weight_decay=0.1 * k) for k in range(groups)]
    members = [{"params": params[k::groups], **hypers[k]} for k in range(groups)]
    common = dict(betas=(0.9, 0.95), eps=1e-6)
    optimizer = AdamW(
        [group for group in members if group["params"]],
        **common, max_grad_norm=clip, param_precision="split" if split else "native",
    )  # fmt: skip
    truth = [p.detach().double() for p in params]
    moments = [(torch.zeros_like(t), torch.zeros_like(t)) for t in truth]
    exact = [split or p.dtype in (torch.float32, torch.float64) for p in params]
    for t in (1, 2, 3):
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        before = [None if g is None else g.clone() for g in gradients]
        optimizer.step()
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients if g is not None))
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                assert torch.equal(gradient, before[i])  # clipped in the step alone
                hyper = {**common, **hypers[i % groups]}
                start = truth[i] if exact[i] else truth[i].to(params[i].dtype).double()
                adamw_reference(start, gradient.double() * factor, *moments[i], t, **hyper)
                truth[i] = start if exact[i] else start.to(params[i].dtype).double()
        if clip is not None:
            assert math.isclose(optimizer.last_grad_norm.item(), norm, rel_tol=1e-6)
    masters = itertools.chain.from_iterable(
        zip(group["params"], masters_of(optimizer, group), strict=True)
        for group in optimizer.param_groups
    )
    masters = {id(p): master for p, master in masters}
    for p, true, dense in zip(params, truth, exact, strict=True):
        tolerance = 1e-6 if dense else 2 * torch.finfo(p.dtype).eps
        torch.testing.assert_close(masters[id(p)].double(), true, rtol=tolerance, atol=tolerance)


def masters_of(optimizer, group):
    every = iter(optimizer.master_weights())
    found = [(g, [next(every) for _ in g["params"]]) for g in optimizer.param_groups]
    return next(weights for g, weights in found if g is group)
