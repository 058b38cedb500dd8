"""The guard: its bound, and a bad step that changes nothing. Runs: test_guard_runs.py."""

import math

import numpy as np
import pytest
import torch
from in_process import TRAIN
from training_runs import (
    same,
    tiny_config,
)

from fastlm import AdamW
from fastlm.data.loader import TrainLoader
from fastlm.errors import CheckpointError
from fastlm.model_loss import ModelLoss
from fastlm.run.guard import FACTOR, MARGIN, NEW_LEVEL, OFTEN, WINDOW, Guard
from fastlm.step import TrainStep, create_model_and_optimizer, set_seed

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")

CPU = torch.device("cpu")


class FakeOptimizer:
    """What a Guard reads of an optimizer."""

    def __init__(self):
        self.last_grad_norm, self.last_bad_row = torch.tensor(1.0), -1


def judged(guard: Guard, loss: float, norm: float = 1.0) -> bool:
    """Was a step of this loss and norm taken?"""
    optimizer, loss = FakeOptimizer(), torch.tensor(loss)
    guard.judge(loss)
    guard.hand_over(optimizer)
    assert optimizer.found_inf.shape == (1,) and optimizer.found_inf.dtype == torch.float32
    optimizer.last_grad_norm = torch.tensor(norm)
    return bool(guard.record(loss, optimizer))


def filled(mode: str = "skip", seed: int = 0) -> tuple[Guard, float]:
    """A guard after WINDOW good steps, and the bound that NumPy computes from them."""
    values = np.random.default_rng(seed).normal(3, 0.1, WINDOW).astype(np.float32)
    guard = Guard(mode, CPU)
    for value in values:
        assert judged(guard, float(value))
    median = np.sort(values)[(WINDOW - 1) // 2]  # torch's median is the lower of two
    distance = np.sort(np.abs(values - median))[(WINDOW - 1) // 2]
    return guard, float(median + FACTOR * 1.4826 * distance)


# --- the bound ---


def test_the_bound_is_median_and_mad_of_the_last_good_losses():
    guard, bound = filled()
    assert judged(guard, bound - 1e-4)
    guard, bound = filled()
    assert not judged(guard, bound + 1e-4)
    assert guard.report().bound == pytest.approx(bound, rel=1e-6)
    assert guard.report().loss == pytest.approx(bound + 1e-4)
    # What was skipped is not part of the next bound.
    assert judged(guard, bound - 1e-4)
    report = guard.report()
    assert (guard.steps, report.skipped, report.in_a_row) == (WINDOW + 2, 1, 0)


def test_there_is_no_bound_before_the_window_is_full():
    guard = Guard("skip", CPU)
    for _ in range(WINDOW - 1):
        assert judged(guard, 3.0)
    assert judged(guard, 1e6)


def test_losses_that_hardly_differ_have_a_margin():
    guard = Guard("skip", CPU)
    for _ in range(WINDOW):
        assert judged(guard, 0.01)
    assert judged(guard, 0.01 + MARGIN - 1e-3) and not judged(guard, 0.01 + MARGIN + 1e-3)


@pytest.mark.parametrize("mode", ["skip", "rollback", "off"])
@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan)])
def test_what_is_not_finite_is_bad_at_any_time_and_never_enters_the_window(mode, loss, norm):
    guard = Guard(mode, CPU)
    assert not judged(guard, loss, norm)
    for _ in range(WINDOW):
        assert judged(guard, 3.0)
    assert not judged(guard, loss, norm)
    assert guard.report().skipped == 2
    assert judged(guard, 1e6) is (mode == "off")


def test_a_loss_that_stays_beyond_the_bound_is_the_new_level():
    guard, bound = filled()
    level = bound + 2
    assert [judged(guard, level) for _ in range(NEW_LEVEL + 1)] == [False] * NEW_LEVEL + [True]
    report = guard.report()
    assert (report.skipped, report.new_levels, report.in_a_row) == (NEW_LEVEL, 1, 0)
    # Rolling back mends what this only accepts.
    guard, bound = filled("rollback")
    assert not any(judged(guard, level) for _ in range(2 * NEW_LEVEL))


@pytest.mark.parametrize("share, most", [(0.25, 0.02), (0.06, 0.1), (0.01, 0.4)])
def test_a_mixtures_rare_source_is_learnt(share, most):
    """Steps with its windows have another loss; the steps between them are many and alike."""
    guard, _ = filled()
    generator = np.random.default_rng(1)
    rare = generator.random(6_000) < share
    values = np.where(rare, generator.normal(6, 0.3, 6_000), generator.normal(3, 0.05, 6_000))
    skipped = sum(not judged(guard, float(value)) for value in values)
    assert OFTEN - 1 <= skipped <= most * rare.sum()
    assert not judged(guard, 9.0)


def test_a_stretch_of_bad_losses_teaches_one():
    guard, _ = filled()
    for _ in range(OFTEN - 2):
        assert not any(judged(guard, 6.0) for _ in range(NEW_LEVEL - 1))
        assert judged(guard, 3.0)
    assert not judged(guard, 6.0)


def test_other_data_begin_without_a_bound():
    guard, _ = filled()
    for _ in range(OFTEN):
        assert not judged(guard, 6.0) and judged(guard, 3.0)
    assert judged(guard, 6.0)  # learnt
    guard.forget_level()
    assert judged(guard, 9.0)
    for _ in range(WINDOW):
        assert judged(guard, 3.0)
    assert not judged(guard, 6.0)


