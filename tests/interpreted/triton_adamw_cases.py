"""kernels/adamw.py against fp64 and torch's for-loop, on a GPU or in Triton's interpreter.

test_triton_adamw.py runs this file in a process of its own (tests/helpers/interpreter.py).
"""

from dataclasses import replace

import pytest
import torch
from fastlm.kernels import configs
from fastlm.kernels.adamw import step
from fastlm.kernels.clip_grad_norm import sum_squares
from fastlm.kernels.collect import StepOptions
from interpreter import DEVICE, INTERPRETED
from optimizer_rows import (
    HYPER,
    KINDS,
    Row,
    assert_step,
    assert_unchanged,
    exact_arithmetic,
    make_row,
    make_table,
    oracle,
    run,
    snapshot,
    ulp,
)
from tolerance import assert_bitwise_equal
from triton.runtime.interpreter import TensorHandle

# NumPy, which the interpreter computes with, warns of what is meant: NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
CHUNK = configs.OPTIMIZER_CHUNK


@pytest.fixture(autouse=True)
def arithmetic(monkeypatch):
    exact_arithmetic(monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [pytest.param(None, marks=pytest.mark.exhaustive), 0.01])
def test_one_step(kind, clip):
    for t, magnitudes in ((0, "usual"), (1, "usual"), (999_999, "usual"), (7, "wide"), (0, "wide")):
        rows = [make_row(kind, 1000, step=t, magnitudes=magnitudes, seed=t)]
        before = snapshot(rows)
        norm, _ = run(rows, max_grad_norm=clip)
        factor = 1.0
        if clip is not None:
            true = before[0].g.double().square().sum().sqrt()
            assert abs(norm.double() - true) <= ulp(true, norm.dtype)
            assert norm.dtype == (F64 if kind == "fp64 fp64" else F32) and norm.shape == ()
            factor = min(1.0, clip / (true + 1e-6))
        assert_step(rows, before, factor)


@pytest.mark.parametrize("beta2", [0.95, 0.9999])
@pytest.mark.parametrize("lr, eps", [(1e-6, 1e-8), (1.0, 1e-8), (1e-3, 1e-3), (3e-2, 1e-16)])
def test_hyperparameters(lr, eps, beta2):
    hyper = (lr, 0.9, beta2, eps, 0.1)
    for t, magnitudes, clip in ((0, "usual", None), (3, "wide", None), (10**6, "wide", 1e-3)):
        row = make_row("fp32 fp32", 6000, step=t, magnitudes=magnitudes, seed=t)
        before = snapshot([row])
        factor = 1.0
        if clip is not None:
            factor = min(1.0, clip / (row.g.double().square().sum().sqrt() + 1e-6))
        run([row], [hyper], max_grad_norm=clip)
        assert_step([row], before, factor, [hyper])


def test_beta_of_zero_and_no_decay():
    for hyper in ((1e-2, 0.0, 0.0, 1e-8, 0.0), (1e-2, 0.0, 0.999, 1e-6, 0.0)):
        row = make_row("fp32 fp32", 3000, step=2)
        before = snapshot([row])
        run([row], [hyper])
        assert_step([row], before, 1.0, [hyper])


@pytest.mark.parametrize("scale", [65536.0, 0.25])
def test_grad_scale_and_found_inf(scale):
    row = make_row("fp32 fp32", 700, step=4)
    before = snapshot([row])
    grad_scale, found_inf = torch.tensor([scale]), torch.tensor([0.0])
    norm, _ = run([row], max_grad_norm=0.5, grad_scale=grad_scale, found_inf=found_inf)
    true = row.g.double().square().sum().sqrt() / scale
    assert abs(norm.double() - true) <= ulp(true, F32)
    assert_step([row], before, min(1.0, 0.5 / (true + 1e-6)) / scale)
    before = snapshot([row])
    again, _ = run([row], max_grad_norm=0.5, grad_scale=grad_scale, found_inf=torch.ones(1))
    assert_bitwise_equal(again, norm)
    assert_unchanged([row], before)
    # Without clipping, and found_inf alone.
    run([row], grad_scale=grad_scale)
    assert_step([row], before, 1 / scale)
    before = snapshot([row])
    assert run([row], found_inf=torch.ones(1)) == (None, None)
    assert_unchanged([row], before)


