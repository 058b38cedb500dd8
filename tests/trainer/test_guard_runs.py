"""Runs with the guard: what is skipped is named and counted, a run full of it does not end well."""

import math
import re

import pytest
import torch
from command_server import commands
from in_process import VAL, checkpoint, run_tiny
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

from fastlm import train_loop
from fastlm.errors import DivergedError
from fastlm.model_loss import ModelLoss
from fastlm.run import guard as guard_module
from fastlm.step import TrainStep

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")


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


def test_other_data_tell_the_bound_anew(tmp_path, monkeypatch, small_window):
    run_tiny(tmp_path / "run", total_steps=20, ckpt_every=0)
    path = checkpoint(tmp_path / "run")
    assert torch.load(path, weights_only=True)["guard"]["ring"].isfinite().all()
    seen = []
    run = TrainStep.run

    def noted(self, *args, **options):
        seen.append(self.guard._ring.isnan().sum().item())
        return run(self, *args, **options)

    monkeypatch.setattr(TrainStep, "run", noted)
    settings = dict(total_steps=22, ckpt_every=0, ckpt_path_to_resume=str(path))
    train_loop(
        tokens(3000, seed=5), VAL, tiny_config(tmp_path / "run", allow_data_change=True, **settings)
    )
    assert seen[-2:] == [8, 7]
