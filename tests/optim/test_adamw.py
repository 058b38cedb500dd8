"""AdamW against adamw_reference in fp64 and against torch.optim.AdamW."""

import warnings

import pytest
import torch
from adamw_runs import (
    HYPER,
    AdamW,
    assert_close,
    parameters,
    reference_run,
    run,
    set_gradients,
    snapshot,
)
from tolerance import DEVICES, assert_as_accurate, assert_bitwise_equal

from fastlm import clip_gradients
from fastlm.ops.adamw import adamw_reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("device", DEVICES)
def test_against_reference_in_fp64(device):
    params = parameters(torch.float64, device)
    optimizer = AdamW(params, **HYPER)
    run(optimizer, params, range(100))
    expected, moments = reference_run(range(100), dtype=torch.float64)
    assert_close([p.cpu() for p in params], expected)
    for p, (exp_avg, exp_avg_sq) in zip(params, moments, strict=True):
        state = optimizer.state[p]
        assert state["step"].item() == 100
        torch.testing.assert_close(state["exp_avg"].cpu(), exp_avg, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(state["exp_avg_sq"].cpu(), exp_avg_sq, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy(dtype, device):
    # As accurate as torch's for-loop, whose moments have the dtype of the parameters.
    params = parameters(dtype, device)
    run(AdamW(params, **HYPER), params, range(50))
    single = parameters(dtype, device)
    run(torch.optim.AdamW(single, **HYPER, foreach=False, fused=False), single, range(50))
    expected, _ = reference_run(range(50), dtype=dtype)
    for i, (p, single_p, true_p) in enumerate(zip(params, single, expected, strict=True)):
        assert_as_accurate(
            p.detach(), single_p.detach(), true_p.to(device), magnitude=true_p.to(device).abs() + 1,
            what=f"parameter {i}",
        )  # fmt: skip


def test_cs336():
    # CS336's own test: 1000 steps of a linear model, compared with torch's at atol 1e-4.
    def optimised(optimizer_class):
        torch.manual_seed(42)
        model = torch.nn.Linear(3, 2, bias=False)
        optimizer = optimizer_class(
            model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8
        )
        for _ in range(1000):
            optimizer.zero_grad()
            x = torch.rand(model.in_features)
            y = torch.tensor([x[0] + x[1], -x[2]])
            ((y - model(x)) ** 2).sum().backward()
            optimizer.step()
        return model.weight.detach()

    torch.testing.assert_close(optimised(AdamW), optimised(torch.optim.AdamW), atol=1e-4, rtol=0)


def test_defaults_are_those_of_the_seeds():
    (group,) = AdamW(parameters()).param_groups
    assert group["lr"] == 1e-3 and group["betas"] == (0.9, 0.95)
    assert group["eps"] == 1e-8 and group["weight_decay"] == 0.0
    (group,) = AdamW(parameters(), 2e-3, (0.8, 0.9), 1e-7, 0.3).param_groups  # by position
    assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.8, 0.9), 1e-7)
    assert group["weight_decay"] == 0.3


def test_parameters_without_a_gradient():
    params = parameters()
    optimizer = AdamW(params, **HYPER, max_grad_norm=1.0)
    before = [p.detach().clone() for p in params]
    optimizer.step()  # none at all
    assert optimizer.last_grad_norm == 0
    set_gradients(params, 0)
    params[3].grad = None
    optimizer.step()
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(p, old) == (i == 3 or p.numel() == 0)
    assert params[3] not in optimizer.state


# The rest of an optimizer's interface


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_closure(options):
    param = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamW([param], lr=0.1, **options)

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()  # needs gradients enabled, inside step's no_grad
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == 9.0 and param.item() < 3.0
    assert optimizer.step() is None


