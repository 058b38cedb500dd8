"""The guard: a bad step changes nothing, is named, and a run full of them does not end well."""

import math
import re

import numpy as np
import pytest
import torch
from command_server import commands
from in_process import TRAIN, VAL, checkpoint, run_tiny
from training_runs import (
    losses,
    metrics,
    same,
    state,
    tiny_config,
    tiny_flags,
    tokens,
    write_tokens,
)

from fastlm import AdamW, train_loop
from fastlm.data.loader import TrainLoader
from fastlm.errors import CheckpointError, DivergedError
from fastlm.model_loss import ModelLoss
from fastlm.run import guard as guard_module
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


@pytest.mark.parametrize("share, most", [(0.25, 0.03), (0.1, 0.1)])
def test_a_mixtures_rare_source_is_learnt(share, most):
    """Steps with its windows have another loss; the steps between them are many and alike."""
    guard, _ = filled()
    generator = np.random.default_rng(1)
    rare = generator.random(2_000) < share
    values = np.where(rare, generator.normal(6, 0.3, 2_000), generator.normal(3, 0.05, 2_000))
    skipped = sum(not judged(guard, float(value)) for value in values)
    assert OFTEN - 1 <= skipped <= most * rare.sum()
    assert not judged(guard, 9.0)


def test_a_stretch_of_bad_losses_teaches_one():
    guard, _ = filled()
    for _ in range(OFTEN - 2):
        assert not any(judged(guard, 6.0) for _ in range(NEW_LEVEL - 1))
        assert judged(guard, 3.0)
    assert not judged(guard, 6.0)


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


# --- runs ---


def poison(monkeypatch, bad, value) -> None:
    """The losses of the steps in `bad` are multiplied by `value`; steps are counted by samples."""
    run = TrainStep.run

    def poisoned(self, first_sample, lr, *args):
        self.poison = value if lr and first_sample // self.samples in bad else None
        return run(self, first_sample, lr, *args)

    forward = ModelLoss.forward

    def loss(self, x, y, *args, **options):
        result = forward(self, x, y, *args, **options)
        factor = runners[-1].poison if runners else None
        return result if factor is None else result * factor

    runners = []
    init = TrainStep.__init__

    def remember(self, *args):
        init(self, *args)
        self.poison = None
        runners.append(self)

    monkeypatch.setattr(TrainStep, "__init__", remember)
    monkeypatch.setattr(TrainStep, "run", poisoned)
    monkeypatch.setattr(ModelLoss, "forward", loss)


@pytest.fixture
def small_window(monkeypatch):
    """A bound after 8 good steps, for short runs."""
    monkeypatch.setattr(guard_module, "WINDOW", 8)


def test_ordinary_runs_never_touch_the_bound(tmp_path):
    """Warm-up to a high rate, the batch of one short window: nothing is skipped."""
    for name, settings in {
        "warm-up": dict(lr_max=1e-2, warmup_iters=150),
        "noisy": dict(lr_max=3e-3, batch_size=1, context_len=8),
    }.items():
        run_tiny(tmp_path / name, total_steps=250, log_every=250, **settings)
        (summary,) = metrics(tmp_path / name, "summary")
        assert summary["skipped"] == 0


def test_a_run_is_the_same_with_the_guard_and_without(tmp_path):
    for mode in ("skip", "rollback", "off"):
        run_tiny(tmp_path / mode, guard=mode, dropout=0.1)
    for mode in ("rollback", "off"):
        assert same(*(state(checkpoint(tmp_path / m)) for m in ("skip", mode)))


def test_bad_steps_are_skipped_named_and_counted(tmp_path, monkeypatch, capsys, small_window):
    poison(monkeypatch, {15, 16, 22}, 1e4)
    run_tiny(tmp_path / "run", total_steps=24, log_every=4)
    said = capsys.readouterr().out
    form = (
        r"\[guard\] 2 of the last 4 steps skipped, 2 in all; the last one's loss \d+\.\d+ is above"
    )
    assert re.search(form, said), said
    row, last = metrics(tmp_path / "run", "guard")
    assert (row["step"], row["skipped"], row["in_a_row"], row["parameter"]) == (16, 2, 2, None)
    assert (last["step"], last["skipped"], last["in_a_row"]) == (23, 3, 0)  # behind the last line
    assert row["loss"] > 1e4 > 100 > row["bound"]
    # The average leaves them out, the step's own loss does not.
    rows = {r["step"]: r for r in metrics(tmp_path / "run", "train")}
    assert rows[16]["loss"] > 1e4 and rows[16]["avg_loss"] < 10
    (summary,) = metrics(tmp_path / "run", "summary")
    assert (summary["skipped"], summary["steps"]) == (3, 24)
    assert "[summary] guard       3 steps skipped, 0 times back" in said
    payload = torch.load(checkpoint(tmp_path / "run"), weights_only=True)
    assert payload["samples_seen"] == 24 * 4  # their samples are passed
    assert all(entry["step"] == 21 for entry in payload["optimizer_state"]["state"].values())


