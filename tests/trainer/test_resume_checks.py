"""What is compared and refused when a run is resumed, and what it may cost."""

import gc
import os
import weakref

import pytest
import torch
from checkpoints import make_model
from command_server import commands
from in_process import TRAIN, VAL, checkpoint, run_tiny
from training_runs import (
    listing,
    losses,
    metrics,
    same,
    state,
    tiny_config,
    tiny_flags,
    tokens,
    write_tokens,
)

from fastlm import CheckpointError, ConfigError, checkpoint_reading, train_loop
from fastlm.checkpoint import checkpoint_payload, read_checkpoint
from fastlm.loop import Run
from fastlm.run.cli import parse
from fastlm.run.environment import differences
from fastlm.run.resume import Resumed, find
from fastlm.step import TrainStep
from fastlm.train import main

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")


# --- data and order ---


@pytest.mark.parametrize(
    "settings, what",
    [
        (dict(seed=5), "seed 0 -> 5"),
        (dict(context_len=16), "context_len 32 -> 16"),
        (dict(train_data=tokens(3000)), "data '.*' -> '.*'"),
    ],
)
def test_another_position_in_the_data_is_refused_unless_it_is_allowed(
    tmp_path, capsys, settings, what
):
    run_tiny(tmp_path, total_steps=4)
    before = listing(tmp_path)
    path = str(checkpoint(tmp_path))
    with pytest.raises(CheckpointError, match=rf"{what}.*--allow-data-change.*--init-from"):
        run_tiny(tmp_path, ckpt_path_to_resume=path, **settings)
    assert listing(tmp_path) == before
    capsys.readouterr()
    run_tiny(
        tmp_path / "on", ckpt_path_to_resume=path, total_steps=6, allow_data_change=True, **settings
    )
    assert "[resume] --allow-data-change: " + what.split()[0] in capsys.readouterr().out
    payload = read_checkpoint(checkpoint(tmp_path / "on"))
    assert payload["samples_seen"] == 6 * 4
    if "context_len" in settings:  # a sample has fewer tokens from now on
        (summary,) = metrics(tmp_path / "on", "summary")
        rows = [row["tokens"] for row in metrics(tmp_path / "on", "train")]
        assert [*rows, summary["tokens"]] == [4 * 128 + 64, 4 * 128 + 128, 4 * 128 + 128]
    # The new data is the run's from now on.
    path = str(checkpoint(tmp_path / "on"))
    run_tiny(tmp_path / "on", ckpt_path_to_resume=path, total_steps=7, **settings)


def test_the_flag_of_an_allowed_change_is_not_stored(tmp_path):
    run_tiny(tmp_path, total_steps=1, allow_data_change=True)
    assert "allow_data_change" not in Resumed.read(checkpoint(tmp_path)).settings


# --- what bits depend on ---


def test_another_environment_is_listed_and_not_refused(tmp_path, capsys):
    run_tiny(tmp_path, ckpt_every=4)
    stored = read_checkpoint(checkpoint(tmp_path, 4))["environment"]
    names = "device dtype threads processes compile deterministic matmul_precision"
    assert list(stored) == [*names.split(), "torch", "numpy", "triton", "fastlm", "kernels"]
    assert (stored["dtype"], stored["threads"], stored["compile"]) == ("float32", 1, False)
    assert stored["device"].startswith("cpu (") and "threads" not in stored["device"]
    path = str(checkpoint(tmp_path, 4))
    run_tiny(tmp_path / "same", ckpt_path_to_resume=path)
    assert "differs" not in capsys.readouterr().out
    torch.set_num_threads(2)
    try:
        run_tiny(tmp_path / "other", ckpt_path_to_resume=path, dtype="bfloat16")
    finally:
        torch.set_num_threads(1)
    out = capsys.readouterr().out
    assert out.count("[resume] differs: ") == 2
    for line in ("dtype: 'float32' -> 'bfloat16'", "threads: 1 -> 2"):
        assert f"[resume] differs: {line}; the results may, in their last bits" in out


