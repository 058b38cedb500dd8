"""Runs: what they write and when, and that they can be repeated.

"Equal" is bit for bit here, for weights, moments, random state and losses.
"""

import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from in_process import (
    TRAIN,
    VAL,
    checkpoint,
    expected_events,
    log_events,
    run_tiny,
)
from training_runs import losses, metrics, same, state, tiny_config, tokens

from fastlm import (
    OutputError,
    create_model_and_optimizer,
    evaluate_model_loss,
    load_checkpoint,
    set_seed,
)
from fastlm.data.dataset import as_dataset
from fastlm.data.loader import TrainLoader
from fastlm.loop import learning_rate
from fastlm.model_loss import ModelLoss
from fastlm.parallel.world import ALONE
from fastlm.run import saver
from fastlm.run.signals import StopSignals
from fastlm.step import TrainStep
from fastlm.train import _calibrated

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")

# --- what is written, and when ---


@pytest.mark.parametrize(
    "total, log_every, eval_every, ckpt_every",
    [(12, 1, 4, 5), (10, 3, 0, 0), (7, 50, 1, 1), (9, 2, 3, 3), (1, 1, 1, 1), (12, 5, 100, 12)],
)
def test_which_steps_are_logged_evaluated_and_saved(
    tmp_path, total, log_every, eval_every, ckpt_every
):
    run_tiny(
        tmp_path, total_steps=total, log_every=log_every, eval_every=eval_every,
        ckpt_every=ckpt_every, sync_save=True,
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
    cfg = run_tiny(tmp_path, total_steps=9, eval_every=4, log_every=1)
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
    cfg = run_tiny(tmp_path, total_steps=1, grad_clip_norm=1e-3)
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
    run_tiny(tmp_path / "all", total_steps=10, log_every=1)
    run_tiny(tmp_path / "some", total_steps=10, log_every=4)
    every = losses(tmp_path / "all")
    averages = {row["step"]: row["avg_loss"] for row in metrics(tmp_path / "some", "train")}
    assert averages.keys() == {0, 4, 8}
    assert averages[0] == pytest.approx(every[0])
    assert averages[4] == pytest.approx(np.mean([every[step] for step in range(1, 5)]), rel=1e-6)
    assert averages[8] == pytest.approx(np.mean([every[step] for step in range(5, 9)]), rel=1e-6)


def test_steps_without_targets_have_no_loss(tmp_path):
    """As conversations of long prompts have them: no 0 in the average, nor for the guard."""
    data = as_dataset(tokens(4000))
    data.ignored = as_dataset((np.arange(4000) // 32 % 2).astype(np.uint8))  # 0: a target

    def train(name, **settings):
        settings |= dict(total_steps=16, batch_size=1, context_len=8)
        run_tiny(tmp_path / name, data, **settings)
        return metrics(tmp_path / name, "train"), state(checkpoint(tmp_path / name))

    every, final = train("all", log_every=1)
    some, again = train("some", log_every=5)
    found = [row["loss"] for row in every]
    assert 4 <= found.count(None) < 14 and min(loss for loss in found if loss) > 1
    assert found == [row["avg_loss"] for row in every] and same(final, again)
    for row, first in zip(some[1:], (1, 6, 11), strict=True):
        known = [loss for loss in found[first : first + 5] if loss]
        assert row["avg_loss"] == pytest.approx(np.mean(known), rel=1e-6)
    guard = torch.load(checkpoint(tmp_path / "all"), weights_only=True)["guard"]
    assert guard["ring"][found.count(None) - 16 :].isfinite().all()


def test_clipping_clips(tmp_path):
    """Clipped to far below epsilon, the gradients move nothing; the seeds' loop clipped nothing."""
    settings = dict(total_steps=5, warmup_iters=0, weight_decay=0.0)
    run_tiny(tmp_path / "clipped", grad_clip_norm=1e-13, **settings)
    run_tiny(tmp_path / "free", grad_clip_norm=0.0, **settings)
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
    """It says so when it happens, and at the end, unless newer ones have made it superfluous."""
    real, fail = saver.write_checkpoint, ["4", "8"]

    def write(payload, path, **options):
        if path.stem.rsplit("_")[-1] in fail:
            raise OutputError(f"{path}: cannot be written (No space left on device)")
        real(payload, path, **options)

    monkeypatch.setattr(saver, "write_checkpoint", write)
    run_tiny(tmp_path / "full", ckpt_every=4)
    said = capsys.readouterr().out
    assert re.search(r"^\[train\] missing: .*checkpoint_4\.pt .*checkpoint_8\.pt", said, re.M)
    for name in fail:
        path = checkpoint(tmp_path / "full", name)
        assert re.search(rf"CKPT.*{re.escape(str(path))}.*No space left.*goes on", said)
    run_tiny(tmp_path / "plain")
    assert losses(tmp_path / "full") == losses(tmp_path / "plain")
    assert same(state(checkpoint(tmp_path / "full")), state(checkpoint(tmp_path / "plain")))
    run_tiny(tmp_path / "few", ckpt_every=2, keep_last=1)  # 10 is there, and all there has to be
    fail[:] = ["final"]
    run_tiny(tmp_path / "fuller")
    (missing,) = re.findall(r"^\[train\] missing: (.*)", capsys.readouterr().out, re.M)
    assert re.search(r"checkpoint_final\.pt \(.*No space", missing) and "model" not in missing
    assert checkpoint(tmp_path / "fuller", "model").exists()


# --- the same again ---


def test_a_seed_decides_the_run_and_nothing_else_does(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.rand(random.randrange(100))  # what the process drew before does not matter
        np.random.rand(3)
        run_tiny(tmp_path / name, seed=seed, dropout=0.1)
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
    run_tiny(tmp_path / "never", eval_every=0, dropout=0.2)
    run_tiny(tmp_path / "always", eval_every=1, eval_batches=5, dropout=0.2)
    assert len(metrics(tmp_path / "always", "val")) == 11
    assert losses(tmp_path / "never") == losses(tmp_path / "always")
    assert same(state(checkpoint(tmp_path / "never")), state(checkpoint(tmp_path / "always")))


def test_validation_reads_the_same_batches_every_time(tmp_path):
    """With a learning rate of almost nothing, all evaluations see the same model."""
    run_tiny(tmp_path, eval_every=1, lr_max=1e-30, lr_min=0.0, seed=1, weight_decay=0.0)
    assert len({row["val_loss"] for row in metrics(tmp_path, "val")}) == 1


def test_the_last_evaluation_has_a_limit(tmp_path, capsys):
    run_tiny(tmp_path, final_eval_tokens=100)
    (summary,) = metrics(tmp_path, "summary")
    assert summary["val_targets"] == 83 and 0 < summary["val_loss"] < 5
    # Windows of 32, the last of them with the 19 targets that are left.
    extent = f"over 83 of {len(VAL) - 1} targets, evenly spread"
    assert re.search(rf"^\[summary\] validation  loss .* {extent}$", capsys.readouterr().out, re.M)


def test_grad_accum_is_the_bigger_batch(tmp_path):
    run_tiny(tmp_path / "one", batch_size=8, lr_max=5e-3)
    run_tiny(tmp_path / "four", batch_size=2, grad_accum=4, lr_max=5e-3)
    a, b = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert [*a.values()] == pytest.approx([*b.values()], rel=1e-4)
    assert a[11] < a[0] - 0.1  # it learns, or equality would say little
    norms = [
        [row["grad_norm"] for row in metrics(tmp_path / name, "train")] for name in ("one", "four")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.02), ("float16", 0.01)])
def test_lower_precision_learns_the_same(tmp_path, dtype, tolerance):
    run_tiny(tmp_path / "full", total_steps=20)
    run_tiny(tmp_path / dtype, total_steps=20, dtype=dtype)
    a, b = losses(tmp_path / "full"), losses(tmp_path / dtype)
    assert [*a.values()] == pytest.approx([*b.values()], abs=tolerance)
    payload = torch.load(checkpoint(tmp_path / dtype), weights_only=True)
    assert all(tensor.dtype == torch.float32 for tensor in payload["model_state"].values())
    assert bool(payload["scaler"]) == (dtype == "float16")


def step_of(dtype: str, tokens_in_step: int, **settings) -> TrainStep:
    """A step whose loss is divided as one of so many tokens would be, of which it takes 128.

    Its gradients are as small as theirs, in a fraction of the time.
    """
    cfg = tiny_config("unused", dtype=dtype, grad_clip_norm=0.0, **settings)
    set_seed(0)
    model, optimizer, _ = create_model_and_optimizer(cfg)
    loader = TrainLoader(TRAIN, cfg.batch_size, cfg.context_len, seed=0)
    runner = TrainStep(ModelLoss(model, loader.device, cfg), optimizer, loader, cfg)
    runner.wrapped = lambda x, y, targets: runner.loss(x, y, tokens_in_step)
    return runner


@pytest.mark.parametrize("tokens_in_step", [128, 65_536, 524_288])
def test_float16_gradients_do_not_underflow(tokens_in_step):
    """By norm within 0.5 % of float32's; torch's own autocast is 0.1 to 0.2 % off."""
    gradients = {}
    for dtype in ("float32", "float16"):
        runner = step_of(dtype, tokens_in_step)
        runner.optimizer.register_step_pre_hook(
            lambda optimizer, *_, dtype=dtype: gradients.update(
                {dtype: torch.cat([p.grad.flatten() for p in optimizer._params()])}
            )
        )
        runner.run(0, lr=0.0)
    error = gradients["float16"] - gradients["float32"]
    assert error.norm() < 0.005 * gradients["float32"].norm()


@pytest.mark.parametrize("steps", [40, pytest.param(300, marks=pytest.mark.exhaustive)])
def test_float16_losses_follow_float32s_in_large_steps(steps):
    """With gradients as small as those of 65,536 tokens, and 960 ids that never occur.

    To push those down takes the gradients 1 / 65,536 / 1,024, far below the least float16 number.
    """
    losses = []
    for dtype in ("float32", "float16"):
        runner = step_of(dtype, 65_536, vocab_size=1024)
        losses.append([float(runner.run(4 * step, 3e-3)) * 65_536 / 128 for step in range(steps)])
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert losses[0][-1] < losses[0][0] - 2


def test_activation_checkpointing_changes_nothing(tmp_path):
    for name, recompute in (("kept", False), ("recomputed", True)):
        run_tiny(tmp_path / name, activation_checkpointing=recompute, dropout=0.2)
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
    loader = TrainLoader(TRAIN, cfg.batch_size, cfg.context_len, seed=0)
    runner = TrainStep(ModelLoss(model, loader.device, cfg), optimizer, loader, cfg)

    def everything():
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        moments = optimizer.state_dict()["state"]
        return [weights, moments, runner.scaler.state_dict()]

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
    quick = lambda self, stop: measure(self, seconds=0.05)  # noqa: E731
    monkeypatch.setattr(TrainStep, "seconds_per_step", quick)
    run_tiny(tmp_path / "calibrated", train_minutes=1e-9, dropout=0.1)
    said = capsys.readouterr().out
    steps = int(re.search(r"\[calibrate\] .* --total-steps (\d+)\)", said)[1])
    assert steps == 10  # at least
    run_tiny(tmp_path / "counted", total_steps=steps, dropout=0.1)
    assert losses(tmp_path / "calibrated") == losses(tmp_path / "counted")
    a, b = (state(checkpoint(tmp_path / name)) for name in ("calibrated", "counted"))
    assert same(a, b)
    config = torch.load(checkpoint(tmp_path / "calibrated"), weights_only=True)["config"]
    assert (config["total_steps"], config["cosine_iters"], config["train_minutes"]) == (
        10,
        10,
        None,
    )


def test_the_calibration_fills_the_minutes(capsys):
    class Measured:
        tokens = 100

        def seconds_per_step(self, stop):
            return 0.25

    cfg = tiny_config("unused", train_minutes=2.0)
    chosen = _calibrated(cfg, Measured(), 2000, StopSignals(), ALONE)
    assert (chosen.total_steps, chosen.cosine_iters, chosen.train_minutes) == (480, 480, None)
    for own in (7, cfg.total_steps):
        chosen = _calibrated(replace(cfg, cosine_iters=own), Measured(), 2000, StopSignals(), ALONE)
        assert (chosen.total_steps, chosen.cosine_iters) == (480, own)
    assert "480 steps take about 2 minutes (" in capsys.readouterr().out
    # No more passes over the data than asked: 2,000 tokens are 20 steps.
    for epochs, steps in ((6.0, 120), (24.0, 480), (100.0, 480)):
        limited = replace(cfg, max_epochs=epochs)
        chosen = _calibrated(limited, Measured(), 2000, StopSignals(), ALONE)
        assert (chosen.total_steps, chosen.cosine_iters) == (steps, steps)
        assert ("passes over the data" in capsys.readouterr().out) == (steps < 480)
