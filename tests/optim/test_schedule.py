"""Learning-rate schedules against their formulas and the values that CS336 assignment 1 expects."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from training_runs import tiny_config

from fastlm import cosine_lr_schedule, get_cosine_schedule_with_warmup, wsd_lr_schedule
from fastlm.schedule import learning_rate, rate_jump

# it = 0..24 with a maximum of 1, a minimum of 0.1, 7 warm-up steps and a cycle of 21 steps.
CS336_RATES = [
    0, 0.14285714285714285, 0.2857142857142857, 0.42857142857142855, 0.5714285714285714,
    0.7142857142857143, 0.8571428571428571, 1.0, 0.9887175604818206, 0.9554359905560885,
    0.9018241671106134, 0.8305704108364301, 0.7452476826029011, 0.6501344202803414, 0.55,
    0.44986557971965857, 0.3547523173970989, 0.26942958916356996, 0.19817583288938662,
    0.14456400944391146, 0.11128243951817937, 0.1, 0.1, 0.1, 0.1,
]  # fmt: skip


def test_the_25_values_of_cs336():
    rates = [cosine_lr_schedule(t, 1.0, 0.1, 7, 21) for t in range(25)]
    assert rates == pytest.approx(CS336_RATES, rel=1e-12, abs=0)


def test_cosine_endpoints():
    def rate(t):
        return cosine_lr_schedule(t, 3e-4, 3e-5, 200, 1000)

    assert rate(0) == 0
    assert rate(100) == pytest.approx(1.5e-4, rel=1e-12)
    assert rate(199) == pytest.approx(3e-4 * 199 / 200, rel=1e-12)
    assert rate(200) == pytest.approx(3e-4, rel=1e-12)
    assert rate(600) == pytest.approx((3e-4 + 3e-5) / 2, rel=1e-12)  # half way
    assert rate(1000) == 3e-5
    assert rate(999) > 3e-5


@pytest.mark.parametrize("warmup, end", [(0, 40), (7, 40), (39, 40), (40, 40), (50, 40), (0, 1)])
def test_cosine_rises_in_the_warm_up_and_never_again(warmup, end):
    rates = [cosine_lr_schedule(t, 1.0, 0.1, warmup, end) for t in range(200)]
    for t, (before, after) in enumerate(itertools.pairwise(rates), start=1):
        if t < warmup:
            assert after > before
        elif t > warmup:
            assert after <= before
    assert all(rate == 0.1 for rate in rates[max(warmup, end) :])
    assert max(rates) <= 1.0


def test_cosine_without_warm_up_starts_at_the_maximum():
    assert cosine_lr_schedule(0, 1.0, 0.1, 0, 10) == 1.0
    assert cosine_lr_schedule(5, 1.0, 0.1, 0, 10) == pytest.approx(0.55)


def test_cosine_that_ends_with_the_warm_up():
    rates = [cosine_lr_schedule(t, 1.0, 0.1, 4, 4) for t in range(7)]
    assert rates == [0.0, 0.25, 0.5, 0.75, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    "warmup, total, ratio", [(10, 100, 0.1), (0, 20, 0.1), (5, 5, 0.2), (10, 100, 0.0)]
)
def test_lambda_lr_is_the_function(warmup, total, ratio):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 2e-2}]
    optimizer = torch.optim.SGD(groups, lr=3e-4)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, total, min_lr_ratio=ratio)
    for t in range(2 * total + 5):
        for group, lr in zip(optimizer.param_groups, (3e-4, 2e-2), strict=True):
            expected = cosine_lr_schedule(t, lr, lr * ratio, warmup, total)
            assert group["lr"] == pytest.approx(expected, rel=1e-12, abs=1e-18), t
        optimizer.step()
        scheduler.step()


def lambda_rates(steps, *arguments, **keywords):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, *arguments, **keywords)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_lambda_lr_never_rises_again_after_the_end():
    rates = lambda_rates(70, 5, 20)
    assert rates[20:] == [0.1] * 50  # the default ratio; a cosine goes up again from step 20
    assert rates[5] == 1.0


@pytest.mark.parametrize("ratio, clamped", [(-0.5, 0.0), (1.5, 1.0), (0.3, 0.3)])
def test_lambda_lr_clamps_the_ratio(ratio, clamped):
    rates = lambda_rates(30, 2, 10, min_lr_ratio=ratio)
    assert rates[10:] == [clamped] * 20
    assert max(rates) == 1.0 and min(rates[2:]) == clamped


def test_wsd_is_warm_up_plateau_and_linear_decay():
    rates = [wsd_lr_schedule(t, 1.0, 0.1, 10, 100) for t in range(130)]
    assert rates[:10] == pytest.approx([t / 10 for t in range(10)])
    assert rates[10:81] == [1.0] * 71
    assert rates[80:100] == pytest.approx([1.0 - 0.9 * k / 20 for k in range(20)])
    assert rates[100:] == [0.1] * 30


def test_wsd_edges():
    assert wsd_lr_schedule(0, 1.0, 0.1, 0, 10) == 1.0
    # A warm-up that reaches into the decay shortens the decay.
    rates = [wsd_lr_schedule(t, 1.0, 0.0, 9, 10) for t in range(12)]
    assert rates == pytest.approx([*(t / 9 for t in range(9)), 1.0, 0.0, 0.0])
    assert [wsd_lr_schedule(t, 1.0, 0.1, 3, 3) for t in (2, 3, 4)] == [2 / 3, 0.1, 0.1]
    half = [wsd_lr_schedule(t, 1.0, 0.0, 0, 10, decay_fraction=0.5) for t in range(11)]
    assert half == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])


def test_the_trainer_follows_the_configured_schedule(tmp_path):
    cfg = tiny_config(tmp_path, total_steps=100, cosine_iters=50, warmup_iters=10)
    assert learning_rate(30, cfg) == pytest.approx(
        cfg.lr_min + (cfg.lr_max - cfg.lr_min) * (1 + math.cos(math.pi / 2)) / 2
    )
    assert learning_rate(50, cfg) == cfg.lr_min
    cfg.schedule = "wsd"  # ends with total_steps
    assert learning_rate(50, cfg) == cfg.lr_max
    assert cfg.lr_min < learning_rate(90, cfg) < cfg.lr_max
    assert learning_rate(100, cfg) == cfg.lr_min


def settings_of_a_schedule(**changed):
    sizes = dict(lr_max=1e-3, lr_min=1e-5, warmup_iters=10, total_steps=100, cosine_iters=100)
    return {"schedule": "wsd", **sizes, **changed}


def test_a_rate_that_jumps_at_a_resume_is_told():
    """Extending a wsd run that has decayed sets its rate back to lr_max, which undoes the decay."""
    wsd = settings_of_a_schedule()
    longer = settings_of_a_schedule(total_steps=200, cosine_iters=200)
    line = jump(100, wsd, longer)
    assert line.startswith("note: the learning rate goes up from 5.95e-05 to 1.00e-03 at step 100")
    assert line.endswith(
        "began at step 80; a wsd run is extended better from a checkpoint before that"
    )
    assert "\n" not in line
    # Nothing is said where nothing jumps: before the decay, unchanged, in the warm-up, at step 0.
    cosine = settings_of_a_schedule(schedule="cosine")
    for step, stored, settings in (
        (80, wsd, longer), (81, wsd, longer), (90, wsd, wsd), (5, wsd, longer), (0, wsd, longer),
        (60, cosine, longer_cosine(110)), (100, {}, longer), (100, None, longer),
    ):  # fmt: skip
        assert jump(step, stored, settings) is None, step
    assert "it has decayed by another schedule" in jump(100, cosine, longer_cosine(200))


def test_a_jump_of_muons_rate_is_told():
    stored = settings_of_a_schedule(optimizer="muon", muon_lr=0.02)
    line = jump(50, stored, {**stored, "muon_lr": 0.2})
    assert line.startswith(
        "note: Muon's learning rate goes up from 2.00e-02 to 2.00e-01 at step 50"
    )
    # Late in the decay, where lr_min is near a lower lr_max.
    assert "goes up from 2.18e-03 to 1.05e-02" in jump(99, stored, {**stored, "lr_max": 2e-5})
    # The other rate's jump is told before; no jump, or no Muon, is none.
    assert "the learning rate goes up" in jump(
        50, stored, {**stored, "lr_max": 0.1, "muon_lr": 2.0}
    )
    for changed in ({}, dict(muon_lr=0.025), dict(muon_lr=0.2, optimizer="adamw")):
        assert jump(50, stored, {**stored, **changed}) is None


def jump(step, stored, settings):
    return rate_jump(step, stored, SimpleNamespace(**settings))


def longer_cosine(steps):
    return settings_of_a_schedule(schedule="cosine", total_steps=steps, cosine_iters=steps)
