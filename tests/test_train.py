"""Runs: what they write and when, that they can be repeated, and that nothing stops them for good.

"Equal" is bit for bit here, for weights, moments, random state and losses.
"""

import io
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import (
    commands,
    listing,
    losses,
    metrics,
    one_thread,
    same,
    state,
    tiny_config,
    tiny_flags,
    tokens,
    write_prepared,
    write_tokens,
)

from fastlm import (
    CheckpointError,
    ConfigError,
    OutputError,
    create_model_and_optimizer,
    evaluate_model_loss,
    load_checkpoint,
    set_seed,
    train_loop,
)
from fastlm.data.files import Data, as_dataset
from fastlm.data.loader import TrainLoader
from fastlm.loop import learning_rate
from fastlm.runlog import RunLog
from fastlm.step import TrainStep
from fastlm.train import _calibrated, train

TRAIN, VAL = tokens(4000), tokens(500, seed=1)


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def without_extras(monkeypatch):
    """In this process: no second of matmuls and no picture at the end of each run."""
    monkeypatch.setattr("fastlm.summary.matmul_ceiling", lambda *_: 1e12)
    monkeypatch.setattr("fastlm.plot.LivePlotter.save", lambda self, path: None)


def run(target_dir, train_data=TRAIN, **settings):
    """A tiny run in this process; returns its configuration."""
    cfg = tiny_config(target_dir, **settings)
    train_loop(train_data, VAL, cfg)
    return cfg


def checkpoint(target_dir, name="final") -> Path:
    return Path(target_dir) / "checkpoints" / f"checkpoint_{name}.pt"


# --- what is written, and when ---

CTIME = r"\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4}"
NUMBER = r"\d+\.\d{4}"
LINES = {
    "start": rf"=== Training started at {CTIME} ===",
    "step": rf"\[\d\d:\d\d:\d\d\] step (\d{{6}}) loss {NUMBER} lr \d\.\d\de[-+]\d\d "
    r"grad_norm \d+\.\d\d",
    "val": rf"\[VAL\] step (\d{{6}}) val_loss {NUMBER}",
    "checkpoint": r"\[CKPT\] Saved to .*checkpoint_(\w+)\.pt",
    "finish": rf"=== Training finished at {CTIME} ===",
}


def log_events(target_dir) -> list[tuple]:
    """The log as (kind, step or checkpoint's name); a line of another form is an error."""
    events = []
    for line in (Path(target_dir) / "logs" / "train.log").read_text("utf-8").splitlines():
        kinds = [(kind, re.fullmatch(form, line)) for kind, form in LINES.items()]
        ((kind, match),) = [(kind, match) for kind, match in kinds if match]
        groups = match.groups()
        events.append((kind, *(int(g) if kind in ("step", "val") else g for g in groups)))
    return events


def expected_events(total: int, log_every: int, eval_every: int, ckpt_every: int) -> list[tuple]:
    """The seeds' rules, their checkpoints named by the number of steps that they hold."""
    events = [("start",)]
    for step in range(total):
        last = step == total - 1
        if step % log_every == 0:
            events.append(("step", step))
        if last:
            events.append(("checkpoint", "final"))
        elif ckpt_every and (step + 1) % ckpt_every == 0:
            events.append(("checkpoint", str(step + 1)))
        if last or (eval_every and step % eval_every == 0 and step > 0):
            events.append(("val", step))
    return [*events, ("checkpoint", "model"), ("finish",)]


@pytest.mark.parametrize(
    "total, log_every, eval_every, ckpt_every",
    [(12, 1, 4, 5), (10, 3, 0, 0), (7, 50, 1, 1), (9, 2, 3, 3), (1, 1, 1, 1), (12, 5, 100, 12)],
)
def test_which_steps_are_logged_evaluated_and_saved(
    tmp_path, total, log_every, eval_every, ckpt_every
):
    run(
        tmp_path, total_steps=total, log_every=log_every, eval_every=eval_every,
        ckpt_every=ckpt_every,
    )  # fmt: skip
    expected = expected_events(total, log_every, eval_every, ckpt_every)
    assert log_events(tmp_path) == expected
    names = [name for kind, *rest in expected if kind == "checkpoint" for name in rest]
    files = [
        path.stem.removeprefix("checkpoint_") for path in checkpoint(tmp_path).parent.iterdir()
    ]
    assert sorted(files) == sorted(names)
    for name in names:
        payload = torch.load(checkpoint(tmp_path, name), weights_only=True)
        assert payload["iteration"] == (int(name) if name.isdigit() else total)
        assert all(
            n.startswith(("token_", "layers.", "ln_", "lm_")) for n in payload["model_state"]
        )
        assert ("optimizer_state" in payload) == (name != "model")
        for moments in payload.get("optimizer_state", {"state": {}})["state"].values():
            assert int(moments["step"]) == payload["iteration"]


