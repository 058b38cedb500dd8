"""Runs that are continued, and train_loop in somebody else's program.

"Equal" is bit for bit here, for weights, moments, random state and losses.
"""

import io
import re
import signal
import sys
import threading

import pytest
import torch
from in_process import (
    TRAIN,
    VAL,
    checkpoint,
    run_tiny,
)
from training_runs import listing, losses, metrics, same, state, tiny_config

from fastlm import (
    CheckpointError,
    create_model_and_optimizer,
    load_checkpoint,
    train_loop,
)
from fastlm.data.dataset import as_dataset
from fastlm.data.files import Data
from fastlm.data.loader import TrainLoader
from fastlm.data.step_loader import StepLoader
from fastlm.loop import learning_rate
from fastlm.run.log import RunLog
from fastlm.step import TrainStep
from fastlm.train import train

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras", "signals_as_in_a_terminal")

# --- resume ---

VARIANTS = {
    "plain": {},
    "dropout and accumulation": dict(dropout=0.2, grad_accum=2),
    "float16": dict(dtype="float16", dropout=0.1),
    "bfloat16, tied, wsd": dict(dtype="bfloat16", tie_embeddings=True, schedule="wsd"),
    "recomputed, decaying all": dict(
        activation_checkpointing=True, dropout=0.1, weight_decay_all=True
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, variant):
    settings = VARIANTS[variant]
    run_tiny(tmp_path / "straight", **settings)
    run_tiny(tmp_path / "half", ckpt_every=5, **settings)
    torch.rand(7)
    resumed = checkpoint(tmp_path / "half", 5)
    run_tiny(tmp_path / "rest", ckpt_path_to_resume=str(resumed), **settings)
    assert same(state(checkpoint(tmp_path / "rest")), state(checkpoint(tmp_path / "straight")))
    straight, rest = losses(tmp_path / "straight"), losses(tmp_path / "rest")
    assert rest == {step: straight[step] for step in range(5, 12)}
    if variant == "float16":  # the scaler's own state went along, and had changed by then
        assert torch.load(resumed, weights_only=True)["scaler"]["_growth_tracker"] == 5


def test_every_step_is_a_place_to_resume_from(tmp_path):
    run_tiny(tmp_path, total_steps=6, ckpt_every=1, dropout=0.1)
    final = state(checkpoint(tmp_path))
    for step in range(1, 6):
        name = f"from_{step}"
        path = str(checkpoint(tmp_path, step))
        run_tiny(tmp_path / name, total_steps=6, dropout=0.1, ckpt_path_to_resume=path)
        assert same(state(checkpoint(tmp_path / name)), final)


def test_other_programs_checkpoints_can_be_resumed(tmp_path):
    """nanoGPT's and the tutorial's keys, a wrapper's prefix, an optimizer of torch."""
    settings = dict(weight_decay_all=True, lr_max=1e-3)
    run_tiny(tmp_path / "ours", ckpt_every=5, **settings)
    payload = torch.load(checkpoint(tmp_path / "ours", 5), weights_only=True)
    for index, (model, optimizer, step) in enumerate(
        [("model", "optimizer", "iter_num"), ("model_state_dict", "optimizer_state_dict", "step")]
    ):
        other = {
            model: {f"_orig_mod.{name}": value for name, value in payload["model_state"].items()},
            optimizer: payload["optimizer_state"],
            step: 5,
        }
        path = tmp_path / f"other{index}.pt"
        torch.save(other, path)
        run_tiny(tmp_path / f"rest{index}", ckpt_path_to_resume=str(path), **settings)
        a = state(checkpoint(tmp_path / "ours"))
        b = state(checkpoint(tmp_path / f"rest{index}"))
        for name in ("model_state", "optimizer_state", "iteration"):
            assert same(a[name], b[name]), name


def test_a_changed_batch_neither_skips_nor_repeats_a_sample(tmp_path, monkeypatch):
    drawn, batches = [], StepLoader.batches

    def note(self, firsts, following):
        for first in firsts:
            drawn.extend(range(first, first + self.loader.batch_size))
        return batches(self, firsts, following)

    monkeypatch.setattr(TrainStep, "warm_up", lambda self: None)
    monkeypatch.setattr(StepLoader, "batches", note)
    run_tiny(tmp_path / "0", batch_size=4, total_steps=3)
    for part, (batch_size, grad_accum, until) in enumerate([(8, 1, 5), (2, 3, 9), (1, 1, 10)]):
        run_tiny(
            tmp_path / str(part + 1),
            batch_size=batch_size,
            grad_accum=grad_accum,
            total_steps=until,
            ckpt_path_to_resume=str(checkpoint(tmp_path / str(part))),
        )
    assert drawn == list(range(3 * 4 + 2 * 8 + 4 * 6 + 1))


def test_a_checkpoint_without_its_position_goes_on_by_its_own_batch(tmp_path):
    run_tiny(tmp_path, total_steps=3, batch_size=4, grad_accum=2)
    payload = torch.load(checkpoint(tmp_path), weights_only=True)
    assert payload.pop("samples_seen") == 24
    torch.save(payload, tmp_path / "old.pt")
    old = str(tmp_path / "old.pt")
    run_tiny(tmp_path / "on", total_steps=4, batch_size=2, ckpt_path_to_resume=old)
    assert torch.load(checkpoint(tmp_path / "on"), weights_only=True)["samples_seen"] == 26


def test_changed_settings_take_effect_on_resume(tmp_path):
    """Those of the optimizer too, whose state dict brings the old ones along."""
    run_tiny(tmp_path, ckpt_every=5)
    changed = dict(weight_decay=0.5, betas=(0.5, 0.6), eps=1e-5, lr_max=1e-2)
    path = str(checkpoint(tmp_path, 5))
    cfg = run_tiny(tmp_path / "changed", ckpt_path_to_resume=path, **changed)
    optimizer_state = state(checkpoint(tmp_path / "changed"))["optimizer_state"]
    decays = []
    for group in optimizer_state["param_groups"]:
        assert (tuple(group["betas"]), group["eps"]) == ((0.5, 0.6), 1e-5)
        decays.append(group["weight_decay"])
    assert decays == [0.5, 0.0]
    assert metrics(tmp_path / "changed", "train")[0]["lr"] == learning_rate(5, cfg)


def test_what_cannot_be_resumed(tmp_path):
    run_tiny(tmp_path, ckpt_every=5)
    before = listing(tmp_path)
    path = str(checkpoint(tmp_path, 5))
    with pytest.raises(CheckpointError, match="read other data"):
        run_tiny(tmp_path / "x", train_data=TRAIN[:-1], ckpt_path_to_resume=path)
    with pytest.raises(CheckpointError, match="optimizer state does not fit"):
        run_tiny(tmp_path / "x", ckpt_path_to_resume=path, weight_decay_all=True)
    with pytest.raises(CheckpointError, match="no optimizer state"):
        run_tiny(tmp_path / "x", ckpt_path_to_resume=str(checkpoint(tmp_path, "model")))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        run_tiny(tmp_path / "x", ckpt_path_to_resume=str(tmp_path / "nowhere.pt"))
    with pytest.raises(CheckpointError, match="another architecture"):
        run_tiny(tmp_path / "x", ckpt_path_to_resume=path, num_layers=3)
    # As many weights of the same shapes, and another function all the same.
    for settings in (dict(num_heads=4), dict(tie_embeddings=True)):
        for how in ("ckpt_path_to_resume", "init_from"):
            with pytest.raises(CheckpointError, match="architecture"):
                run_tiny(tmp_path / "x", **{how: path}, **settings)
    assert listing(tmp_path) == before


def test_init_from_takes_the_weights_and_nothing_else(tmp_path, capsys):
    run_tiny(tmp_path / "first")
    path = str(checkpoint(tmp_path / "first", "model"))
    cfg = run_tiny(tmp_path / "second", init_from=path, seed=5, total_steps=3)
    assert f"[init] weights of {path}" in capsys.readouterr().out
    model, _, _ = create_model_and_optimizer(cfg)
    load_checkpoint(model, None, path)
    x, y = TrainLoader(TRAIN, cfg.batch_size, cfg.context_len, seed=5).batch(0)
    loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
    assert losses(tmp_path / "second")[0] == pytest.approx(loss.item(), rel=1e-6)
    final = state(checkpoint(tmp_path / "second"))
    assert final["iteration"] == 3
    assert {int(s["step"]) for s in final["optimizer_state"]["state"].values()} == {3}
    # Resumed by the same settings, the run goes on.
    settings = dict(init_from=path, seed=5, total_steps=3)
    run_tiny(tmp_path / "second", ckpt_every=2, overwrite=True, **settings)
    resumed = str(checkpoint(tmp_path / "second", 2))
    run_tiny(tmp_path / "second", ckpt_path_to_resume=resumed, **settings)
    assert same(state(checkpoint(tmp_path / "second")), final)


# --- train_loop in somebody else's program ---


def test_ctrl_c_in_train_loop_saves_and_raises(tmp_path, monkeypatch, capfd):
    log_train = RunLog.train

    def interrupted(self, step, **values):
        log_train(self, step, **values)
        if step == 4:
            signal.raise_signal(signal.SIGINT)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(RunLog, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "stopped")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert "a checkpoint follows" in capfd.readouterr().err
    monkeypatch.setattr(RunLog, "train", log_train)
    path = str(checkpoint(tmp_path / "stopped", 5))
    run_tiny(tmp_path / "rest", ckpt_path_to_resume=path)
    run_tiny(tmp_path / "straight")
    assert same(state(checkpoint(tmp_path / "rest")), state(checkpoint(tmp_path / "straight")))


def test_ctrl_c_in_the_last_step_leaves_the_end_to_the_resumed_run(tmp_path, monkeypatch):
    log_train = RunLog.train

    def interrupted(self, step, **values):
        log_train(self, step, **values)
        if step == 11:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunLog, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path)
    assert metrics(tmp_path, "val") == [] and metrics(tmp_path, "summary") == []
    path = str(checkpoint(tmp_path))
    monkeypatch.setattr(RunLog, "train", log_train)
    run_tiny(tmp_path, ckpt_path_to_resume=path)
    run_tiny(tmp_path / "straight")
    for event in ("val", "summary"):
        a, b = (metrics(target_dir, event) for target_dir in (tmp_path, tmp_path / "straight"))
        assert [row["val_loss"] for row in a] == [row["val_loss"] for row in b] and len(a) == 1


