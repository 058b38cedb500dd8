"""Both losses in other people's programs: defaults, transforms, GradScaler, DTensors, counters.

N rows, D model width, V vocabulary.
"""

import contextlib
import os
import sys

import fastlm.kernels
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_bitwise_equal
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastlm import cross_entropy_loss, linear_cross_entropy_loss, linear_cross_entropy_plan
from fastlm.ops import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")

# test_triton_cross_entropy.py runs this file in the interpreter: both losses over Triton's kernels.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
only_cpp = pytest.mark.skipif(INTERPRETED, reason="the same without Triton's kernels")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    torch._dynamo.reset()
    if INTERPRETED:
        from fastlm.kernels import cross_entropy as module

        monkeypatch.setattr(linear_cross_entropy, "row_kernels", lambda device: module)


def of_logits(hidden, weight, targets, **options):
    loss = fastlm.kernels.cross_entropy_loss if INTERPRETED else cross_entropy_loss
    return loss(F.linear(hidden, weight), targets, **options)


def of_logits_in_place(hidden, weight, targets, **options):
    return of_logits(hidden, weight, targets, inplace=True, **options)


def by_torch(hidden, weight, targets, **options):
    impl = {"impl": "torch"}
    return cross_entropy_loss(F.linear(hidden, weight), targets, **impl, **options)


LOSSES = {
    "cross_entropy": of_logits,
    "in place": of_logits_in_place,
    "linear": linear_cross_entropy_loss,
}
both = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def make(N=12, D=8, V=70, dtype=torch.float32, *, ignored=True):
    generator = torch.Generator("cpu").manual_seed(0)
    kind = dict(generator=generator, dtype=torch.float32, device="cpu")
    hidden, weight = torch.randn(N, D, **kind).to(dtype), torch.randn(V, D, **kind).to(dtype)
    targets = torch.randint(V, (N,), generator=generator, device="cpu")
    if ignored:
        targets[1::3] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def outcome(loss, hidden, weight, targets, **options):
    value = loss(hidden, weight, targets, **options)
    value, lse = value if isinstance(value, tuple) else (value, value)
    return value, *torch.autograd.grad(value.sum() + lse.sum(), (hidden, weight))


OPTIONS = [
    {}, {"num_items": 7.5}, {"reduction": "none", "z_loss": 0.01, "softcap": 5.0},
    {"return_lse": True, "label_smoothing": 0.1},
]  # fmt: skip


@pytest.mark.parametrize(
    "default",
    [torch.bfloat16, "meta"]
    + [pytest.param(t, marks=pytest.mark.exhaustive) for t in (torch.float16, torch.float64)],
    ids=str,
)
@both
def test_defaults_for_dtype_and_device_change_nothing(loss, default):
    step = 3 if INTERPRETED else 1  # a sample: each takes a second there
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[::step]:
        for options in OPTIONS[::step]:
            for run in (loss, by_torch):
                tensors = make(dtype=dtype)
                expected = outcome(run, *tensors, **options)
                try:
                    if default == "meta":
                        torch.set_default_device("meta")
                    else:
                        torch.set_default_dtype(default)
                    got = outcome(run, *tensors, **options)
                finally:
                    torch.set_default_device(None)
                    torch.set_default_dtype(torch.float32)
                assert all(t.device.type == "cpu" for t in got)
                torch.testing.assert_close(got, expected, rtol=0, atol=0)


# --- float16 under a GradScaler ---


def scaled_errors(loss, compiled, num_items, chunked):
    """Relative errors of dW and dh against fp64, in the 2-norm and the largest, of `loss` and of
    PyTorch's path with fp32 logits, under a loss scale of 65536."""
    N, D, V = (256, 32, 2048) if not INTERPRETED else (64, 32, 512)
    hidden, weight, targets = make(N, D, V, torch.float16)
    with torch.no_grad():
        hidden.mul_(0.5), weight.mul_(0.2)
    options = {"num_items": torch.tensor(float(num_items))}
    budget = {}
    if chunked:  # a byte less than one chunk takes
        plan = linear_cross_entropy_plan(hidden, weight)
        budget = {"memory_budget": plan.extra_bytes - 1}
    run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss

    def gradients(function, tensors, **options):
        return torch.autograd.grad(function(*tensors, targets, **options) * 65536.0, tensors)

    def truth(h, w, y):
        return F.cross_entropy(h @ w.t(), y, reduction="sum") / num_items

    def torchs(h, w, y):
        return F.cross_entropy(F.linear(h, w).float(), y, reduction="sum") / num_items

    doubles = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = gradients(truth, doubles)
    errors = []
    for got in (gradients(run, (hidden, weight), **options, **budget),
                gradients(torchs, (hidden, weight))):  # fmt: skip
        assert all(g.dtype == torch.float16 for g in got)
        differences = [g.double() - e for g, e in zip(got, expected, strict=True)]
        errors.append(
            [d.norm() / e.norm() for d, e in zip(differences, expected, strict=True)]
            + [d.abs().max() / e.abs().max() for d, e in zip(differences, expected, strict=True)]
        )
    return torch.tensor(errors, dtype=torch.float64)