def test_the_logged_numbers(tmp_path):
    cfg = run(tmp_path, total_steps=9, eval_every=4, log_every=1)
    rows = metrics(tmp_path, "train")
    lines = (tmp_path / "logs" / "train.log").read_text("utf-8").splitlines()
    assert [row["lr"] for row in rows] == [learning_rate(step, cfg) for step in range(9)]
    for row in rows:
        assert (
            f"step {row['step']:06d} loss {row['loss']:.4f} lr {row['lr']:.2e} "
            f"grad_norm {row['grad_norm']:.2f}"
        ) in "\n".join(lines)
    model, _, _ = create_model_and_optimizer(cfg)
    load_checkpoint(model, None, checkpoint(tmp_path))
    last = metrics(tmp_path, "val")[-1]
    assert last["step"] == 8
    assert last["val_loss"] == evaluate_model_loss(model, VAL, cfg, cfg.eval_batches)
    (start,) = metrics(tmp_path, "start")
    assert start["config"]["seed"] == cfg.seed and start["config"]["total_steps"] == 9


def test_the_first_loss_and_norm_are_those_of_a_plain_loop(tmp_path):
    """Before any update: the mean over the batch, and the gradients' norm before clipping."""
    cfg = run(tmp_path, total_steps=1, grad_clip_norm=1e-3)
    set_seed(cfg.seed)
    model, _, _ = create_model_and_optimizer(cfg)
    x, y = TrainLoader(TRAIN, cfg.batch_size, cfg.context_len, seed=cfg.seed).batch(0)
    loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    (row,) = metrics(tmp_path, "train")
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_the_average_is_over_the_steps_since_the_last_line(tmp_path):
    run(tmp_path / "all", total_steps=10, log_every=1)
    run(tmp_path / "some", total_steps=10, log_every=4)
    every = losses(tmp_path / "all")
    averages = {row["step"]: row["avg_loss"] for row in metrics(tmp_path / "some", "train")}
    assert averages.keys() == {0, 4, 8}
    assert averages[0] == pytest.approx(every[0])
    assert averages[4] == pytest.approx(np.mean([every[step] for step in range(1, 5)]), rel=1e-6)
    assert averages[8] == pytest.approx(np.mean([every[step] for step in range(5, 9)]), rel=1e-6)


def test_clipping_clips(tmp_path):
    """Clipped to far below epsilon, the gradients move nothing; the seeds' loop clipped nothing."""
    settings = dict(total_steps=5, warmup_iters=0, weight_decay=0.0)
    run(tmp_path / "clipped", grad_clip_norm=1e-13, **settings)
    run(tmp_path / "free", grad_clip_norm=0.0, **settings)
    set_seed(0)
    model, _, _ = create_model_and_optimizer(tiny_config(tmp_path))
    moved = {}
    for name in ("clipped", "free"):
        weights = state(checkpoint(tmp_path / name))["model_state"]
        moved[name] = max(
            float((weights[key] - value).abs().max()) for key, value in model.state_dict().items()
        )
    assert moved["clipped"] < 1e-5 < 1e-4 < moved["free"]


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    """Only the last one must be there."""
    from fastlm import loop

    real, fail = loop.save_checkpoint, {"4", "8"}

    def save(model, optimizer, iteration, out, **extra):
        if Path(out).stem.rsplit("_")[-1] in fail:
            raise OutputError(f"{out}: cannot be written (No space left on device)")
        real(model, optimizer, iteration, out, **extra)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    run(tmp_path / "full", ckpt_every=4)
    said = capsys.readouterr().out
    for name in fail:
        path = checkpoint(tmp_path / "full", name)
        assert re.search(rf"CKPT.*{re.escape(str(path))}.*No space left.*goes on", said)
    run(tmp_path / "plain")
    assert losses(tmp_path / "full") == losses(tmp_path / "plain")
    fail.add("final")
    with pytest.raises(OutputError, match="checkpoint_final"):
        run(tmp_path / "fuller")


# --- the same again ---


def test_a_seed_decides_the_run_and_nothing_else_does(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.rand(random.randrange(100))  # what the process drew before does not matter
        np.random.rand(3)
        run(tmp_path / name, seed=seed, dropout=0.1)
    assert same(state(checkpoint(tmp_path / "a")), state(checkpoint(tmp_path / "b")))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    a, c = losses(tmp_path / "a"), losses(tmp_path / "c")
    assert all(a[step] != c[step] for step in a)


def test_set_seed_seeds_every_generator():
    draws = []
    for seed in (7, 7, 8, 2**40 + 7):  # numpy takes 32 bits
        set_seed(seed)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2], strict=True))


