"""kernels/adamw.py on the CPU, in Triton's interpreter, against fp64: numbers of every kind.

test_triton_adamw.py runs this file, with TRITON_INTERPRET=1 and in a process of its own.
"""

import os

import pytest
import torch
from tolerance import assert_bitwise_equal

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fastlm.kernels import configs
from fastlm.kernels.adamw import step
from fastlm.kernels.clip_grad_norm import square_sums
from fastlm.kernels.tensor_table import StepOptions
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
from triton.runtime.interpreter import TensorHandle

# NumPy, which the interpreter computes with, warns of what is meant: inf - inf in a tail.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
CHUNK = configs.OPTIMIZER_CHUNK
# A step takes 50 ms here; with 1000 steps it holds, too.
TRAJECTORY = int(os.environ.get("FASTLM_TRAJECTORY", "120"))


@pytest.fixture(autouse=True)
def arithmetic(monkeypatch):
    exact_arithmetic(monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, 0.01])
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


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("beta2", [0.95, 0.9999])
@pytest.mark.parametrize("lr, eps", [(1e-6, 1e-8), (1.0, 1e-8), (1e-3, 1e-3), (3e-2, 1e-16)])
def test_hyperparameters(lr, eps, beta2, approximate, monkeypatch):
    """fp32 at half an ULP; also where quotients and roots are as good as a GPU's fast ones."""
    exact_arithmetic(monkeypatch, approximate=approximate)
    hyper = (lr, 0.9, beta2, eps, 0.1)
    for t, magnitudes, clip in ((0, "usual", None), (3, "wide", None), (10**6, "wide", 1e-3)):
        row = make_row("fp32 fp32", 6000, step=t, magnitudes=magnitudes, seed=t)
        before = snapshot([row])
        factor = 1.0
        if clip is not None:
            factor = min(1.0, clip / (row.g.double().square().sum().sqrt() + 1e-6))
        run([row], [hyper], max_grad_norm=clip)
        assert_step([row], before, factor, [hyper], limit=0.501)


def test_beta_of_zero_and_no_decay():
    for hyper in ((1e-2, 0.0, 0.0, 1e-8, 0.0), (1e-2, 0.0, 0.999, 1e-6, 0.0)):
        row = make_row("fp32 fp32", 3000, step=2)
        before = snapshot([row])
        run([row], [hyper])
        assert_step([row], before, 1.0, [hyper], limit=0.501)


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


@pytest.mark.parametrize("norm", [1e22, 3e38])
def test_huge_gradients_are_clipped(norm):
    row = make_row("fp32 fp32", 500, step=3)
    row.g *= norm / row.g.abs().max()
    before = snapshot([row])
    true = row.g.double().square().sum().sqrt()
    actual, _ = run([row], max_grad_norm=1.0, skip_nonfinite=False)
    assert actual == true.float()  # inf where fp32 ends
    assert_step([row], before, 1.0 / (true + 1e-6), limit=0.501)


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


@pytest.mark.parametrize("gradient, steps", [("fp32", 100), ("bf16", 20)])
def test_split_is_the_fp32_run(gradient, steps):
    """With clipping, from parameters of every size."""
    whole = make_row(f"fp32 {gradient}", 500, magnitudes="wide")
    split = whole.copy(split=True)
    assert_bitwise_equal(split.master(), whole.p)
    table = make_table([whole, split])
    generator = torch.Generator().manual_seed(0)
    for i in range(steps):
        whole.g.copy_(torch.randn(500, generator=generator) * 10.0 ** (i % 5 - 3))
        split.g.copy_(whole.g)
        hyper = [(1e-3 if i % 7 else 0.5, 0.9, 0.95, 1e-8, 0.1)]
        step(table, StepOptions(hyper, 1.0, True), square_sums(table))
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


@pytest.mark.parametrize("kind", ["bf16 bf16", "fp16 fp16"])
def test_16_bits_are_rounded_once(kind):
    # 1 + half an ULP + a little that fp32 does not hold: up, where rounding twice stays at 1.
    row = make_row(kind, 4)
    half = torch.finfo(row.p.dtype).eps / 2
    row.p.fill_(1), row.g.fill_(0), row.v.fill_(1)
    row.m.copy_(-half * torch.tensor([1 + 1e-7, 1 - 1e-7, 1.0, 1 + 1e-6]) * 2)
    old = snapshot([row])
    hyper = (0.5, 0.5, 0.5, 0.0, 0.0)
    row.step.fill_(2**20)
    old[0].step.fill_(2**20)
    row.v.fill_(2), old[0].v.fill_(2)  # p = 1 - 0.5 * (m / 2) / sqrt(1)
    row.m *= 2
    old[0].m *= 2
    truth = oracle(old[0], 1.0, *hyper)[0]
    run([row], [hyper])
    expected = torch.where(truth > 1 + half, 1 + 2 * half, torch.ones(4, dtype=F64))
    assert torch.equal(row.p.double(), expected), (row.p, truth - 1 - half)


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
        results.append([norm, sums.values, *(x for row in copies for x in row.tensors())])
    for a, b in zip(*results, strict=True):
        assert_bitwise_equal(a, b)


def test_trajectory():
    """No further from fp64 than torch's for-loop, with two beta2."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(400, generator=generator)
    zeros = torch.zeros(400)
    rows = [
        Row("fp32 fp32", start.clone(), zeros.clone(), zeros.clone(), zeros.clone(), group=group)
        for group in (0, 1)
    ]
    table = make_table(rows)
    options = StepOptions([(1e-3, 0.9, beta2, 1e-8, 0.1) for beta2 in (0.95, 0.9999)])
    torchs = {}
    for dtype in (F32, F64):
        params = [start.clone().to(dtype).requires_grad_() for _ in rows]
        groups = [
            {"params": [p], "betas": hyper[1:3]}
            for p, hyper in zip(params, options.hyper, strict=True)
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1, foreach=False)
        torchs[dtype] = (params, optimizer)
    for i in range(TRAJECTORY):
        g = torch.randn(400, generator=generator) * (1 + i % 50) * 0.01
        for row in rows:
            row.g.copy_(g)
        step(table, options, None)
        for dtype, (params, optimizer) in torchs.items():
            for p in params:
                p.grad = g.to(dtype)
            optimizer.step()
    for i, row in enumerate(rows):
        truth = torchs[F64][0][i].detach()
        ours, theirs = (row.p - truth).abs(), (torchs[F32][0][i].detach() - truth).abs()
        assert ours.max() <= 1.05 * theirs.max() and ours.norm() <= 1.05 * theirs.norm()