@pytest.mark.parametrize(
    "num_items, compiled",
    [
        (16_384, True),
        (524_288, False),
        pytest.param(16_384, False, marks=pytest.mark.exhaustive),
        pytest.param(524_288, True, marks=pytest.mark.exhaustive),
    ],
)
@both
def test_float16_gradients_survive_a_grad_scaler(loss, num_items, compiled):
    for chunked in (False, True) if loss is linear_cross_entropy_loss else (False,):
        ours, torchs = scaled_errors(loss, compiled, num_items, chunked)
        assert (ours <= 2 * torchs).all() and (torchs < 0.02).all(), (ours, torchs)


# --- Upstream factors ---


@only_cpp  # the interpreter truncates to bf16
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_upstream_gradients_are_applied_in_fp32(compiled):
    # 1.5035 is 1.5 in bf16.
    hidden, weight, targets = make(64, 32, 300, torch.bfloat16)
    logits = F.linear(hidden, weight).detach().requires_grad_()
    factor = torch.tensor(1.5035)
    for loss, leaves in ((cross_entropy_loss, (logits,)),
                         (linear_cross_entropy_loss, (hidden, weight))):  # fmt: skip
        if compiled and loss is cross_entropy_loss:
            continue  # it has no gradient yet when the factor comes
        run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
        one = torch.autograd.grad(run(*leaves, targets), leaves)
        expected = [(g.float() * factor).to(g.dtype) for g in one]
        value = run(*leaves, targets)
        for retain in (False,) if compiled else (True, False):
            got = torch.autograd.grad(value, leaves, factor, retain_graph=retain)
            for g, e in zip(got, expected, strict=True):
                assert_bitwise_equal(g, e)


# --- Forward mode, torch.func, batches of gradients ---


@both
def test_forward_mode_is_refused(loss):
    hidden, weight, targets = make()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(hidden.detach(), torch.ones_like(hidden))
        with pytest.raises(RuntimeError, match=r"reverse-mode derivative only.*impl='torch'"):
            loss(dual, weight, targets)
        assert forward_ad.unpack_dual(by_torch(dual, weight, targets)).tangent != 0
        assert loss(hidden, weight, targets).isfinite()  # without a tangent


@both
def test_transforms_of_torch_func_are_refused(loss):
    hidden, weight, targets = make(ignored=False)
    hidden, weight = hidden.detach(), weight.detach()

    def single(h, y):
        return loss(h[None], weight, y[None])

    for run in (
        lambda: torch.func.grad(loss)(hidden, weight, targets),
        lambda: torch.func.vmap(torch.func.grad(single))(hidden, targets),
        lambda: torch.func.vmap(single)(hidden, targets),
        lambda: torch.func.jvp(lambda h: loss(h, weight, targets), (hidden,), (hidden,)),
    ):
        with pytest.raises(RuntimeError, match=r"no batching rule: use impl='torch'"):
            run()
    got = torch.func.grad(by_torch)(hidden, weight, targets)
    assert got.isfinite().all()
    # One gradient a sample, as that message advises.
    single_by_torch = torch.func.grad(lambda h, y: by_torch(h[None], weight, y[None]))
    each = torch.func.vmap(single_by_torch)(hidden, targets)
    torch.testing.assert_close(each / len(hidden), got)


@both
def test_batches_of_gradients_are_refused(loss):
    hidden, weight, targets = make()
    for options in ({}, {"reduction": "none"}):
        value = loss(hidden, weight, targets, **options)
        upstream = torch.ones(3, *value.shape)
        with pytest.raises(RuntimeError, match="one upstream gradient at a time"):
            torch.autograd.grad(value, hidden, upstream, is_grads_batched=True)