def test_evaluating_does_not_change_the_training(tmp_path):
    run(tmp_path / "never", eval_every=0, dropout=0.2)
    run(tmp_path / "always", eval_every=1, eval_batches=5, dropout=0.2)
    assert len(metrics(tmp_path / "always", "val")) == 11
    assert losses(tmp_path / "never") == losses(tmp_path / "always")
    assert same(state(checkpoint(tmp_path / "never")), state(checkpoint(tmp_path / "always")))


def test_validation_reads_the_same_batches_every_time(tmp_path):
    """With a learning rate of almost nothing, all evaluations see the same model."""
    run(tmp_path, eval_every=1, lr_max=1e-30, lr_min=0.0, seed=1, weight_decay=0.0)
    assert len({row["val_loss"] for row in metrics(tmp_path, "val")}) == 1


def test_grad_accum_is_the_bigger_batch(tmp_path):
    run(tmp_path / "one", batch_size=8, lr_max=5e-3)
    run(tmp_path / "four", batch_size=2, grad_accum=4, lr_max=5e-3)
    a, b = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert [*a.values()] == pytest.approx([*b.values()], rel=1e-4)
    assert a[11] < a[0] - 0.1  # it learns, or equality would say little
    norms = [
        [row["grad_norm"] for row in metrics(tmp_path / name, "train")] for name in ("one", "four")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.02), ("float16", 0.01)])
def test_lower_precision_learns_the_same(tmp_path, dtype, tolerance):
    run(tmp_path / "full", total_steps=20)
    run(tmp_path / dtype, total_steps=20, dtype=dtype)
    a, b = losses(tmp_path / "full"), losses(tmp_path / dtype)
    assert [*a.values()] == pytest.approx([*b.values()], abs=tolerance)
    payload = torch.load(checkpoint(tmp_path / dtype), weights_only=True)
    assert all(tensor.dtype == torch.float32 for tensor in payload["model_state"].values())
    assert bool(payload["scaler"]) == (dtype == "float16")


def test_activation_checkpointing_changes_nothing(tmp_path):
    for name, recompute in (("kept", False), ("recomputed", True)):
        run(tmp_path / name, activation_checkpointing=recompute, dropout=0.2)
    assert same(state(checkpoint(tmp_path / "kept")), state(checkpoint(tmp_path / "recomputed")))


def test_weight_decay_is_for_matrices():
    for everything in (False, True):
        cfg = tiny_config("unused", weight_decay=0.3, weight_decay_all=everything)
        model, optimizer, start = create_model_and_optimizer(cfg)
        assert start == 0
        decay = {
            id(p): group["weight_decay"]
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert len(decay) == len(list(model.parameters()))
        for name, parameter in model.named_parameters():
            norm = "ln" in name
            assert parameter.dim() == (1 if norm else 2)
            assert decay[id(parameter)] == (0.0 if norm and not everything else 0.3), name


def test_the_model_and_optimizer_have_every_configured_size():
    cfg = tiny_config(
        "unused", d_ff=48, rope_theta=100.0, betas=(0.5, 0.6), eps=1e-5, tie_embeddings=True
    )
    model, optimizer, _ = create_model_and_optimizer(cfg)
    assert model.layers[0].ffn.w1.weight.shape == (48, 32) and len(model.layers) == 2
    assert model.rope_cos[1, 1] == pytest.approx(np.cos(100.0 ** (-2 / 16)))
    assert model.lm_head.weight is model.token_embeddings.weight
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.5, 0.6), 1e-5)


# --- warm-up and calibration ---


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_warm_up_and_calibration_change_nothing(dtype):
    cfg = tiny_config("unused", dropout=0.3, dtype=dtype, grad_accum=2)
    set_seed(0)
    model, optimizer, _ = create_model_and_optimizer(cfg)
    loader = TrainLoader(TRAIN, cfg.batch_size, cfg.context_len, seed=0, grad_accum=2)
    runner = TrainStep(model, optimizer, loader, cfg)

    def everything():
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        moments = optimizer.state_dict()["state"]
        return [weights, moments, torch.get_rng_state(), runner.scaler.state_dict()]

    before = everything()
    runner.warm_up()
    assert same(before, everything())
    assert runner.compile_seconds == 0
    seconds = runner.seconds_per_step(seconds=0.05)
    assert same(before, everything())
    assert 0 < seconds < 5
    assert model.training and all(p.grad is None for p in model.parameters())
    runner.run(0, 1e-3)
    with pytest.raises(RuntimeError, match="warm up before"):  # it could not give that back
        runner.warm_up()