def test_lr_as_a_tensor():
    params, expected = parameters(), parameters()
    rate = torch.tensor(3e-3)
    optimizer = AdamW(params, **{**HYPER, "lr": rate})
    plain = AdamW(expected, **HYPER)
    run(optimizer, params, range(10))
    run(plain, expected, range(10))
    rate.fill_(1e-4)  # a schedule writes into it
    plain.param_groups[0]["lr"] = 1e-4
    run(optimizer, params, range(10, 20))
    run(plain, expected, range(10, 20))
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_parameter_groups():
    params = parameters()
    groups = [
        {"params": params[:3], "lr": 1e-2, "weight_decay": 0.5},
        {"params": []},
        {"params": params[3:4], "betas": (0.5, 0.6), "eps": 1e-1},
    ]
    optimizer = AdamW(groups, max_grad_norm=1e9)
    run(optimizer, params[:4], range(5))
    optimizer.add_param_group({"params": params[4:], "lr": 5e-3})
    run(optimizer, params, range(5, 10))

    expected = parameters()
    apart = [
        torch.optim.AdamW(expected[:3], lr=1e-2, weight_decay=0.5, betas=(0.9, 0.95), fused=True),
        torch.optim.AdamW(
            expected[3:4], lr=1e-3, weight_decay=0, betas=(0.5, 0.6), eps=0.1, fused=True
        ),
    ]
    for step in range(10):
        if step == 5:
            apart.append(
                torch.optim.AdamW(
                    expected[4:], lr=5e-3, weight_decay=0, betas=(0.9, 0.95), fused=True
                )
            )
        set_gradients(expected if step >= 5 else expected[:4], step)
        for plain in apart:
            plain.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# name: a parameter's memory layout. The last two have gaps between their elements.
LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "channels last": lambda x: x[..., None, None].to(memory_format=torch.channels_last),
    "columns": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "rows": lambda x: torch.cat([x, x], dim=1).view(-1, x.shape[1])[::2],
}


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout, options):
    # torch's fused CPU kernel reads raw memory: without a word it pairs the wrong elements where a
    # gradient has other strides than its parameter, and writes into the gaps of a view.
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    laid_out = LAYOUTS[layout](values)
    param = torch.nn.Parameter(laid_out)
    expected = torch.nn.Parameter(values.reshape(param.shape).contiguous())
    whole = laid_out._base if layout in ("columns", "rows") else laid_out
    before = whole.clone()
    optimizer = AdamW([param], **HYPER, **options)
    plain = torch.optim.AdamW([expected], **HYPER, foreach=False)
    for step in range(6):
        set_gradients([param], step)  # contiguous
        if step % 2:
            param.grad = torch.empty_like(param).copy_(param.grad)  # as autograd makes it
        set_gradients([expected], step)
        if options:
            clip_gradients(expected, 1.0)
        optimizer.step()
        plain.step()
    torch.testing.assert_close(param.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    # What lies in the gaps is somebody else's.
    if layout in ("columns", "rows"):
        assert_bitwise_equal(whole[:, 4:], before[:, 4:])


def test_threads_do_not_change_the_result():
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            params = parameters(shapes=[(300_000,), (5, 7)])
            optimizer = AdamW(params, **HYPER, max_grad_norm=1.0)
            run(optimizer, params, range(2))
            results.append([*snapshot(optimizer, params), optimizer.last_grad_norm])
    finally:
        torch.set_num_threads(1)
    for result in results[1:]:
        for tensor, expected in zip(result, results[0], strict=True):
            assert_bitwise_equal(tensor, expected)


def test_a_group_that_cannot_be_added_is_not():
    params = parameters()
    optimizer = AdamW(params[:3], max_grad_norm=1.0)
    with pytest.raises(ValueError, match="one device"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, device="meta"))]})
    assert len(optimizer.param_groups) == 1
    run(optimizer, params[:3], range(2))


def test_hooks_run_once():
    # torch wraps torch.optim.AdamW.step with the hooks once somebody has made one: the inner step.
    (param,) = parameters(shapes=[(3,)])
    torch.optim.AdamW([param])
    for options in ({}, {"max_grad_norm": 1.0}, {"max_grad_norm": 1.0, "skip_nonfinite": False}):
        optimizer = AdamW([param], **options)
        calls = []
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("post"))
        set_gradients([param], 0)
        optimizer.step()
        assert calls == ["pre", "post"]