def test_train_loop_runs_outside_the_main_thread(tmp_path):
    thread = threading.Thread(target=run_tiny, args=(tmp_path / "thread",))
    thread.start()
    thread.join()
    run_tiny(tmp_path / "main")
    assert losses(tmp_path / "thread") == losses(tmp_path / "main")


def test_a_decayed_run_made_longer_says_that_its_rate_goes_up(tmp_path, capsys):
    run_tiny(tmp_path / "run", total_steps=10, ckpt_every=6, schedule="wsd")
    for step, says in (("6", 0), ("final", 1)):
        settings = dict(total_steps=14, schedule="wsd")
        path = str(checkpoint(tmp_path / "run", step))
        capsys.readouterr()
        run_tiny(tmp_path / f"from_{step}", ckpt_path_to_resume=path, **settings)
        lines = [line for line in capsys.readouterr().out.splitlines() if "[resume] note" in line]
        assert len(lines) == says and all("began at step 8" in line for line in lines)


def test_train_loop_returns_the_trained_model(tmp_path):
    cfg = tiny_config(tmp_path)
    model = train_loop(TRAIN, VAL, cfg)
    assert same(dict(model.state_dict()), state(checkpoint(tmp_path))["model_state"])
    # And so it does where there is nothing left to train.
    cfg = tiny_config(tmp_path, ckpt_path_to_resume=str(checkpoint(tmp_path)))
    again = train_loop(TRAIN, VAL, cfg)
    assert same(dict(model.state_dict()), dict(again.state_dict()))