def test_a_calibrated_run_is_the_run_of_that_many_steps(tmp_path, monkeypatch, capsys):
    measure = TrainStep.seconds_per_step
    monkeypatch.setattr(TrainStep, "seconds_per_step", lambda self: measure(self, seconds=0.05))
    run(tmp_path / "calibrated", train_minutes=1e-9, dropout=0.1)
    said = capsys.readouterr().out
    steps = int(re.search(r"\[calibrate\] .* --total-steps (\d+)\)", said)[1])
    assert steps == 10  # at least
    run(tmp_path / "counted", total_steps=steps, dropout=0.1)
    assert losses(tmp_path / "calibrated") == losses(tmp_path / "counted")
    a, b = (state(checkpoint(tmp_path / name)) for name in ("calibrated", "counted"))
    assert same(a, b)
    config = torch.load(checkpoint(tmp_path / "calibrated"), weights_only=True)["config"]
    assert (config["total_steps"], config["cosine_iters"], config["train_minutes"]) == (
        10,
        10,
        None,
    )


def test_the_calibration_fills_the_minutes():
    class Measured:
        def seconds_per_step(self):
            return 0.25

    cfg = tiny_config("unused", train_minutes=2.0)
    chosen = _calibrated(cfg, Measured())
    assert (chosen.total_steps, chosen.cosine_iters, chosen.train_minutes) == (480, 480, None)
    chosen = _calibrated(replace(cfg, cosine_iters=7), Measured())
    assert (chosen.total_steps, chosen.cosine_iters) == (480, 7)


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
    run(tmp_path / "straight", **settings)
    run(tmp_path / "half", ckpt_every=5, **settings)
    torch.rand(7)
    resumed = checkpoint(tmp_path / "half", 5)
    run(tmp_path / "rest", ckpt_path_to_resume=str(resumed), **settings)
    assert same(state(checkpoint(tmp_path / "rest")), state(checkpoint(tmp_path / "straight")))
    straight, rest = losses(tmp_path / "straight"), losses(tmp_path / "rest")
    assert rest == {step: straight[step] for step in range(5, 12)}
    if variant == "float16":  # the scaler's own state went along, and had changed by then
        assert torch.load(resumed, weights_only=True)["scaler"]["_growth_tracker"] == 5


def test_every_step_is_a_place_to_resume_from(tmp_path):
    run(tmp_path, total_steps=6, ckpt_every=1, dropout=0.1)
    final = state(checkpoint(tmp_path))
    for step in range(1, 6):
        name = f"from_{step}"
        path = str(checkpoint(tmp_path, step))
        run(tmp_path / name, total_steps=6, dropout=0.1, ckpt_path_to_resume=path)
        assert same(state(checkpoint(tmp_path / name)), final)


def test_other_programs_checkpoints_can_be_resumed(tmp_path):
    """nanoGPT's and the tutorial's keys, a wrapper's prefix, an optimizer of torch."""
    settings = dict(weight_decay_all=True, lr_max=1e-3)
    run(tmp_path / "ours", ckpt_every=5, **settings)
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
        run(tmp_path / f"rest{index}", ckpt_path_to_resume=str(path), **settings)
        a = state(checkpoint(tmp_path / "ours"))
        b = state(checkpoint(tmp_path / f"rest{index}"))
        for name in ("model_state", "optimizer_state", "iteration"):
            assert same(a[name], b[name]), name


def test_changed_settings_take_effect_on_resume(tmp_path):
    """Those of the optimizer too, whose state dict brings the old ones along."""
    run(tmp_path, ckpt_every=5)
    changed = dict(weight_decay=0.5, betas=(0.5, 0.6), eps=1e-5, lr_max=1e-2)
    path = str(checkpoint(tmp_path, 5))
    cfg = run(tmp_path / "changed", ckpt_path_to_resume=path, **changed)
    optimizer_state = state(checkpoint(tmp_path / "changed"))["optimizer_state"]
    decays = []
    for group in optimizer_state["param_groups"]:
        assert (tuple(group["betas"]), group["eps"]) == ((0.5, 0.6), 1e-5)
        decays.append(group["weight_decay"])
    assert decays == [0.5, 0.0]
    assert metrics(tmp_path / "changed", "train")[0]["lr"] == learning_rate(5, cfg)


def test_what_cannot_be_resumed(tmp_path):
    run(tmp_path, ckpt_every=5)
    before = listing(tmp_path)
    path = str(checkpoint(tmp_path, 5))
    with pytest.raises(CheckpointError, match="read other data"):
        run(tmp_path / "x", train_data=TRAIN[:-1], ckpt_path_to_resume=path)
    with pytest.raises(CheckpointError, match="optimizer state does not fit"):
        run(tmp_path / "x", ckpt_path_to_resume=path, weight_decay_all=True)
    with pytest.raises(CheckpointError, match="no optimizer state"):
        run(tmp_path / "x", ckpt_path_to_resume=str(checkpoint(tmp_path, "model")))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        run(tmp_path / "x", ckpt_path_to_resume=str(tmp_path / "nowhere.pt"))
    with pytest.raises(CheckpointError, match="another architecture"):
        run(tmp_path / "x", ckpt_path_to_resume=path, num_layers=3)
    # As many weights of the same shapes, and another function all the same.
    for settings in (dict(num_heads=4), dict(tie_embeddings=True)):
        for how in ("ckpt_path_to_resume", "init_from"):
            with pytest.raises(CheckpointError, match="architecture"):
                run(tmp_path / "x", **{how: path}, **settings)
    with pytest.raises(ConfigError, match="give one of them"):
        run(tmp_path / "x", ckpt_path_to_resume=path, init_from=path)
    assert listing(tmp_path) == before


