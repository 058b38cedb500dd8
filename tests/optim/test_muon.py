"""Muon: against the formula in fp64, with AdamW beside it, clipping, skipped steps, state."""

import copy
import io
import os
import pickle

import pytest
import torch
from tolerance import assert_bitwise_equal

from fastlm import AdamW
from fastlm.muon import QUINTICS, Muon, orthogonalized
from fastlm.ops.adamw import adamw_reference

pytestmark = pytest.mark.usefixtures("one_thread")

HYPER = dict(betas=(0.9, 0.95), eps=1e-8)
SHAPES = [(16, 16), (40, 16), (16, 40), (40, 16), (1, 5)]  # two of one shape; a single row
LR, WD, MOMENTUM = 0.02, 0.1, 0.95
# test_triton_adamw.py runs some of the tests on the Triton kernels.
IMPL = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "auto"


def parameters(dtype=torch.float32):
    """(matrices, others): what Muon and what AdamW updates."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.nn.Parameter(torch.randn(*shape, generator=generator).to(dtype))  # noqa: E731
    return [draw(*shape) for shape in SHAPES], [draw(7), draw(9, 3)]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def muon(matrices, others, impl=IMPL, **options):
    groups = [
        {"params": others, "lr": 0.01, "weight_decay": 0.05},
        {"params": matrices, "lr": LR, "weight_decay": WD, "momentum": MOMENTUM},
    ]
    return Muon(groups, **{**HYPER, "matmul_dtype": torch.float32, **options}, impl=impl)


def run(optimizer, params, steps):
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def test_a_rate_of_one_element():
    found = []
    for lr in (LR, torch.tensor(LR), torch.tensor([LR])):
        matrices, others = parameters()
        optimizer = muon(matrices, others)
        optimizer.param_groups[1]["lr"] = lr
        run(optimizer, matrices + others, range(2))
        found.append([p.detach() for p in matrices])
    for got in found[1:]:
        torch.testing.assert_close(got, found[0])


def muon_reference(weight, grad, buffer):
    """The formula line by line, for one fp64 matrix."""
    buffer.mul_(MOMENTUM).add_(grad, alpha=1 - MOMENTUM)
    x = (1 - MOMENTUM) * grad + MOMENTUM * buffer
    x = x / (1.01 * x.square().sum().sqrt())
    for a, b, c in QUINTICS:
        x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
    rows, columns = weight.shape
    weight.mul_(1 - LR * WD).sub_(LR * max(1, rows / columns) ** 0.5 * x)


def reference_run(steps, max_grad_norm=None):
    matrices, others = parameters(torch.float64)
    params = matrices + others
    buffers = [torch.zeros_like(p) for p in matrices]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in others]
    with torch.no_grad():
        for step in steps:
            set_gradients(params, step)
            grads = [p.grad for p in params]
            norm = sum(float(g.square().sum()) for g in grads) ** 0.5
            if max_grad_norm is not None:
                grads = [g * min(1.0, max_grad_norm / (norm + 1e-6)) for g in grads]
            for p, g, buffer in zip(matrices, grads, buffers, strict=False):
                muon_reference(p, g, buffer)
            for p, g, (m, v) in zip(others, grads[len(matrices) :], moments, strict=True):
                adamw_reference(p, g, m, v, step + 1, lr=0.01, weight_decay=0.05, **HYPER)
    return params


@pytest.mark.parametrize("max_grad_norm", [None, 3.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("impl", [IMPL, "torch"])  # torch: as on devices without kernels
def test_against_the_formula_in_fp64(dtype, max_grad_norm, impl):
    matrices, others = parameters(dtype)
    run(muon(matrices, others, impl, max_grad_norm=max_grad_norm), matrices + others, range(20))
    bound = 2e-5 if dtype == torch.float32 else 1e-11
    for p, expected in zip(matrices + others, reference_run(range(20), max_grad_norm), strict=True):
        torch.testing.assert_close(p.double(), expected, rtol=bound, atol=bound)


def test_what_comes_out_is_nearly_orthogonal():
    generator = torch.Generator().manual_seed(0)
    for shape in [(3, 32, 32), (2, 64, 24), (2, 24, 64)]:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        # From all of the range that the quintics are made for.
        s = torch.logspace(-1.5, 0, s.shape[1], dtype=torch.float64).expand_as(s)
        result = orthogonalized(u * s[:, None] @ vh, torch.float64)
        after = torch.linalg.svdvals(result)
        assert after.min() > 0.72 and after.max() < 1.28
        # The same singular vectors: u^T result v is diagonal.
        inside = u.mT @ result @ vh.mT
        assert (inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))).abs().max() < 1e-9
    zeros = torch.zeros(1, 4, 4)
    assert_bitwise_equal(orthogonalized(zeros, torch.float32), zeros)


@pytest.mark.parametrize("size", [1e-7, 1e-18, 1e-25, 1e-36, 1e-44, 0.0])
def test_momentum_that_decays_to_nothing_moves_nothing(size):
    x = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(0)) * size
    update = orthogonalized(x, torch.float32)
    assert update.isfinite().all() and (size > 1e-8 or update.abs().max() < 1e-6)


def test_products_in_bfloat16_stay_near():
    x = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0))
    near, exact = orthogonalized(x, torch.bfloat16), orthogonalized(x.double(), torch.float64)
    assert near.dtype == torch.bfloat16
    assert (near.double() - exact).norm() < 0.05 * exact.norm()


def test_it_is_torchs_muon_but_for_the_quintics():
    """Its momentum, its decay and its scale of a tall matrix."""
    ours, _ = parameters()
    theirs, _ = parameters()
    optimizer = Muon([{"params": ours, "momentum": MOMENTUM}], lr=LR, weight_decay=WD)
    torchs = torch.optim.Muon(theirs, lr=LR, weight_decay=WD, momentum=MOMENTUM)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        torchs.step()
    for p, other in zip(ours, theirs, strict=True):
        a, b = optimizer.state[p]["momentum_buffer"], torchs.state[other]["momentum_buffer"]
        torch.testing.assert_close(a, b)
        before = dict(zip(map(id, ours), parameters()[0], strict=True))[id(p)]
        moved, other_moved = p - before, other - before
        cosine = torch.nn.functional.cosine_similarity(moved.flatten(), other_moved.flatten(), 0)
        assert cosine > 0.97 and 0.6 < moved.norm() / other_moved.norm() < 1.8


def test_adamws_groups_are_adamws():
    matrices, others = parameters()
    run(muon(matrices, others), matrices + others, range(5))
    _, alone = parameters()
    plain = AdamW([{"params": alone, "lr": 0.01, "weight_decay": 0.05}], **HYPER)
    for step in range(5):
        set_gradients([*parameters()[0], *alone], step)
        plain.step()
    for p, expected in zip(others, alone, strict=True):
        assert_bitwise_equal(p, expected)


def test_batches_of_few_matrices_give_the_same(monkeypatch):
    results = []
    for limit in (1, 1000, 1 << 24):
        monkeypatch.setattr("fastlm.muon._ELEMENTS", limit)
        matrices, others = parameters()
        run(muon(matrices, others), matrices + others, range(3))
        results.append(matrices)
    for few in results[:-1]:
        for a, b in zip(few, results[-1], strict=True):
            torch.testing.assert_close(a, b)


def test_16_bit_weights_have_an_fp32_momentum():
    matrices, others = parameters(torch.bfloat16)
    optimizer = muon(matrices, others, max_grad_norm=1.0)
    run(optimizer, matrices + others, range(3))
    assert optimizer.state[matrices[0]]["momentum_buffer"].dtype == torch.float32
    assert matrices[0].dtype == torch.bfloat16 and matrices[0].isfinite().all()


# The norm, and steps that are skipped


def snapshot(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]


@pytest.mark.parametrize("where", [0, -1], ids=["a matrix", "a vector"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("impl", [IMPL, "torch"])
def test_a_bad_step_changes_nothing_and_is_named(value, where, impl):
    matrices, others = parameters()
    params = matrices + others
    optimizer = muon(matrices, others, impl, max_grad_norm=1.0)
    run(optimizer, params, range(2))
    before = snapshot(optimizer)
    set_gradients(params, 2)
    params[where].grad.view(-1)[1] = value
    optimizer.step()
    for a, b in zip(snapshot(optimizer), before, strict=True):
        assert_bitwise_equal(a, b)
    assert not optimizer.last_grad_norm.isfinite()
    expected = (1, 0) if where == 0 else (0, 1)
    assert optimizer.first_nonfinite()[:2] == expected
    assert optimizer.first_nonfinite(int(optimizer.last_bad_row))[:2] == expected
    run(optimizer, params, [3])
    assert optimizer.last_grad_norm.isfinite() and optimizer.first_nonfinite() is None


def test_found_inf_skips_and_grad_scale_divides():
    matrices, others = parameters()
    params = matrices + others
    optimizer = muon(matrices, others, max_grad_norm=3.0)
    run(optimizer, params, range(2))
    before = snapshot(optimizer)
    optimizer.found_inf = torch.ones(1)
    run(optimizer, params, [2])
    for a, b in zip(snapshot(optimizer), before, strict=True):
        assert_bitwise_equal(a, b)
    del optimizer.found_inf

    plain = copy.deepcopy(optimizer)
    set_gradients(params, 2)
    twins = [p for g in reversed(plain.param_groups) for p in g["params"]]
    for p, twin in zip(params, twins, strict=True):
        twin.grad = p.grad.clone()
        p.grad *= 64
    optimizer.grad_scale = torch.full((1,), 64.0)
    optimizer.step()
    plain.step()
    assert_bitwise_equal(optimizer.last_grad_norm, plain.last_grad_norm)
    for p, twin in zip(params, twins, strict=True):
        assert_bitwise_equal(p, twin)


def test_the_norm_is_over_all_groups():
    matrices, others = parameters()
    optimizer = muon(matrices, others, skip_nonfinite=True)
    run(optimizer, matrices + others, range(1))
    norm = sum(float(p.grad.double().square().sum()) for p in matrices + others) ** 0.5
    torch.testing.assert_close(float(optimizer.last_grad_norm), norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("missing", ["matrices", "others", "both"])
def test_parameters_without_a_gradient_stay(missing):
    matrices, others = parameters()
    optimizer = muon(matrices, others, max_grad_norm=1.0)
    set_gradients(matrices + others, 0)
    without = {"matrices": matrices, "others": others, "both": matrices + others}[missing]
    before = [p.detach().clone() for p in matrices + others]
    for p in without:
        p.grad = None
    optimizer.step()
    for p, old in zip(matrices + others, before, strict=True):
        assert torch.equal(p, old) == any(p is other for other in without)


# State


def test_state_goes_through_a_file_bit_for_bit():
    matrices, others = parameters()
    straight = muon(matrices, others, max_grad_norm=3.0)
    run(straight, matrices + others, range(4))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    again, rest = copy.deepcopy((matrices, others))
    resumed = muon(again, rest, max_grad_norm=3.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(straight, matrices + others, range(4, 8))
    run(resumed, again + rest, range(4, 8))
    for a, b in zip(snapshot(resumed), snapshot(straight), strict=True):
        assert_bitwise_equal(a, b)


def test_a_copy_and_a_pickle_step_on():
    matrices, others = parameters()
    optimizer = muon(matrices, others, max_grad_norm=3.0, matmul_dtype=torch.bfloat16)
    run(optimizer, matrices + others, range(2))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.matmul_dtype == torch.bfloat16
        params = [p for group in reversed(twin.param_groups) for p in group["params"]]
        run(twin, params, [2])
        assert twin.last_grad_norm.isfinite()


def test_state_of_another_optimizer_is_refused_and_nothing_changes():
    matrices, others = parameters()
    optimizer = muon(matrices, others)
    run(optimizer, matrices + others, range(1))
    before = snapshot(optimizer)
    adamw = AdamW([{"params": others}, {"params": matrices}])
    run(adamw, matrices + others, range(1))
    with pytest.raises(ValueError, match="group 1 of the state dict is AdamW's, and here Muon's"):
        optimizer.load_state_dict(adamw.state_dict())
    with pytest.raises(ValueError, match="'momentum_buffer', which AdamW does not"):
        adamw.load_state_dict(optimizer.state_dict())
    optimizer = muon(*parameters())
    run(optimizer, [p for g in optimizer.param_groups for p in g["params"]], range(1))
    before = snapshot(optimizer)
    for spoil, message in {
        lambda entry: entry.update(exp_avg=1): "momentum_buffer', not|has .'exp_avg'",
        lambda entry: entry.update(momentum_buffer=torch.ones(3)): r"shape \(3,\), not \(16, 16\)",
        lambda entry: entry.update(momentum_buffer=3): "no tensor of floats",
    }.items():
        state = copy.deepcopy(optimizer.state_dict())
        spoil(state["state"][2])
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        for a, b in zip(snapshot(optimizer), before, strict=True):
            assert_bitwise_equal(a, b)


def test_init_state_is_that_of_a_first_step():
    optimizer = muon(*parameters())
    optimizer.init_state()
    kinds = [set(optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]
    assert kinds == [{"step", "exp_avg", "exp_avg_sq"}] * 2 + [{"momentum_buffer"}] * 5


# Arguments


def test_what_cannot_be_orthogonalized_is_refused():
    vector = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 .* is no matrix: its shape is"):
        Muon([{"params": [vector], "momentum": 0.95}])
    matrix = torch.nn.Parameter(torch.ones(3, 3))
    for momentum in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"momentum=.* must be in \[0, 1\)"):
            Muon([{"params": [matrix], "momentum": momentum}])
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        Muon([matrix], matmul_dtype=torch.float16)
    with pytest.raises(ValueError, match="one device"):
        Muon([matrix, torch.nn.Parameter(torch.ones(2, device="meta"))])