def test_tiny_gradients_are_clipped():
    row = make_row("fp32 fp32", 100)  # the first step: moments that are 0 hide nothing
    row.g *= 1e-8
    before = snapshot([row])
    norm, _ = run([row], max_grad_norm=1e-9)
    assert 1e-8 < norm < 1e-6
    assert_step([row], before, 1e-9 / (before[0].g.double().square().sum().sqrt() + 1e-6))


@pytest.mark.parametrize("largest", [1e22, 1e37, 3e38])
def test_huge_gradients_are_clipped(largest):
    row = make_row("fp32 fp32", 500, step=3)
    row.g *= largest / row.g.abs().max()
    before = snapshot([row])
    true = row.g.double().square().sum().sqrt()
    actual, _ = run([row], max_grad_norm=1.0, skip_nonfinite=False)
    assert actual == true.float()  # inf where fp32 ends
    if largest < 1e38:
        assert_step([row], before, 1.0 / (true + 1e-6))
    else:  # the factor is subnormal: fewer bits
        p, m, v, _ = oracle(before[0], 1.0 / (true + 1e-6), *HYPER)
        for actual, truth in ((row.p, p), (row.m, m), (row.v, v)):
            torch.testing.assert_close(actual.double(), truth, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("t", [0, 5])
def test_skip_leaves_every_bit(bad, t):
    rows = [make_row(kind, 70 + i, step=t, seed=i) for i, kind in enumerate(KINDS)]
    for i in (9, 4):
        rows[i].g[3] = bad
    before = snapshot(rows)
    norm, sums = run(rows, max_grad_norm=1.0, skip_nonfinite=True)
    assert norm.isnan() if bad != bad else norm == torch.inf
    assert sums.bad == 4 and sums.bad.shape == () and sums.bad.dtype == torch.int64
    assert_unchanged(rows, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_without_skip_nan_stays_in_its_element(bad, kind):
    row = make_row(kind, 50, step=3)
    row.g[7] = bad
    before = snapshot([row])
    norm, sums = run([row], max_grad_norm=1.0)
    assert not norm.isfinite() and sums.bad == 0
    assert row.value()[7].isnan() and not row.m[7].isfinite() and not row.v[7].isfinite()
    if row.remainder is not None:
        assert row.p.view(torch.int16)[7] == 0x7FC0 and row.remainder[7] == 0
    for x in (row, before[0]):  # nothing of the others: the clip factor is 1
        for tensor in (x.p, x.g, x.m, x.v):
            tensor[7] = 1
        if x.remainder is not None:
            x.remainder[7] = 0
    alone = before[0].copy()
    run([alone])
    for name in ("p", "m", "v", "remainder"):
        if getattr(row, name) is not None:
            same = [x for x in range(50) if x != 7]
            assert_bitwise_equal(getattr(row, name)[same], getattr(alone, name)[same], name)


def test_special_states():
    row = make_row("fp32 fp32", 8, step=9)
    row.v[0], row.m[1], row.p[2] = torch.inf, torch.inf, torch.inf
    row.p[3] = row.m[3] = row.v[3] = row.g[3] = 0
    before = snapshot([row])
    run([row])
    lr, *_, weight_decay = HYPER
    assert row.p[0] == (before[0].p[0].double() * (1 - lr * weight_decay)).float()
    assert row.v[0] == torch.inf and row.m[0].isfinite()
    assert row.p[1] == -torch.inf and row.m[1] == torch.inf and row.p[2] == torch.inf
    assert row.p[3] == row.m[3] == row.v[3] == 0
    assert row.p[4:].isfinite().all()


@pytest.mark.parametrize(
    "gradient, steps", [("fp32", 30), pytest.param("bf16", 200, marks=pytest.mark.exhaustive)]
)
def test_split_is_the_fp32_run(gradient, steps):
    """With clipping, from parameters of every size."""
    whole = make_row(f"fp32 {gradient}", 500, magnitudes="wide")
    split = whole.copy(split=True)
    assert_bitwise_equal(split.master(), whole.p)
    table = make_table([whole, split])
    generator = torch.Generator().manual_seed(0)
    for i in range(steps):
        g = torch.randn(500, generator=generator, device="cpu")
        whole.g.copy_(g * 10.0 ** (i % 5 - 3))
        split.g.copy_(whole.g)
        hyper = [(1e-3 if i % 7 else 0.5, 0.9, 0.95, 1e-8, 0.1)]
        step(table, StepOptions(hyper, 1.0, True), sum_squares(table).sum)
    assert (whole.p != 0).all() and whole.p.isfinite().all()
    for name in ("m", "v"):
        assert_bitwise_equal(getattr(split, name), getattr(whole, name), name)
    assert_bitwise_equal(split.master(), whole.p)


def bits_of(x):
    return x.view(torch.int32)


def test_split_halves():
    """The high half is the master rounded to bf16; the ends of the range come back, too."""
    bits = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x3F808000, 0x3F818000, 0x7F7FFFFF]
    bits += [b - 2**31 for b in bits] + [0x7F800000, 0x7F7F8000, 0x7F7F7FFF]
    master = torch.tensor(bits, dtype=torch.int32).view(F32)
    whole = Row("fp32 fp32", master.clone(), *(torch.zeros(len(bits)) for _ in range(3)))
    split = whole.copy(split=True)
    run([whole, split], [(0.0, 0.9, 0.95, 1e-8, 0.0)])
    assert torch.equal(whole.p, master)  # but for the sign of zero
    assert_bitwise_equal(split.master(), whole.p)
    ties = (bits_of(master) & 0xFFFF) == 0x8000
    assert torch.equal(split.p[~ties], master.to(BF16)[~ties])
    assert torch.equal(split.p[ties].float(), bits_of(master)[ties].add(0x8000).view(F32))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("magnitudes", ["usual", "wide"])
def test_16_bits_are_the_fp32_step_rounded_once(dtype, magnitudes):
    row = make_row(f"{dtype} fp32", 2000, step=3, magnitudes=magnitudes)
    full = replace(row.copy(), kind="fp32 fp32", p=row.p.float())
    run([row, full], max_grad_norm=1.0)
    assert_bitwise_equal(row.p, full.p.to(row.p.dtype))
    assert_bitwise_equal(row.m, full.m)
    assert_bitwise_equal(row.v, full.v)


@pytest.mark.parametrize(
    "n", [1, 2, 17, 511, 512, 513, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 77]
)
def test_lengths(n):
    rows = [make_row(kind, n, step=1) for kind in ("fp32 fp32", "split bf16", "fp64 fp64")]
    before = snapshot(rows)
    norm, _ = run(rows, max_grad_norm=1.0)
    true = sum(row.g.double().square().sum() for row in before).sqrt()
    assert abs(norm.double() - true) <= 1e-12 * true
    assert_step(rows, before, min(1.0, 1.0 / (true + 1e-6)))


@pytest.mark.parametrize("kind", ["fp32 fp32", "split bf16", "fp16 fp32", "fp64 fp64"])
def test_pointers_anywhere(kind, monkeypatch):
    def promised(self, key, value):
        assert key != "tt.divisibility" or (self.data % value == 0).all()

    if INTERPRETED:  # a GPU's access traps by itself
        monkeypatch.setattr(TensorHandle, "set_attr", promised)
    n = CHUNK + 100
    aligned = make_row(kind, n, step=2)
    run([expected := aligned.copy()], normed=True)
    for which in ("p", "g", "m", "v", "remainder", "all"):
        row, guards = aligned.copy(), []
        for name in ("p", "g", "m", "v", "remainder"):
            x = getattr(row, name)
            if x is not None and which in (name, "all"):
                wide = torch.full((n + 9,), 77, dtype=x.dtype)
                wide[5 : n + 5] = x
                setattr(row, name, wide[5 : n + 5])
                guards += [wide[:5], wide[n + 5 :]]
        run([row], normed=True)
        for name in ("p", "m", "v", "remainder"):
            if getattr(row, name) is not None:
                assert_bitwise_equal(getattr(row, name), getattr(expected, name), f"{which} {name}")
        assert all((guard == 77).all() for guard in guards)


def test_many_rows_of_all_kinds():
    """Groups and step counters of their own, empty rows, more rows than a program prepares."""
    hyper = [
        (1e-3, 0.9, 0.95, 1e-8, 0.1),
        (torch.tensor(3e-2), 0.8, 0.999, 1e-6, 0.0),
        (torch.tensor([1e-4], dtype=F64), 0.5, 0.9999, 1e-3, 0.3),
    ]
    kinds = list(KINDS)
    rows = [
        make_row(kinds[i % 13], [5, 0, 33, 1, 12][i % 5], step=i % 11, seed=i, group=i % 3)
        for i in range(270)
    ]
    before = snapshot(rows)
    norm, sums = run(rows, hyper, max_grad_norm=0.7, skip_nonfinite=True)
    true = sum(row.g.double().square().sum() for row in before).sqrt()
    assert norm.dtype == F64 and abs(norm - true) <= 1e-14 * true and sums.bad == -1
    assert_step(rows, before, 0.7 / (true + 1e-6), hyper)
    # And of a row the same bits as alone, given the same norm.
    row = before[0].copy()
    run([row], hyper)
    again = before[0].copy()
    run([again, *before[1:20]], hyper)
    assert_bitwise_equal(row.p, again.p)


def test_same_bits_every_time():
    rows = [make_row(kind, 30, step=1) for kind in KINDS] + [make_row("fp32 bf16", CHUNK + 40)]
    results = []
    for _ in range(2):
        copies = [row.copy() for row in rows]
        norm, sums = run(copies, max_grad_norm=1.0)
        results.append([norm, sums.sum, *(x for row in copies for x in row.tensors())])
    for a, b in zip(*results, strict=True):
        assert_bitwise_equal(a, b)


def trajectory(starts, steps, clip):
    """Errors of (p, m, v) against fp64 after `steps`, ours and torch's for-loop's, of each start:
    (parameters, beta2, weight_decay). The gradients' norm is above `clip`, so that it acts."""
    generator = torch.Generator().manual_seed(0)
    n = len(starts[0][0])
    zeros = torch.zeros(n)
    rows = [
        Row("fp32 fp32", start.clone(), *(zeros.clone() for _ in range(3)), group=i)
        for i, (start, _, _) in enumerate(starts)
    ]
    table = make_table(rows)
    hyper = [(1e-3, 0.9, beta2, 1e-8, decay) for _, beta2, decay in starts]
    options = StepOptions(hyper, max_grad_norm=clip)
    torchs = {}
    for dtype in (F32, F64):
        params = [start.to(dtype, copy=True).requires_grad_() for start, _, _ in starts]
        groups = [
            {"params": [p], "betas": (0.9, beta2), "weight_decay": decay}
            for p, (_, beta2, decay) in zip(params, starts, strict=True)
        ]
        torchs[dtype] = params, torch.optim.AdamW(groups, lr=1e-3, foreach=False)
    for i in range(steps):
        g = torch.randn(n, generator=generator, device="cpu").to(DEVICE) * (1 + i % 50) * 0.01
        for row in rows:
            row.g.copy_(g)
        step(table, options, None if clip is None else sum_squares(table).sum)
        factor = 1.0
        if clip is not None:
            factor = clip / ((len(rows) * g.double().square().sum()).sqrt() + 1e-6)
            assert factor < 1
        for dtype, (params, optimizer) in torchs.items():
            for p in params:
                p.grad = g.to(dtype) * factor.to(dtype) if clip else g.to(dtype)
            optimizer.step()
    errors = []
    for i, row in enumerate(rows):
        values = {}
        for dtype, (params, optimizer) in torchs.items():
            entry = optimizer.state[params[i]]
            values[dtype] = params[i].detach(), entry["exp_avg"], entry["exp_avg_sq"]
        for name, ours, theirs, truth in zip(
            "pmv", (row.p, row.m, row.v), values[F32], values[F64], strict=True
        ):
            errors.append((i, name, ours.double() - truth, theirs.double() - truth, truth))
    return errors


def assert_no_worse(errors):
    """RMS error at most 1.05 of torch's, the largest one at most 1.05 and 1 ULP."""
    for i, name, ours, theirs, truth in errors:
        what = f"{name} of {i}: {ours.norm() / theirs.norm():.3f}, {ours.abs().max():.3g}"
        assert ours.norm() <= 1.05 * theirs.norm(), what
        one = ulp(truth.abs().max(), F32)
        assert ours.abs().max() <= 1.05 * theirs.abs().max() + one, what


def starts(n):
    """Where a rounded beta2, a rounded decay, and nothing but the step's roundings count."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(n, generator=generator, device="cpu").to(DEVICE)
    return [
        (normal, 0.9999, 0.1), (torch.zeros(n), 0.95, 0.0), (0.02 * normal, 0.999, 0.1),
        (torch.ones(n), 0.9999, 0.0),
    ]  # fmt: skip


def test_trajectory():
    assert_no_worse(trajectory(starts(400)[:2], 80, 0.05))


@pytest.mark.exhaustive
@pytest.mark.parametrize("clip", [None, 0.05])
def test_trajectory_of_1000_steps(clip):
    assert_no_worse(trajectory(starts(2000), 1000, clip))