def test_environments_are_compared_where_both_know():
    assert differences({"torch": "1", "new": 5}, {"torch": "2", "numpy": "3"}) == [
        "torch: '1' -> '2'"
    ]
    assert differences(None, {"torch": "2"}) == differences([3], {"torch": "2"}) == []


def test_deterministic_holds_during_the_run_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    during = []
    train = Run.train

    def noting(self):
        during.append(torch.are_deterministic_algorithms_enabled())
        train(self)

    monkeypatch.setattr(Run, "train", noting)
    for wanted in (False, True):
        run_tiny(tmp_path / str(wanted), deterministic=wanted, dropout=0.1, total_steps=4)
        assert not torch.are_deterministic_algorithms_enabled()
    assert during == [False, True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert same(*(state(checkpoint(tmp_path / name)) for name in ("True", "False")))
    assert read_checkpoint(checkpoint(tmp_path / "True"))["environment"]["deterministic"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compiled_run_that_is_resumed_is_the_uninterrupted_one(tmp_path, dtype):
    """Each part in a process of its own, so that the resumed one compiles anew."""
    write_tokens(tmp_path)
    settings = dict(compile=True, dropout=0.1, grad_accum=2, dtype=dtype, num_layers=1)
    for place, extra in (
        ("straight", dict(ckpt_every=5)),
        ("rest", dict(resume="straight/checkpoints/checkpoint_5.pt")),
    ):
        argv = tiny_flags(**settings, target_dir=place, **extra)
        result = commands().run(argv, tmp_path, timeout=500)
        assert result.returncode == 0, result.output
    assert "differs" not in result.stdout
    assert same(*(state(checkpoint(tmp_path / name)) for name in ("rest", "straight")))
    straight = losses(tmp_path / "straight")
    assert losses(tmp_path / "rest") == {step: straight[step] for step in range(5, 12)}


def test_the_largest_seed(tmp_path):
    run_tiny(tmp_path, seed=2**64 - 1, total_steps=2, ckpt_every=1, dropout=0.1)
    path = str(checkpoint(tmp_path, 1))
    settings = dict(seed=2**64 - 1, total_steps=2, dropout=0.1)
    run_tiny(tmp_path / "on", ckpt_path_to_resume=path, **settings)
    assert same(*(state(checkpoint(place)) for place in (tmp_path, tmp_path / "on")))


# --- its length ---


@pytest.mark.parametrize("length", [{"train_minutes": 0.02}, {"total_steps": 20}], ids=str)
def test_a_run_that_is_shorter_than_its_warm_up_is_told(tmp_path, monkeypatch, capsys, length):
    monkeypatch.setattr(TrainStep, "seconds_per_step", lambda self, stop: 0.06)
    for warmup_iters, told in ((20, 1), (19, 0)):
        run_tiny(tmp_path / str(warmup_iters), warmup_iters=warmup_iters, **length)
        said = capsys.readouterr().out
        assert said.count("rises for 20 steps, and the run has 20: it does not reach") == told


def test_a_resumed_run_is_not_calibrated_again(tmp_path, monkeypatch):
    """On a busier machine it would become another run, shorter than what is done, even."""
    monkeypatch.setattr(TrainStep, "seconds_per_step", lambda self, stop: 0.06)
    settings = dict(train_minutes=0.02, total_steps=10_000, ckpt_every=15)
    run_tiny(tmp_path / "run", **settings)
    straight = state(checkpoint(tmp_path / "run"))
    assert straight["iteration"] == 20
    monkeypatch.setattr(TrainStep, "seconds_per_step", lambda self, stop: 0.12)
    path = str(checkpoint(tmp_path / "run", 15))
    run_tiny(tmp_path / "run", ckpt_path_to_resume=path, **settings)
    assert same(state(checkpoint(tmp_path / "run")), straight)
    # A checkpoint without settings does not tell its run's length.
    payload = torch.load(path, weights_only=True)
    del payload["config"], payload["data_fingerprint"]
    torch.save(payload, tmp_path / "run" / "foreign.pt")
    before, foreign = listing(tmp_path), str(tmp_path / "run" / "foreign.pt")
    with pytest.raises(ConfigError, match=r"foreign\.pt: .*train_minutes=0\.02 .*--total-steps N$"):
        run_tiny(tmp_path / "run", ckpt_path_to_resume=foreign, **settings)
    assert listing(tmp_path) == before


# --- memory and time ---


def test_a_checkpoint_is_read_once_and_freed(tmp_path, monkeypatch):
    write_tokens(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(tiny_flags(ckpt_every=4)) == 0
    reads, alive = [], []

    load = checkpoint_reading._loaded

    def reading(path, **options):
        payload = load(path, **options)
        reads.append([weakref.ref(t) for t in payload["model_state"].values()])
        # Moments may be taken over by the optimizer, which needs them; nothing else is.
        return payload

    def train(self):
        gc.collect()
        alive.append(sum(reference() is not None for reference in reads[0]))

    monkeypatch.setattr(checkpoint_reading, "_loaded", reading)
    monkeypatch.setattr(Run, "train", train)
    for argv in (["--resume", "run/checkpoints/checkpoint_4.pt"], ["--resume"]):
        reads.clear()
        assert main([*tiny_flags(), *argv]) == 0
        assert len(reads) == 1
    assert alive == [0, 0]


# --- eval_only ---


def test_train_loop_evaluates_only(tmp_path, capsys):
    cfg = run_tiny(tmp_path)
    before = listing(tmp_path)
    capsys.readouterr()
    for settings in (
        dict(ckpt_path_to_resume=str(checkpoint(tmp_path)), seed=9),  # no order is needed
        dict(init_from=str(checkpoint(tmp_path, "model"))),
    ):
        model = train_loop(TRAIN, VAL, tiny_config(tmp_path / "x", eval_only=True, **settings))
        assert same(dict(model.state_dict()), state(checkpoint(tmp_path))["model_state"])
        assert "[VAL] val_loss" in capsys.readouterr().out
    assert listing(tmp_path) == before
    with pytest.raises(ConfigError, match="--eval-only needs the checkpoint"):
        train_loop(TRAIN, VAL, tiny_config(tmp_path / "x", eval_only=True))
    assert cfg.total_steps == 12


def test_an_evaluation_alone_compiles_one_block(tmp_path, monkeypatch):
    """Of as many as the model has; all of it where that is asked for."""
    run_tiny(tmp_path, total_steps=1)
    blocks, graphs, compiled = [], [], torch.compile
    monkeypatch.setattr("fastlm.model_loss.check_compiler", lambda device: None)
    monkeypatch.setattr(
        "fastlm.model_loss.compile_blocks", lambda model, mode: blocks.append(model)
    )
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: graphs.append(f) or compiled(f, backend="eager")
    )
    settings = dict(ckpt_path_to_resume=str(checkpoint(tmp_path)), eval_only=True, compile=True)
    model = train_loop(TRAIN, VAL, tiny_config(tmp_path / "x", **settings))
    assert (blocks, graphs) == ([model], [])
    train_loop(TRAIN, VAL, tiny_config(tmp_path / "x", compile_scope="model", **settings))
    assert (len(blocks), len(graphs)) == (1, 1)


# --- what a checkpoint may hold ---


def write(path, **extra):
    torch.save({**checkpoint_payload(make_model(), None, 3), **extra}, path)
    return path


@pytest.mark.parametrize(
    "extra, message",
    [
        (dict(iteration="x"), "its iteration cannot be a run's"),
        (dict(iteration=-1), "its iteration cannot"),
        (dict(samples_seen=2**63), "its samples_seen cannot be a run's"),
        (dict(samples_seen=True), "its samples_seen cannot"),
        (dict(tokens_seen="x"), "its tokens_seen cannot be a run's"),
        (dict(run_id=5), "its run_id cannot"),
        (dict(config={"data": 5}), r"its setting data = 5: it must be tuple\[str, \.\.\.\]"),
        (dict(config={"betas": "x"}), "its setting betas = 'x': it must be tuple"),
        (dict(config={"seed": "0"}), "its setting seed = '0': it must be int"),
        (dict(config={"lr_max": True}), "its setting lr_max = True: it must be float"),
        (dict(config={"schedule": "x"}), "its setting schedule = 'x': it must be one of 'cosine'"),
        (dict(config={"batch_size": None}), "its setting batch_size = None: it must be int"),
    ],
)
def test_values_that_no_run_has_written(tmp_path, extra, message):
    path = write(tmp_path / "bad.pt", **extra)
    with pytest.raises(CheckpointError, match=message) as caught:
        find(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(seed=10**30), r"seed=10{30}: it must be below 2\^64"),
        (
            dict(ckpt_save_prefix="../../evil/x"),
            r"ckpt_save_prefix='\.\./.*/x': .* without /",
        ),
        (dict(log_save_prefix="/x"), "log_save_prefix='/x'"),
        (dict(data=("a\0b",)), "holds a character that no path can have"),
        (dict(num_layers=10**6), r"num_layers=1000000: it must be below 2\^14"),
    ],
)
def test_stored_settings_that_no_run_could_have(tmp_path, config, message):
    path = write(tmp_path / "bad.pt", config=config)
    with pytest.raises(ConfigError, match=message):
        parse(["--resume", str(path)])


