"""AdamW with max_grad_norm, skip_nonfinite and GradScaler."""

import math

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
from tolerance import DEVICES, assert_bitwise_equal

from fastlm import clip_gradients

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("skip_nonfinite", [True, False])
@pytest.mark.parametrize("max_grad_norm", [0.5, 70.0, 1e6])
def test_max_grad_norm_is_clip_then_step(max_grad_norm, skip_nonfinite, device):
    # The norms lie around 84: all steps are clipped, all hard, or none.
    params = parameters(device=device)
    optimizer = AdamW(params, **HYPER, max_grad_norm=max_grad_norm, skip_nonfinite=skip_nonfinite)
    apart = parameters(device=device)
    plain = torch.optim.AdamW(apart, **HYPER, fused=True)
    for step in range(20):
        set_gradients(params, step)
        set_gradients(apart, step)
        norm = clip_gradients(apart, max_grad_norm)
        optimizer.step()
        plain.step()
        torch.testing.assert_close(optimizer.last_grad_norm.item(), norm, rtol=1e-6, atol=0)
        assert optimizer.last_grad_norm.shape == ()
        assert optimizer.last_grad_norm.device == params[0].device
    for p, expected in zip(params, apart, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)


def test_clipping_against_reference_in_fp64():
    params = parameters(torch.float64)
    run(AdamW(params, **HYPER, max_grad_norm=2.0), params, range(50))
    expected, _ = reference_run(range(50), max_grad_norm=2.0, dtype=torch.float64)
    assert_close(params, expected)


def test_the_norm_is_over_all_groups():
    params = parameters()
    optimizer = AdamW([{"params": params[:2]}, {"params": params[2:]}], max_grad_norm=1.0)
    set_gradients(params, 0)
    norm = clip_gradients(params, math.inf)
    optimizer.step()
    assert_bitwise_equal(optimizer.last_grad_norm, torch.tensor(norm, dtype=torch.float32))


def test_no_norm_is_taken_unless_it_is_wanted():
    params = parameters()
    optimizer = AdamW(params)
    run(optimizer, params, range(1))
    assert optimizer.last_grad_norm is None and optimizer.skip_nonfinite is False


# Steps that are skipped


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_a_bad_step_changes_nothing(options, value, dtype, device):
    params = parameters(dtype, device)
    optimizer = AdamW(params, **HYPER, **options)
    run(optimizer, params, range(3))
    set_gradients(params, 3)
    params[4].grad[7, 11] = value
    before, gradients = snapshot(optimizer, params), [p.grad.clone() for p in params]
    optimizer.step()
    for old, new in zip(before, snapshot(optimizer, params), strict=True):
        assert_bitwise_equal(new, old)
    for p, old in zip(params, gradients, strict=True):  # no factor, and no NaN, has spread to them
        torch.testing.assert_close(p.grad, old, rtol=0, atol=0, equal_nan=True)
    assert not optimizer.last_grad_norm.isfinite()
    # And it is as though it had never been.
    run(optimizer, params, range(4, 6))
    without = parameters(dtype, device)
    run(AdamW(without, **HYPER, **options), without, [0, 1, 2, 4, 5])
    for p, expected in zip(params, without, strict=True):
        assert_bitwise_equal(p.detach(), expected.detach())
    assert optimizer.last_grad_norm.isfinite()


def test_the_first_step_may_be_bad():
    params = parameters()
    optimizer = AdamW(params, **HYPER, max_grad_norm=1.0)
    set_gradients(params, 0)
    params[0].grad.fill_(torch.nan)
    optimizer.step()
    run(optimizer, params, range(1, 4))
    without = parameters()
    run(AdamW(without, **HYPER, max_grad_norm=1.0), without, range(1, 4))
    for p, expected in zip(params, without, strict=True):
        assert_bitwise_equal(p.detach(), expected.detach())
        assert optimizer.state[p]["step"].item() == 3


def test_skipping_can_be_left_out():
    # torch's behaviour then: the NaN goes into the parameter, and into it alone.
    for options in ({}, {"max_grad_norm": 1.0, "skip_nonfinite": False}):
        params = parameters()
        optimizer = AdamW(params, **HYPER, **options)
        set_gradients(params, 0)
        params[4].grad[7, 11] = torch.nan
        optimizer.step()
        assert params[4].isnan().sum() == 1 and params[5].isfinite().all()


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("unscaled", [True, False], ids=["unscale_", "no unscale_"])
def test_grad_scaler(unscaled, options):
    # fp16 gradients arrive scaled by 2^10. Whether the loop calls unscale_ (as it must before it
    # clips by itself) or leaves it to the step, the norm and the clipping are of the true ones.
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    params = parameters()
    optimizer = AdamW(params, **HYPER, **options)
    plain_params = parameters()
    plain = AdamW(plain_params, **HYPER, **options)
    for step in range(6):
        bad = step == 2
        set_gradients(params, step)
        set_gradients(plain_params, step)
        for p in params:
            p.grad.mul_(1024.0 if step < 3 else 512.0)
        if bad:
            params[3].grad[0] = torch.inf
        scaler.scale(torch.ones(()))  # what makes the scale known to the scaler
        before = [p.detach().clone() for p in params]
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
        if bad:
            assert scaler.get_scale() == 512.0
            if options:  # the step ran, and skipped on the device: the scaler did not read there
                assert not optimizer.last_grad_norm.isfinite()
            for p, old in zip(params, before, strict=True):
                assert_bitwise_equal(p.detach(), old)
            continue
        plain.step()
        if options:
            torch.testing.assert_close(optimizer.last_grad_norm, plain.last_grad_norm)
    for p, expected in zip(params, plain_params, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-7)
        assert optimizer.state[p]["step"].item() == 5


def test_a_scaler_knows_of_infinities_elsewhere():
    # On another rank, say: every rank must skip the step, also those whose gradients are finite.
    for options in ({}, {"max_grad_norm": 1.0}):
        params = parameters()
        optimizer = AdamW(params, **HYPER, **options)
        run(optimizer, params, range(2))
        before = snapshot(optimizer, params)
        optimizer.found_inf = torch.ones(())
        run(optimizer, params, [2])
        for old, new in zip(before, snapshot(optimizer, params), strict=True):
            assert_bitwise_equal(new, old)
        assert optimizer.found_inf == 1  # the scaler's, which takes it away itself


def test_grad_scaler_in_a_loop():
    # The whole fp16 flow: autocast, scaled loss, a scale that is too large at first.
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    x = torch.randn(64, 8)
    y = x.sum(-1, keepdim=True)
    losses = []
    for _ in range(60):
        with torch.autocast("cpu", torch.float16):
            output = model(x)
        loss = torch.nn.functional.mse_loss(output.float(), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() < 2.0**24  # steps were skipped
    steps = optimizer.state[model[0].weight]["step"].item()
    assert 0 < steps < 60
    assert losses[-1] < 0.5 * losses[0] and math.isfinite(losses[-1])