def test_init_from_takes_the_weights_and_nothing_else(tmp_path, capsys):
    run(tmp_path / "first")
    path = str(checkpoint(tmp_path / "first", "model"))
    cfg = run(tmp_path / "second", init_from=path, seed=5, total_steps=3)
    assert f"[init] weights of {path}" in capsys.readouterr().out
    model, _, _ = create_model_and_optimizer(cfg)
    load_checkpoint(model, None, path)
    x, y = TrainLoader(TRAIN, cfg.batch_size, cfg.context_len, seed=5).batch(0)
    loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
    assert losses(tmp_path / "second")[0] == pytest.approx(loss.item(), rel=1e-6)
    final = state(checkpoint(tmp_path / "second"))
    assert final["iteration"] == 3
    assert {int(s["step"]) for s in final["optimizer_state"]["state"].values()} == {3}


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
        run(tmp_path / "stopped")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert "a checkpoint follows" in capfd.readouterr().err
    monkeypatch.setattr(RunLog, "train", log_train)
    path = str(checkpoint(tmp_path / "stopped", 5))
    run(tmp_path / "rest", ckpt_path_to_resume=path)
    run(tmp_path / "straight")
    assert same(state(checkpoint(tmp_path / "rest")), state(checkpoint(tmp_path / "straight")))


def test_ctrl_c_in_the_last_step_ends_the_run_as_usual(tmp_path, monkeypatch):
    log_train = RunLog.train

    def interrupted(self, step, **values):
        log_train(self, step, **values)
        if step == 11:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunLog, "train", interrupted)
    run(tmp_path)
    assert log_events(tmp_path)[-1] == ("finish",)
    assert checkpoint(tmp_path, "model").exists()


def test_train_loop_runs_outside_the_main_thread(tmp_path):
    thread = threading.Thread(target=run, args=(tmp_path / "thread",))
    thread.start()
    thread.join()
    run(tmp_path / "main")
    assert losses(tmp_path / "thread") == losses(tmp_path / "main")


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
    monkeypatch.setattr(sys, "stderr", terminal)
    run(tmp_path / "bar", total_steps=30, eval_every=10)
    bar, out = terminal.getvalue(), capsys.readouterr().out
    assert "30/30" in bar and re.search(r"loss=\d\.\d{4}, lr=\d\.\d\de-\d\d, [\d,]+ tok/s", bar)
    assert "[train] step" not in out and "[VAL] step 000010" in out
    monkeypatch.undo()
    monkeypatch.setattr("fastlm.summary.matmul_ceiling", lambda *_: 1e12)
    run(tmp_path / "plain", total_steps=4, log_every=2)
    captured = capsys.readouterr()
    form = (
        r"\[train\] step [02]/4 \| avg_loss=\d\.\d{4} \| speed=[\d.]+ step/s \| "
        r"lr=\d\.\d\de[-+]\d\d \| [\d,]+ tok/s \| ETA \d+:\d\d"
    )
    lines = [line for line in captured.out.splitlines() if line.startswith("[train]")]
    assert len(lines) == 2 and all(re.fullmatch(form, line) for line in lines), lines
    assert captured.err == ""


# --- the command ---

LONG = dict(total_steps=300, dropout=0.1, ckpt_every=20, log_every=1, eval_every=50)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """300 steps without an interruption."""
    directory = tmp_path_factory.mktemp("straight")
    write_tokens(directory)
    result = commands().run(tiny_flags(**LONG), directory)
    assert result.returncode == 0 and result.stderr == "", result.output
    return directory / "run"


@pytest.fixture
def here(tmp_path) -> Path:
    write_tokens(tmp_path)
    return tmp_path


def assert_equal_runs(target_dir: Path, expected: Path) -> None:
    assert same(state(checkpoint(target_dir)), state(checkpoint(expected)))
    assert losses(target_dir) == losses(expected)
    last = [metrics(directory, "summary")[-1] for directory in (target_dir, expected)]
    assert last[0]["val_loss"] == last[1]["val_loss"]
    weights = [checkpoint(directory, "model") for directory in (target_dir, expected)]
    assert same(*(torch.load(path, weights_only=True)["model_state"] for path in weights))