def test_a_gradient_that_is_not_finite_is_named(tmp_path, monkeypatch, capsys):
    from fastlm.step import create_model

    seen = []
    run = TrainStep.run

    def counted(self, first_sample, lr, *args):
        seen[:] = [first_sample // self.samples if lr else -1]
        return run(self, first_sample, lr, *args)

    names = {}

    def hooked(cfg, **options):
        model = create_model(cfg, **options)
        name, parameter = list(model.named_parameters())[-3]
        names["bad"] = name
        parameter.register_hook(lambda grad: grad * math.nan if seen[0] == 5 else grad)
        return model

    monkeypatch.setattr(TrainStep, "run", counted)
    monkeypatch.setattr("fastlm.train.create_model", hooked)
    run_tiny(tmp_path / "run", log_every=4)
    said = capsys.readouterr().out
    assert f"the last one's gradient of {names['bad']} is not finite" in said
    (row,) = metrics(tmp_path / "run", "guard")
    assert (row["parameter"], row["step"], row["in_a_row"]) == (names["bad"], 8, 0)


def test_a_resumed_guard_is_the_uninterrupted_one(tmp_path, monkeypatch, small_window):
    poison(monkeypatch, {10, 11, 13, 20}, 1e4)
    settings = dict(total_steps=24, dropout=0.1, log_every=3)
    run_tiny(tmp_path / "straight", **settings)
    expected = torch.load(checkpoint(tmp_path / "straight"), weights_only=True)
    assert expected["guard"]["counts"][0] == 4
    run_tiny(tmp_path / "pieces", ckpt_every=12, **settings)  # in the middle of the bad ones
    path = checkpoint(tmp_path / "pieces", 12)
    run_tiny(tmp_path / "pieces", ckpt_path_to_resume=str(path), **settings)
    payload = torch.load(checkpoint(tmp_path / "pieces"), weights_only=True)
    assert same(payload["guard"], expected["guard"])
    assert same(state(checkpoint(tmp_path / "pieces")), state(checkpoint(tmp_path / "straight")))
    assert losses(tmp_path / "pieces") == losses(tmp_path / "straight")


def test_a_run_that_only_skips_stops_with_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(guard_module, "GIVE_UP", 6)
    poison(monkeypatch, set(range(5, 1000)), math.nan)
    with pytest.raises(DivergedError, match=r"the last 8 steps were skipped: .*lower --lr-max$"):
        run_tiny(tmp_path / "run", total_steps=40, log_every=4)
    payload = torch.load(checkpoint(tmp_path / "run", 13), weights_only=True)
    assert all(entry["step"] == 5 for entry in payload["optimizer_state"]["state"].values())
    assert not checkpoint(tmp_path / "run", "emergency").exists()


def test_rollback_goes_back_and_past_the_data(tmp_path, monkeypatch, capsys, small_window):
    """12 bad steps from 20 on: back to checkpoint 18, the one within the bad ones retired, and on
    with the samples after them."""
    poison(monkeypatch, set(range(20, 32)), 1e4)
    settings = dict(total_steps=40, guard="rollback", log_every=1, ckpt_every=6, dropout=0.1)
    run_tiny(tmp_path / "run", **settings)
    said = capsys.readouterr().out
    assert re.search(
        r"\[guard\] 10 steps in a row skipped: back to .*checkpoint_18\.pt, step 18", said
    )
    payload = torch.load(checkpoint(tmp_path / "run"), weights_only=True)
    # Ten of them, back by twelve, and two more bad ones are skipped.
    assert payload["iteration"] == 40 and payload["samples_seen"] == 4 * (40 + 12)
    assert payload["guard"]["host"][1:] == [1, 18, 1]
    assert all(entry["step"] == 38 for entry in payload["optimizer_state"]["state"].values())
    names = {path.name for path in checkpoint(tmp_path / "run").parent.iterdir()}
    assert "checkpoint_24.pt_abandoned" in names and "checkpoint_24.pt" in names
    steps = [row["step"] for row in metrics(tmp_path / "run", "train")]
    assert steps == list(range(40))  # none twice
    (summary,) = metrics(tmp_path / "run", "summary")
    assert summary["rolled_back"] == 1
    # Killed after that and resumed: the same.
    path = checkpoint(tmp_path / "run", 30)
    run_tiny(tmp_path / "again", ckpt_path_to_resume=str(path), **settings)
    again = torch.load(checkpoint(tmp_path / "again"), weights_only=True)
    assert same(again["guard"], payload["guard"])
    assert same(state(checkpoint(tmp_path / "again")), state(checkpoint(tmp_path / "run")))


def test_rollback_to_the_same_checkpoint_ends_some_time(tmp_path, monkeypatch, small_window):
    poison(monkeypatch, set(range(20, 1000)), 1e4)
    with pytest.raises(DivergedError, match=r"3 times .*, or lower --lr-max and --muon-lr$"):
        run_tiny(tmp_path, total_steps=40, guard="rollback", ckpt_every=6, optimizer="muon")


def test_rollback_without_a_checkpoint_skips(tmp_path, monkeypatch, small_window):
    poison(monkeypatch, set(range(20, 32)), 1e4)
    run_tiny(tmp_path, total_steps=40, guard="rollback")
    (summary,) = metrics(tmp_path, "summary")
    assert (summary["skipped"], summary["rolled_back"]) == (12, 0)


def test_a_run_in_which_nothing_was_learnt_does_not_end_well(tmp_path):
    write_tokens(tmp_path)
    argv = tiny_flags(lr_max=1e30, lr_min=0, total_steps=26, warmup_iters=0, log_every=5)
    result = commands().run(argv, tmp_path)
    assert result.returncode == 1, result.output
    assert re.search(
        r"\[train\] missing: a trained model \(the last \d+ steps were skipped", result.stdout
    )
    assert "NaN" not in (tmp_path / "run" / "logs" / "metrics.jsonl").read_text()
    # A poisoned checkpoint, resumed: every step is skipped.
    assert commands().run(tiny_flags(target_dir="good", ckpt_every=6), tmp_path).returncode == 0
    path = tmp_path / "good" / "checkpoints" / "checkpoint_6.pt"
    payload = torch.load(path, weights_only=True)
    payload["model_state"]["lm_head.weight"][3, 5] = math.nan
    torch.save(payload, tmp_path / "poisoned_6.pt")
    result = commands().run(tiny_flags(resume="poisoned_6.pt", target_dir="rest"), tmp_path)
    assert result.returncode == 1, result.output
    assert "a trained model (all 6 steps were skipped" in result.stdout


def test_train_loop_raises_when_it_diverges(tmp_path, monkeypatch):
    monkeypatch.setattr(guard_module, "GIVE_UP", 4)
    poison(monkeypatch, set(range(1000)), math.nan)
    with pytest.raises(DivergedError, match=r"with a lower --lr-max and --muon-lr$"):
        train_loop(tokens(4000), VAL, tiny_config(tmp_path, optimizer="muon"))


def test_without_a_checkpoint_to_go_back_to_it_skips(tmp_path, monkeypatch, small_window, capsys):
    """Also where more steps than give up stand between two log lines."""
    monkeypatch.setattr(guard_module, "GIVE_UP", 12)
    poison(monkeypatch, set(range(15, 26)), math.nan)
    run_tiny(tmp_path / "run", guard="rollback", total_steps=40, log_every=5)
    said = capsys.readouterr().out
    assert said.count("[guard] no checkpoint to go back to: bad steps are skipped from now on") == 1
    (summary,) = metrics(tmp_path / "run", "summary")
    assert (summary["skipped"], summary["steps"]) == (11, 40)


def test_going_back_comes_before_giving_up(tmp_path, monkeypatch, small_window):
    monkeypatch.setattr(guard_module, "GIVE_UP", 12)
    poison(monkeypatch, set(range(15, 45)), math.nan)
    settings = dict(total_steps=60, log_every=40, ckpt_every=2)
    run_tiny(tmp_path / "run", guard="rollback", **settings)
    assert len(metrics(tmp_path / "run", "rollback")) == 1
    (summary,) = metrics(tmp_path / "run", "summary")
    assert summary["rolled_back"] == 1 and summary["skipped"] >= 20
    assert metrics(tmp_path / "run", "guard")  # what was skipped stays in the metrics