# --- num_items ---


@both
def test_num_items_of_nothing(loss):
    hidden, weight, targets = make()
    targets[:] = -100
    for zero in (torch.tensor(0), torch.tensor([0.0])):
        for run in (loss, by_torch):
            value, *gradients = outcome(run, hidden, weight, targets, num_items=zero)
            assert value == 0 and all((g == 0).all() for g in gradients)


@both
def test_num_items_of_one_element(loss):
    tensors = make()
    expected = outcome(loss, *tensors, num_items=5)
    for items in (torch.tensor([5]), torch.tensor([[5.0]], dtype=torch.float64)):
        for run in (loss, by_torch):
            got = outcome(run, *tensors, num_items=items)
            assert got[0].shape == ()
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@both
def test_a_sure_row_has_no_loss_below_zero(loss):
    # lse - l_y of nearly equal numbers: rounding must not make it negative.
    generator = torch.Generator().manual_seed(0)
    rows = 30 if INTERPRETED else 200
    weight = torch.randn(1000, 16, generator=generator)
    targets = torch.arange(rows)
    hidden = (weight[:rows] * torch.linspace(1, 3, rows)[:, None]).requires_grad_()
    for options in ({}, {"reduction": "none"}, {"softcap": 30.0, "reduction": "none"}):
        assert (loss(hidden, weight, targets, **options) >= 0).all()
    assert loss(hidden * torch.nan, weight, targets).isnan()


# --- Counters and DTensors ---


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"inplace": True}], ids=str)
def test_a_dispatch_mode_sees_the_ops(options):
    """Eager calls leave out the dispatcher; where someone listens, they do not."""
    hidden, weight, targets = make()
    results = []
    for mode in (Seen(), contextlib.nullcontext()):
        with mode:
            loss = of_logits(hidden, weight, targets, **options)
            results.append([loss, *torch.autograd.grad(loss.sum(), (hidden, weight))])
        if isinstance(mode, Seen):
            names = [name.partition("::")[2] for name in mode.ops if not name.startswith("aten")]
            assert names[0] == "cross_entropy_loss" and len(names) == 2, names
    for got, expected in zip(*results, strict=True):
        assert_bitwise_equal(got, expected)


def test_results_may_be_changed_in_place():
    hidden, weight, targets = make()
    for reduction in ("mean", "none"):
        loss, lse = of_logits(hidden, weight, targets, reduction=reduction, return_lse=True)
        loss *= 2
        lse += 1
        (gradient,) = torch.autograd.grad(loss.sum() + 0 * lse.sum(), weight)
        once = of_logits(hidden, weight, targets, reduction=reduction)
        (expected,) = torch.autograd.grad(once.sum(), weight)
        torch.testing.assert_close(gradient, 2 * expected)


def test_options_of_numpy():
    hidden, weight, targets = make()
    options = {"label_smoothing": 0.125, "softcap": 4.0, "z_loss": 0.5, "ignore_index": 3}
    numpys = {n: np.float32(v) if v != 3 else np.int16(v) for n, v in options.items()}
    for reduction in ("mean", "none"):
        got, expected = (
            of_logits(hidden, weight, targets.clamp(min=0), reduction=reduction, **given)
            for given in (numpys, options)
        )
        assert_bitwise_equal(got, expected)


def test_flops_are_counted():
    hidden, weight, targets = make(16, 8, 32, ignored=False)
    product = 2 * 16 * 8 * 32
    for options, forward, backward in (({}, 3, 0), ({"reduction": "none"}, 1, 3)):
        with FlopCounterMode(display=False) as counter:
            loss = linear_cross_entropy_loss(hidden, weight, targets, **options)
        assert counter.get_total_flops() == forward * product
        with FlopCounterMode(display=False) as counter:
            loss.sum().backward()
        assert counter.get_total_flops() == backward * product
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy_loss(hidden, weight, targets)
    assert counter.get_total_flops() == product


@only_cpp
@pytest.mark.skipif(sys.platform != "linux", reason="needs gloo")
def test_a_head_that_fsdp2_shards_by_itself(tmp_path):
    from ranks import run_ranks

    for rank in run_ranks(2, [], tmp_path, call="wrap_programs:sharded_head"):
        assert (rank.returncode, rank.stdout) == (0, "right\n"), rank.output