def test_the_files_of_a_run(straight):
    names = {path for path, content in listing(straight).items() if content is not None}
    numbered = {f"checkpoints/checkpoint_{n}.pt" for n in range(20, 300, 20)}
    assert names == numbered | {
        "checkpoints/checkpoint_final.pt",
        "checkpoints/checkpoint_model.pt",
        "logs/train.log",
        "logs/metrics.jsonl",
        "logs/train_loss_curve.png",
    }
    assert (straight / "logs" / "train_loss_curve.png").stat().st_size > 10_000
    rows = losses(straight)
    assert rows.keys() == set(range(300)) and rows[299] < rows[0] - 1
    assert log_events(straight) == expected_events(300, 1, 50, 20)
    config = torch.load(checkpoint(straight, "model"), weights_only=True)["config"]
    assert (config["d_model"], config["total_steps"], config["dropout"]) == (32, 300, 0.1)


def test_what_a_run_says(here):
    write_prepared(here / "prepared")
    settings = dict(data="prepared", val_data=None, vocab_size=None, target_dir=None, eval_every=5)
    result = commands().run(tiny_flags(**settings), here, ceiling=True)
    assert result.returncode == 0 and result.stderr == "", result.output
    out = result.stdout
    (target,) = (here / "runs").iterdir()
    assert re.fullmatch(r"demo-\d{8}-\d{6}", target.name)
    for form in (
        r"^\[run\] fastlm \S+, preset demo",
        r"^\[load_token_dataset\] Loaded \S+train_00000.bin, shape=\(\d+,\), dtype=uint16$",
        r"^\[run\] model: 0\.\d\d M parameters \(2 layers, d_model 32, 2 heads, vocabulary 270\)$",
        r"^\[run\] data: [\d,]+ training and \d+ validation tokens, fingerprint f{16}$",
        r"^\[run\] on cpu \(.*\), torch \S+, float32, not compiled",
        r"^\[run\] 12 steps of 128 tokens, seed 0, into runs.demo-",
        r"^\[train\] step 0/12 \| avg_loss=",
        r"^\[VAL\] step 000005 val_loss \d\.\d{4}$",
        r"^\[VAL\] step 000011 val_loss \d\.\d{4}$",
        r"^\[CKPT\] Saved to runs.demo-\S+checkpoint_final.pt$",
        r"^\[plotter\] Saved training curve to runs.demo-\S+train_loss_curve.png$",
        r"^\[summary\] training    12 steps, 1,536 tokens in [\d.]+ s: [\d,]+ tokens/s in steps, "
        r"[\d,]+ over the whole run$",
        r"^\[summary\] model FLOPs [\d.]+ M a token \(6 \* matmul weights \+ 6 \* layers \* "
        r"context_len \* d_model\)",
        r"^\[summary\] MFU         [\d.]+% of [\d.]+ TFLOP/s, the best of six matmul shapes",
        r"^\[summary\] peak memory \d+\.\d\d GiB of the process$",
        r"^\[summary\] validation  loss \d\.\d{4} nats/token, \d+\.\d{4} bits/byte, over all \d+ "
        r"targets$",
    ):
        assert re.search(form, out, re.MULTILINE), form
    assert re.findall(r"^\[sample (\d) of 5\]$", out, re.MULTILINE) == list("12345")
    (summary,) = metrics(target, "summary")
    assert summary["mfu"] == pytest.approx(
        summary["tokens_per_second"] * summary["flops_per_token"] / summary["matmul_ceiling_flops"],
        rel=1e-3,
    )
    assert summary["steps"] == 12 and summary["run_seconds"] > summary["step_seconds"] > 0


def test_validation_at_the_end_is_over_all_targets(straight):
    (summary,) = metrics(straight, "summary")
    write_tokens(straight.parent)
    argv = tiny_flags(eval_only=True, resume="run", target_dir=None, total_steps=None)
    before = listing(straight.parent)
    result = commands().run(argv, straight.parent)
    assert result.returncode == 0 and result.stderr == "", result.output
    assert f"[VAL] val_loss {summary['val_loss']:.4f} over all 499 targets" in result.stdout
    weights = checkpoint(straight, "model")
    result = commands().run(
        tiny_flags(eval_only=True, init_from=weights, target_dir="other"), straight.parent
    )
    assert f"[VAL] val_loss {summary['val_loss']:.4f} over" in result.stdout, result.output
    assert listing(straight.parent) == before  # and nothing was written


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_saves_and_stops(here, straight, name, code):
    command = commands().start(tiny_flags(**LONG), here)
    command.until(r"step 30/300")
    command.signal(getattr(signal, name))
    result = command.wait()
    assert result.returncode == code, result.output
    assert "Traceback" not in result.output and "a checkpoint follows" in result.stderr
    stopped = int(re.search(rf"stopped after (\d+) of 300 steps \({name}\)", result.stdout)[1])
    assert 30 < stopped < 300
    assert torch.load(checkpoint(here / "run", stopped), weights_only=True)["iteration"] == stopped
    assert log_events(here / "run")[-2:] == [("checkpoint", str(stopped)), ("finish",)]
    # It says how to go on; and so it does, at the right step.
    again = re.search(r"continue with: python -m fastlm\.train (.*)", result.stdout)[1]
    assert again == "--resume run"
    result = commands().run([*tiny_flags(**LONG), *again.split()], here)
    assert result.returncode == 0, result.output
    assert f"[resume] at step {stopped}" in result.stdout
    assert_equal_runs(here / "run", straight)