def test_what_names_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in (["--resume", ""], ["--resume="], ["--ckpt-path-to-resume", ""]):
        with pytest.raises(ConfigError, match="--resume '' names nothing"):
            parse(argv)
    for name in ("init-from", "target-dir", "ckpt-dir", "log-dir"):
        with pytest.raises(ConfigError, match=rf"{name.replace('-', '_')}='': it must name a path"):
            parse([f"--{name}", ""])
    (tmp_path / "a.toml").write_text('ckpt_path_to_resume = ""')
    with pytest.raises(ConfigError, match="--resume '' names nothing"):
        parse(["--config", "a.toml"])
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(CheckpointError, match=r"--resume .*(cannot be read|no such)"):
            parse(["--resume", name])
    assert listing(tmp_path).keys() == {"a.toml"}


def test_stored_settings_that_flags_override(tmp_path):
    """They are shown, and may be what no run could have."""
    path = str(write(tmp_path / "bad.pt", config=dict(seed=10**600, batch_size=2**62)))
    invocation = parse(["--resume", path, "--seed", "1", "--batch-size", "2"])
    assert f"seed: 1{'0' * 99}… -> 1" in invocation.changed
    with pytest.raises(CheckpointError, match="its step and batch cannot be a run's"):
        invocation.resumed.position(invocation.config)