def test_an_error_leaves_no_empty_directories(tmp_path):
    (tmp_path / "there").mkdir()
    data = Data(as_dataset(TRAIN), as_dataset(VAL))
    cfg = tiny_config(tmp_path / "there" / "a" / "b", batch_size=1 << 40)
    with pytest.raises((MemoryError, RuntimeError)):
        train(data, cfg)
    assert listing(tmp_path) == {"there": None}


def test_the_progress_bar_is_for_terminals(tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    run_tiny(tmp_path / "bar", total_steps=30, eval_every=10)
    shown = terminal.getvalue()
    assert "step 30/30" in shown and "[VAL] step 000010" in shown and "[train] step" not in shown
    monkeypatch.undo()
    monkeypatch.setattr("fastlm.run.summary.matmul_ceiling", lambda *_: 1e12)
    run_tiny(tmp_path / "plain", total_steps=4, log_every=2)
    captured = capsys.readouterr()
    form = (
        r"\[train\] step [02]/4 \| avg_loss=\d\.\d{4} \| speed=[\d.]+ step/s \| "
        r"lr=\d\.\d\de[-+]\d\d \| [\d,]+ tok/s \| ETA \d+:\d\d"
    )
    lines = [line for line in captured.out.splitlines() if line.startswith("[train]")]
    assert len(lines) == 2 and all(re.fullmatch(form, line) for line in lines), lines
    assert captured.err == ""


def test_another_size_of_a_step_is_said(tmp_path, capsys):
    run_tiny(tmp_path, ckpt_every=4, batch_size=4)
    path = str(checkpoint(tmp_path, 4))
    run_tiny(tmp_path / "same", ckpt_path_to_resume=path, batch_size=2, grad_accum=2)
    assert "a step has" not in capsys.readouterr().out
    run_tiny(tmp_path / "other", ckpt_path_to_resume=path, batch_size=2)
    assert "[resume] a step has 64 tokens and had 128 (--tokens-per-step 128)" in (
        capsys.readouterr().out
    )
    run_tiny(tmp_path / "odd", ckpt_path_to_resume=path, batch_size=3)
    said = capsys.readouterr().out
    assert "a step has 96 tokens and had 128\n" in said  # of which no micro-batches of 96 make up