def test_ctrl_c_before_the_first_step_leaves_nothing(here):
    before = listing(here)
    argv = tiny_flags(total_steps=None, train_minutes=1, target_dir="runs/a/b")
    command = commands().start(argv, here)
    command.until(r"\[run\] as many steps as take 1 minutes")
    time.sleep(0.3)  # in the calibration, or the warm-up before it
    command.signal(signal.SIGINT)
    result = command.wait()
    assert result.returncode == 130 and result.stderr == "", result.output
    assert listing(here) == before


def test_a_second_ctrl_c_exits_at_once(here):
    command = commands().start(
        tiny_flags(total_steps=50, ckpt_every=2), here, call="training_runs:train_slowly_from_3"
    )
    command.until(r"step 2/50")
    time.sleep(0.1)  # step 3 takes a minute
    command.signal(signal.SIGINT)
    command.until("a checkpoint follows")
    begin = time.monotonic()
    command.signal(signal.SIGINT)
    result = command.wait()
    assert time.monotonic() - begin < 5
    assert result.returncode == 130 and "stopped at once" in result.stderr
    names = sorted(path.name for path in checkpoint(here / "run").parent.iterdir())
    assert names == ["checkpoint_2.pt"]


def test_a_run_in_pieces_of_max_minutes(here):
    """Each piece at least a step, whatever the limit."""
    settings = dict(total_steps=4, dropout=0.1)
    for steps in (1, 2, 3):
        extra = dict(max_minutes=1e-9, resume=None if steps == 1 else "run")
        result = commands().run(tiny_flags(**settings, **extra), here)
        assert result.returncode == 0, result.output
        assert f"stopped after {steps} of 4 steps (--max-minutes 1e-09)" in result.stdout
    result = commands().run(tiny_flags(**settings, resume="run"), here)
    assert "stopped" not in result.stdout and result.returncode == 0
    assert commands().run(tiny_flags(**settings, target_dir="straight"), here).returncode == 0
    assert_equal_runs(here / "run", here / "straight")


def test_kill_9_again_and_again(here, straight):
    """At random moments, those of saving among them: what comes out is the uninterrupted run."""
    rng = random.Random(5)
    kills, argv = 0, tiny_flags(**LONG)
    for _ in range(30):
        command = commands().start(argv, here)
        command.until(r"CKPT|complete", timeout=60)  # some progress each time
        time.sleep(rng.uniform(0, 0.1))
        command.signal(signal.SIGKILL)
        result = command.wait()
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL, result.output
        kills += 1
        argv = [*tiny_flags(**LONG), "--resume"]
    else:
        result = commands().run(argv, here)
    assert result.returncode == 0, result.output
    assert kills >= 3
    assert_equal_runs(here / "run", straight)


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(here):
    settings = dict(total_steps=12, ckpt_every=4, dropout=0.1)
    assert commands().run(tiny_flags(**settings), here).returncode == 0
    expected = state(checkpoint(here / "run"))
    for name in ("final", "8"):
        path = checkpoint(here / "run", name)
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 4
        times = path.stat().st_mtime_ns, path.stat().st_mtime_ns
        path.write_bytes(content)
        os.utime(path, ns=times)
    result = commands().run([*tiny_flags(**settings), "--resume"], here)
    assert result.returncode == 0, result.output
    for name in ("final", "8"):
        path = checkpoint(Path("run"), name)
        assert f"[resume] {path}: is damaged" in result.stdout
    assert "[resume] at step 4" in result.stdout
    assert same(state(checkpoint(here / "run")), expected)


def test_a_finished_run_says_so_and_can_go_on(here):
    argv = tiny_flags(total_steps=6, cosine_iters=12)
    assert commands().run(argv, here).returncode == 0
    before = listing(here)
    result = commands().run([*argv, "--resume"], here)
    assert result.returncode == 0 and listing(here) == before
    assert "the run is complete: 6 of 6 steps; --total-steps N continues" in result.stdout
    result = commands().run(["--resume", "run", "--device", "cpu", "--total-steps", "12"], here)
    assert result.returncode == 0, result.output
    assert "[resume] changed: total_steps: 6 -> 12" in result.stdout
    assert commands().run(tiny_flags(target_dir="straight"), here).returncode == 0
    assert_equal_runs(here / "run", here / "straight")