def test_skipped_steps_between_spikes_teach_nothing():
    guard, _ = filled("rollback")
    for _ in range(2 * OFTEN):
        assert not judged(guard, math.nan)
        assert not judged(guard, 20.0)
    assert guard.report().in_a_row == 4 * OFTEN
    # Nor is what no data have: chances are equal at ln(20) = 3.
    guard, _ = filled()
    guard._ceiling = Guard("skip", CPU, 20)._ceiling
    for loss in (1e4, 3.0) * 2 * OFTEN:
        assert judged(guard, loss) == (loss == 3.0)
    assert judged(guard, 2 * math.log(20))


def test_a_guard_restored_from_its_state_goes_on_alike():
    rng = np.random.default_rng(1)
    guard, bound = filled()
    judged(guard, bound + 1)
    again = Guard("skip", CPU)
    again.load_state_dict(guard.state_dict())
    before = guard.state_dict()
    for value in [bound + 1, math.nan, *rng.normal(3, 0.3, 200)]:
        assert judged(guard, float(value)) == judged(again, float(value))
    assert same(guard.state_dict(), again.state_dict())
    assert not same(before, guard.state_dict())  # and it was a copy
    other = Guard("off", CPU)
    other.load_state_dict(before)
    assert same(other.state_dict(), before)


@pytest.mark.parametrize(
    "damage",
    [
        {"ring": torch.zeros(3)}, {"ring": 5}, {"counts": [1]}, {"counts": "many"},
        {"counts": [10**30] * 4}, {"host": None}, {"host": [1]}, {"last": []},
    ],
)  # fmt: skip
def test_a_stored_state_that_does_not_fit_is_an_error(damage):
    state = {**Guard("skip", CPU).state_dict(), **damage}
    with pytest.raises(CheckpointError, match="state of the guard does not fit"):
        Guard("skip", CPU).load_state_dict(state)
    with pytest.raises(CheckpointError, match="state of the guard does not fit"):
        Guard("skip", CPU).load_state_dict([1])


# --- the step ---


def make_runner(**settings) -> TrainStep:
    cfg = tiny_config("unused", **settings)
    set_seed(0)
    model, optimizer, _ = create_model_and_optimizer(cfg)
    loader = TrainLoader(TRAIN, cfg.batch_size, cfg.context_len, seed=0)
    return TrainStep(ModelLoss(model, loader.device, cfg), optimizer, loader, cfg)


def everything(runner: TrainStep) -> list:
    weights = {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}
    moments = {
        (i, key): value.clone()
        for i, entry in runner.optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    return [weights, moments]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("impl", ["cpp", "torch"])
def test_a_loss_beyond_the_bound_leaves_weights_moments_and_counters(dtype, impl, monkeypatch):
    if impl == "torch":  # as on devices without kernels
        monkeypatch.setattr(
            "fastlm.step.AdamW", lambda *args, **options: AdamW(*args, **options, impl="torch")
        )
    runner = make_runner(dtype=dtype, lr_max=1e-3)
    runner.guard._ring.fill_(1e9)
    runner.run(0, 1e-3)  # below the bound
    assert bool(runner.good)
    before, scale = everything(runner), runner.scaler.state_dict()
    runner.guard._ring.fill_(0.5)
    loss = runner.run(4, 1e-3)
    assert loss.isfinite() and not bool(runner.good) and runner.optimizer.last_grad_norm > 0
    assert same(everything(runner), before)
    assert not hasattr(runner.optimizer, "found_inf")
    # The loss scale is not lowered: nothing has overflowed.
    if dtype == "float16":
        assert runner.scaler.state_dict()["scale"] == scale["scale"]
        assert runner.scaler.state_dict()["_growth_tracker"] == scale["_growth_tracker"] + 1
    runner.guard._ring.fill_(1e9)
    runner.run(8, 1e-3)
    assert bool(runner.good) and not same(everything(runner), before)


def test_float16_overflow_is_skipped_lowers_the_scale_and_is_counted():
    runner = make_runner(dtype="float16")
    runner.scaler.load_state_dict({**runner.scaler.state_dict(), "scale": 2.0**60})
    before = everything(runner)[0]
    runner.run(0, 1e-3)
    assert not bool(runner.good) and same(everything(runner)[0], before)
    assert runner.scaler.get_scale() == 2.0**59 and runner.guard.report().skipped == 1


def test_no_step_reads_anything_on_the_host(monkeypatch):
    """A GPU would be waited for. The CPU's optimizer reads its own, the guard nothing."""
    guard, bound = filled()
    waits = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(
            torch.Tensor, name, lambda *args, name=name, **options: waits.append(name)
        )
    for value in (3.0, bound + 1, math.nan):
        optimizer, loss = FakeOptimizer(), torch.full((), value)
        guard.judge(loss)
        guard.hand_over(optimizer)
        guard.record(loss, optimizer)
    assert waits == []


def test_warm_up_and_calibration_leave_the_guard_alone():
    runner = make_runner()
    before = runner.guard.state_dict()
    runner.warm_up()
    runner.seconds_per_step(seconds=0.01)
    assert same(runner.guard.state_dict(), before)