# --- a preset that has no effect ---


def test_a_preset_that_a_checkpoint_goes_before_is_said(tmp_path, monkeypatch, capsys):
    write_tokens(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(tiny_flags(max_minutes=1e-9)) == 0
    ignored = parse(["--resume", "run", "--preset", "notebook", "--lr-max", "6e-4"]).ignored
    assert {"batch_size", "d_model", "lr_min"} < set(ignored) and "lr_max" not in ignored
    assert parse(["--resume", "run"]).ignored == []  # asked for no preset
    assert parse(["--preset", "notebook"]).ignored == []
    capsys.readouterr()
    assert main(["--resume", "run", "--preset", "notebook", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    form = "[resume] --preset notebook: the checkpoint's settings go before its batch_size, "
    assert said.count(form) == 1


def test_tokens_per_step_and_grad_accum(tmp_path):
    with pytest.raises(ConfigError, match="give one of them"):
        parse(["--tokens-per-step", "4096", "--grad-accum", "2"])
    run_tiny(tmp_path, tokens_per_step=256, ckpt_every=4)
    resumed = parse(["--resume", str(tmp_path)]).config
    assert (resumed.tokens_per_step, resumed.grad_accum) == (256, 2)
    resumed = parse(["--resume", str(tmp_path), "--grad-accum", "3"]).config
    assert (resumed.tokens_per_step, resumed.grad_accum) == (None, 3)