def test_a_run_killed_behind_its_last_step_gets_its_end(here):
    argv = tiny_flags(dropout=0.1)
    for target_dir in ("run", "straight"):
        assert commands().run([*argv, "--target-dir", target_dir], here).returncode == 0
    checkpoint(here / "run", "model").unlink()
    lines = (here / "run" / "logs" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (here / "run" / "logs" / "metrics.jsonl").write_text("".join(lines[:-1]))
    result = commands().run([*argv, "--resume"], here)
    assert result.returncode == 0 and "[resume] at step 12" in result.stdout, result.output
    assert "[train] step" not in result.stdout
    assert_equal_runs(here / "run", here / "straight")


def test_resuming_needs_no_settings(here):
    """The checkpoint has them all, data included."""
    settings = dict(total_steps=8, dropout=0.1, seed=3, log_every=2)
    stopped = commands().run(tiny_flags(**settings, max_minutes=1e-9), here)
    assert stopped.returncode == 0, stopped.output
    result = commands().run(["--resume", "run", "--device", "cpu"], here)
    assert result.returncode == 0 and "changed" not in result.stdout, result.output
    assert commands().run(tiny_flags(**settings, target_dir="straight"), here).returncode == 0
    assert_equal_runs(here / "run", here / "straight")


def test_an_old_run_is_not_overwritten_by_accident(here):
    argv = tiny_flags(total_steps=6, ckpt_every=2)
    assert commands().run(argv, here).returncode == 0
    (here / "run" / "checkpoints" / "notes.txt").write_text("mine")
    before = listing(here)
    result = commands().run(argv, here)
    assert result.returncode == 2 and listing(here) == before
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "--resume run" in result.stderr and "--overwrite" in result.stderr
    # A new run that cannot start leaves the old one.
    result = commands().run([*argv, "--overwrite", "--data", "nowhere.npy"], here)
    assert result.returncode == 2 and listing(here) == before
    result = commands().run([*argv, "--overwrite", "--batch-size", str(1 << 45)], here)
    assert result.returncode == 2 and listing(here) == before

    shorter = tiny_flags(total_steps=3, ckpt_every=1, overwrite=True)
    assert commands().run(shorter, here).returncode == 0
    names = sorted(path.name for path in checkpoint(here / "run").parent.iterdir())
    assert names == [
        *("checkpoint_1.pt", "checkpoint_2.pt", "checkpoint_final.pt", "checkpoint_model.pt"),
        "notes.txt",
    ]
    assert losses(here / "run").keys() == {0, 1, 2}
    assert log_events(here / "run") == expected_events(3, 1, 0, 1)


def test_two_runs_with_other_prefixes_share_a_directory(here):
    for prefix in ("a", "b"):
        extra = dict(ckpt_save_prefix=prefix, log_save_prefix=f"log_{prefix}", total_steps=2)
        result = commands().run(tiny_flags(**extra), here)
        assert result.returncode == 0, result.output
    for prefix in ("a", "b"):
        assert (here / "run" / "checkpoints" / f"{prefix}_final.pt").exists()
        assert (here / "run" / "logs" / f"log_{prefix}.log").exists()
        assert (here / "run" / "logs" / f"log_{prefix}_loss_curve.png").exists()


def test_compiled(here):
    """The real command, end to end: compile time apart, no recompilation, the eager results."""
    settings = dict(total_steps=20, eval_every=5, ckpt_every=10, grad_accum=2, num_layers=1)
    command = [sys.executable, "-m", "fastlm.train"]
    done = subprocess.run(
        [*command, *tiny_flags(**settings, compile=True)],
        cwd=here, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    seconds = float(re.search(r"\[compile\] done in ([\d.]+) s, not counted", done.stdout)[1])
    (summary,) = metrics(here / "run", "summary")
    assert seconds == pytest.approx(summary["compile_seconds"], abs=0.06)
    assert f"[summary] compilation {seconds:.1f} s" in done.stdout
    assert "0 recompilations during the run" in done.stdout and summary["recompiles"] == 0
    # 20 steps of a tiny model take no second; the compiler took many.
    assert summary["step_seconds"] < summary["compile_seconds"] < summary["run_seconds"]
    payload = torch.load(checkpoint(here / "run"), weights_only=True)
    assert not any("_orig_mod" in name for name in payload["model_state"])

    eager = commands().run(tiny_flags(**settings, target_dir="eager"), here)
    assert eager.returncode == 0, eager.output
    a, b = losses(here / "run"), losses(here / "eager")
    assert [*a.values()] == pytest.approx([*b.values()], rel=1e-3)
    a, b = (metrics(here / name, "summary")[0]["val_loss"] for name in ("run", "eager"))
    assert a == pytest.approx(b, rel=1e-3)