def test_schedulers_see_the_step():
    params = parameters()
    optimizer = AdamW(params, lr=1.0, max_grad_norm=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a scheduler that goes before the optimizer
        for _ in range(3):
            set_gradients(params, 0)
            optimizer.step()
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize(
    "hyper, message",
    [
        ({"lr": -1.0}, "learning rate: -1.0"),
        ({"lr": float("nan")}, "learning rate: nan"),
        ({"betas": (1.0, 0.9)}, "beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -0.1)}, "beta parameter at index 1: -0.1"),
        ({"eps": -1e-8}, "epsilon value: -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay value: -0.1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan"),
        ({"impl": "cuda"}, "impl='cuda'"),
    ],
    ids=str,
)
def test_bad_hyperparameters(hyper, message):
    with pytest.raises(ValueError, match=message):
        AdamW(parameters(), **hyper)


def test_bad_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW([])
    with pytest.raises(TypeError, match="optimizer can only optimize Tensors"):
        AdamW([3])
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        AdamW([{"params": [param]}, {"params": [param]}])


def test_one_norm_is_of_one_device():
    meta = torch.nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="one device"):
        AdamW([meta, *parameters()], max_grad_norm=1.0)


# Wrong updates, which assert_close must tell from the right one


def decay_after_the_update(param, grad, exp_avg, exp_avg_sq, step, **hyper):
    adamw_reference(param, grad, exp_avg, exp_avg_sq, step, **{**hyper, "weight_decay": 0.0})
    param.mul_(1 - hyper["lr"] * hyper["weight_decay"])


def decay_in_the_gradient(param, grad, exp_avg, exp_avg_sq, step, **hyper):
    grad = grad + hyper["weight_decay"] * param
    adamw_reference(param, grad, exp_avg, exp_avg_sq, step, **{**hyper, "weight_decay": 0.0})


def decay_without_the_learning_rate(param, grad, exp_avg, exp_avg_sq, step, **hyper):
    decay = hyper["weight_decay"] / hyper["lr"]
    adamw_reference(param, grad, exp_avg, exp_avg_sq, step, **{**hyper, "weight_decay": decay})


def no_bias_correction(param, grad, exp_avg, exp_avg_sq, step, **hyper):
    adamw_reference(param, grad, exp_avg, exp_avg_sq, 10**9, **hyper)


def steps_counted_from_0(param, grad, exp_avg, exp_avg_sq, step, **hyper):
    adamw_reference(param, grad, exp_avg, exp_avg_sq, max(step - 1, 1), **hyper)


def update_with(denominator):
    def update(param, grad, exp_avg, exp_avg_sq, step, *, lr, betas, eps, weight_decay):
        beta1, beta2 = betas
        param.mul_(1 - lr * weight_decay)
        exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).add_(grad.square(), alpha=1 - beta2)
        param.sub_(lr * exp_avg / (1 - beta1**step) / denominator(exp_avg_sq, 1 - beta2**step, eps))

    return update


eps_under_the_root = update_with(lambda v, correction, eps: (v / correction + eps).sqrt())
eps_before_the_correction = update_with(
    lambda v, correction, eps: (v.sqrt() + eps) / correction**0.5
)
eps_left_out = update_with(lambda v, correction, eps: (v / correction).sqrt())
MUTATIONS = {
    "decay after the update": decay_after_the_update,
    "decay in the gradient": decay_in_the_gradient,
    "decay without the learning rate": decay_without_the_learning_rate,
    "no bias correction": no_bias_correction,
    "steps counted from 0": steps_counted_from_0,
    "eps under the root": eps_under_the_root,
    "eps before the correction": eps_before_the_correction,
    "eps left out": eps_left_out,
}


@pytest.fixture(scope="module")
def right_params():
    params = parameters(torch.float64)
    return run(AdamW(params, **HYPER), params, range(10))


def test_the_formula_of_the_mutations_is_the_references(right_params):
    right = update_with(lambda v, correction, eps: (v / correction).sqrt() + eps)
    assert_close(right_params, reference_run(range(10), right, dtype=torch.float64)[0])


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_a_wrong_update_is_rejected(mutation, right_params):
    expected, _ = reference_run(range(10), mutation, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_close(right_params, expected)


def test_a_dropped_clip_is_rejected(right_params):
    expected, _ = reference_run(range(10), max_grad_norm=2.0, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_close(right_params, expected)
