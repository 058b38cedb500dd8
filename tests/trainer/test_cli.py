"""The layers of the command line: default, preset, checkpoint, file, flag."""

import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from training_runs import TINY, same, tiny_config

from fastlm import CheckpointError, ConfigError, TrainingConfig, TransformerLM, save_checkpoint
from fastlm.presets import PRESETS
from fastlm.run.cli import format_config, parse
from fastlm.train import main


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory, and a machine without a GPU whatever it has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastlm.run.cli._default_preset", lambda device: "demo")


def write_toml(*lines: str, name: str = "settings.toml") -> str:
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def write_checkpoint(path="run/checkpoints/checkpoint_3.pt", iteration=3, **settings) -> Path:
    """What the trainer would have left there."""
    cfg = tiny_config("run", **settings)
    torch.manual_seed(0)
    model = TransformerLM(
        cfg.vocab_size, cfg.d_model, cfg.num_heads, cfg.num_layers, cfg.context_len, cfg.d_ff
    )
    save_checkpoint(model, None, iteration, path, config=asdict(cfg))
    return Path(path)


def parsed(*argv: str):
    invocation = parse(list(argv))
    return invocation.config, invocation.origins


# --- layers ---


def test_each_layer_overrides_the_one_before():
    write_checkpoint(d_model=64, batch_size=5, log_every=6, seed=7, eval_batches=8, total_steps=90)
    toml = write_toml("log_every = 16", "seed = 17", "eval-batches = 18")
    cfg, origins = parsed(
        *("--preset", "notebook", "--resume", "run", "--config", toml),
        *("--seed", "27", "--eval_batches", "28"),
    )
    assert (cfg.rope_theta, origins["rope_theta"]) == (10000.0, "checkpoint")
    assert (cfg.d_model, origins["d_model"]) == (64, "checkpoint")
    assert (cfg.batch_size, origins["batch_size"]) == (5, "checkpoint")
    assert (cfg.total_steps, origins["total_steps"]) == (90, "checkpoint")
    assert (cfg.log_every, origins["log_every"]) == (16, f"file {toml}")
    assert (cfg.seed, origins["seed"]) == (27, "command line")
    assert (cfg.eval_batches, origins["eval_batches"]) == (28, "command line")

    cfg, origins = parsed("--preset", "notebook")
    assert (cfg.d_model, origins["d_model"]) == (512, "preset notebook")
    assert (cfg.eps, origins["eps"]) == (1e-8, "default")
    assert (cfg.seed, origins["seed"]) == (0, "default")


def test_the_preset_of_a_file_and_of_the_command_line():
    toml = write_toml('preset = "notebook"', "num_layers = 3")
    invocation = parse(["--config", toml])
    assert (invocation.preset, invocation.config.num_layers) == ("notebook", 3)
    assert invocation.config.d_model == PRESETS["notebook"]["d_model"]
    invocation = parse(["--config", toml, "--preset", "gpt2-124m"])
    assert (invocation.preset, invocation.config.num_layers) == ("gpt2-124m", 3)
    assert parse([]).preset == "demo"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_parses_to_its_values(preset):
    cfg, origins = parsed("--preset", preset)
    for name, value in PRESETS[preset].items():
        assert getattr(cfg, name) == value, name
        assert origins[name].startswith(f"preset {preset}"), name


@pytest.mark.parametrize(
    "argv",
    [
        ["--batch-size", "3", "--target-dir", "here", "--tie-embeddings", "--betas", "0.8", "0.9"],
        ["--batch_size", "3", "--target_dir", "here", "--tie_embeddings", "--betas", "0.8", "0.9"],
        ["--batch-size=3", "--target-dir=here", "--tie-embeddings", "--betas", "0.8", "0.9"],
        ["--config", "settings.toml", "--batch-size", "3", "--tie-embeddings"],
    ],
)
def test_spellings(argv):
    write_toml("batch-size = 4", 'target_dir = "here"', "betas = [0.8, 0.9]", "lr_max = 1")
    cfg, origins = parsed(*argv)
    assert (cfg.batch_size, cfg.target_dir) == (3, "here")
    assert cfg.tie_embeddings is True and cfg.betas == (0.8, 0.9)
    assert origins["batch_size"] == origins["tie_embeddings"] == "command line"
    assert cfg.ckpt_dir == os.path.join("here", "checkpoints")


def test_flags_can_switch_off_what_a_file_switched_on():
    toml = write_toml("compile = true", "tie_embeddings = true")
    cfg, origins = parsed("--config", toml, "--no-compile")
    assert (cfg.compile, origins["compile"]) == (False, "command line")
    assert (cfg.tie_embeddings, origins["tie_embeddings"]) == (True, f"file {toml}")


def test_several_data_files():
    cfg, _ = parsed("--data", "a.bin", "b.bin", "--val-data", "c.bin", "--seed", "1")
    assert (cfg.data, cfg.val_data, cfg.seed) == (("a.bin", "b.bin"), ("c.bin",), 1)


def test_settings_are_checked_together_and_not_layer_by_layer():
    """Each of these alone does not fit the preset's d_model = 128, or its lr_max = 1.25e-2."""
    toml = write_toml("num_heads = 6", "lr_min = 0.015")
    cfg, _ = parsed("--config", toml, "--d-model", "384", "--lr-max", "0.02")
    assert (cfg.num_heads, cfg.d_model, cfg.lr_min, cfg.lr_max) == (6, 384, 0.015, 0.02)
    with pytest.raises(ConfigError, match=r"lr_min=0\.02: it must not be above lr_max=0\.0125"):
        parse(["--config", write_toml("lr_min = 0.02")])


# --- settings that follow others ---


def test_d_ff_follows_d_model_unless_it_is_set():
    cfg, origins = parsed("--d-model", "128")
    assert (cfg.d_ff, origins["d_ff"]) == (TrainingConfig.cal_d_ff(128), "follows d_model")
    cfg, origins = parsed("--d-model", "128", "--d-ff", "100")
    assert (cfg.d_ff, origins["d_ff"]) == (100, "command line")
    cfg, origins = parsed("--config", write_toml("d_ff = 200", "d_model = 64"))
    assert (cfg.d_ff, origins["d_ff"]) == (200, "file settings.toml")


def test_cosine_iters_follows_total_steps_unless_it_is_set():
    cfg, origins = parsed("--total-steps", "77")
    assert (cfg.cosine_iters, origins["cosine_iters"]) == (77, "follows total_steps")
    cfg, _ = parsed("--preset", "notebook")
    assert cfg.cosine_iters == cfg.total_steps == 1000
    cfg, origins = parsed("--total-steps", "77", "--cosine-iters", "50")
    assert (cfg.cosine_iters, origins["cosine_iters"]) == (50, "command line")
    cfg, _ = parsed("--config", write_toml("cosine_iters = 9"), "--total-steps", "77")
    assert cfg.cosine_iters == 9
    for argv, steps in ((["--cosine-iters", "10000"], 10_000), ([], None)):
        assert parsed("--train-minutes", "2", *argv)[0].cosine_iters == steps


def test_a_resumed_run_keeps_its_schedule_unless_it_is_told_to_end_elsewhere():
    write_checkpoint(total_steps=100, cosine_iters=60)
    cfg, _ = parsed("--resume", "run")
    assert (cfg.total_steps, cfg.cosine_iters) == (100, 60)
    cfg, _ = parsed("--resume", "run", "--total-steps", "200")
    assert (cfg.total_steps, cfg.cosine_iters) == (200, 200)


def test_a_number_of_steps_switches_the_calibration_off():
    assert parsed()[0].train_minutes == PRESETS["demo"]["train_minutes"]
    cfg, origins = parsed("--total-steps", "50")
    assert (cfg.train_minutes, origins["train_minutes"]) == (None, "total_steps is set")
    assert parsed("--config", write_toml("total_steps = 50"))[0].train_minutes is None
    # A flag beats a file, whichever of the two it sets.
    cfg, _ = parsed("--config", write_toml("train_minutes = 2.0"), "--total-steps", "50")
    assert (cfg.total_steps, cfg.train_minutes) == (50, None)
    cfg, _ = parsed("--config", write_toml("total_steps = 50"), "--train-minutes", "2")
    assert cfg.train_minutes == 2.0
    # "Without effect if total_steps is set", says --help.
    for argv in (
        ["--total-steps", "50", "--train-minutes", "2"],
        ["--config", write_toml("total_steps = 50", "train_minutes = 2.0")],
    ):
        assert parsed(*argv)[0].train_minutes is None


def test_a_resumed_run_is_not_calibrated_anew():
    write_checkpoint(total_steps=100)
    assert parsed("--resume", "run")[0].train_minutes is None
    # Not by the file it was started with either.
    toml = write_toml("train_minutes = 2.0")
    cfg, _ = parsed("--resume", "run", "--config", toml)
    assert (cfg.total_steps, cfg.train_minutes) == (100, None)
    with pytest.raises(ConfigError, match="--total-steps N"):
        parse(["--resume", "run", "--train-minutes", "2"])


def test_where_a_run_goes():
    cfg, origins = parsed()
    assert re.fullmatch(r"runs.demo-\d{8}-\d{6}", cfg.target_dir)
    assert origins["target_dir"] == "time"
    assert cfg.ckpt_dir == os.path.join(cfg.target_dir, "checkpoints")
    cfg, _ = parsed("--target-dir", "here", "--log-dir", "there")
    assert (cfg.ckpt_dir, cfg.log_dir) == (os.path.join("here", "checkpoints"), "there")
    assert not any(Path().iterdir())  # parsing makes nothing


# --- resume ---


def test_resume_finds_the_checkpoint(capsys):
    older = write_checkpoint("runs/a/checkpoints/checkpoint_1.pt", 1)
    newer = write_checkpoint("runs/a/checkpoints/checkpoint_2.pt", 2)
    newest = write_checkpoint("runs/b/checkpoints/checkpoint_1.pt", 1)
    for number, path in enumerate((older, newer, newest)):
        os.utime(path, ns=(0, number * 10**9))

    def resumed(*argv):
        cfg, _ = parsed(*argv)
        return Path(cfg.ckpt_path_to_resume), Path(cfg.target_dir)

    in_a, in_b = Path("runs/a"), Path("runs/b")
    assert resumed("--resume") == (newest, in_b)  # the newest of the newest run
    assert resumed("--seed", "0", "--resume") == (newest, in_b)
    assert resumed("--resume", "--seed", "0") == (newest, in_b)
    assert resumed("--resume", "runs/a") == (newer, in_a)
    assert resumed("--resume", "runs/a/checkpoints") == (newer, in_a)
    assert resumed("--resume", "--target-dir", "runs/a") == (newer, in_a)
    assert resumed("--target-dir", "runs/a", "--resume") == (newer, in_a)
    assert resumed("--resume", str(older)) == (older, in_a)
    assert resumed(f"--resume={older}") == (older, in_a)
    assert resumed("--ckpt-path-to-resume", str(older)) == (older, in_a)
    assert resumed("--ckpt_path_to_resume", str(older)) == (older, in_a)
    assert resumed("--resume", str(older), "--target-dir", "c") == (older, Path("c"))
    assert resumed("--config", write_toml(f'ckpt_path_to_resume = "{older}"')) == (older, in_a)


def test_resume_passes_over_a_damaged_checkpoint(capsys):
    older = write_checkpoint("run/checkpoints/checkpoint_1.pt", 1)
    newer = write_checkpoint("run/checkpoints/checkpoint_2.pt", 2)
    newer.write_bytes(newer.read_bytes()[:-1])
    os.utime(older, ns=(0, 0))
    cfg, _ = parsed("--resume", "run")
    assert Path(cfg.ckpt_path_to_resume) == older
    assert "checkpoint_2.pt" in capsys.readouterr().out
    # The one that is named is the one that is wanted.
    with pytest.raises(CheckpointError, match=r"checkpoint_2\.pt"):
        parse(["--resume", str(newer)])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--resume"], "no run under runs/ has a checkpoint"),
        (["--resume", "nowhere"], "--resume nowhere: no such checkpoint or directory"),
        (["--resume", "--target-dir", "empty"], "empty.checkpoints: holds no readable checkpoint"),
        (["--resume", "empty"], "empty: holds no readable checkpoint"),
    ],
)
def test_nothing_to_resume(argv, message):
    Path("empty").mkdir()
    with pytest.raises(CheckpointError, match=message):
        parse(argv)


def test_what_a_checkpoint_does_not_bring_back():
    """The invocation's own settings; and where it is resumed from is no setting that changed."""
    write_checkpoint(max_minutes=5.0, overwrite=True, eval_only=False, init_from="x", seed=4)
    invocation = parse(["--resume", "run"])
    cfg = invocation.config
    assert (cfg.max_minutes, cfg.overwrite, cfg.init_from, cfg.seed) == (None, False, None, 4)
    assert invocation.changed == []


def test_changed_settings_are_reported():
    write_checkpoint(seed=4, batch_size=4, total_steps=12)
    argv = ["--resume", "run", "--seed", "5", "--batch-size", "4", "--total-steps", "20"]
    assert parse(argv).changed == [
        "cosine_iters: 12 -> 20",
        "seed: 4 -> 5",
        "total_steps: 12 -> 20",
    ]
    toml = write_toml("weight_decay = 0.0")
    assert parse(["--resume", "run", "--config", toml]).changed == ["weight_decay: 0.1 -> 0.0"]


def test_another_programs_checkpoint_brings_no_settings():
    torch.save({"model": {}, "iter_num": 5, "config": None}, "nanogpt.pt")
    cfg, _ = parsed("--resume", "nanogpt.pt")
    assert cfg.d_model == PRESETS["demo"]["d_model"]


# --- --print-config ---


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--preset", "notebook"],
        ["--preset", "gpt2-124m", "--vocab-size", "60000"],
        ["--total-steps", "33", "--betas", "0.5", "0.6", "--no-compile", "--lr-max", "1"],
        ["--target-dir", 'a "quoted\\" dir', "--data", "ä b.bin", "c\td\n.bin"],
        ["--cosine-iters", "5", "--d-ff", "77", "--train-minutes", "2.5"],
        ["--eps", "1e-12", "--rope-theta", "500000", "--schedule", "wsd", "--dtype", "bfloat16"],
        ["--resume", "run"],
        ["--resume", "run", "--seed", "9"],
    ],
)
def test_a_printed_configuration_is_toml_that_gives_it_again(argv, capsys):
    write_checkpoint(seed=4, total_steps=40)
    assert main([*argv, "--print-config"]) == 0
    printed = capsys.readouterr().out
    Path("printed.toml").write_text(printed, encoding="utf-8")
    first = parse(argv)
    again = parse(["--config", "printed.toml"])
    for name, value in asdict(first.config).items():
        if not first.origins[name].startswith("time") and "target_dir" not in first.origins[name]:
            assert same(getattr(again.config, name), value), name
    assert again.preset == first.preset


def test_a_printed_configuration_can_be_changed_by_flags(capsys):
    """What follows from something else still follows."""
    assert main(["--print-config"]) == 0
    Path("printed.toml").write_text(capsys.readouterr().out, encoding="utf-8")
    cfg, _ = parsed("--config", "printed.toml", "--total-steps", "50", "--d-model", "64")
    assert (cfg.total_steps, cfg.cosine_iters, cfg.train_minutes) == (50, 50, None)
    assert cfg.d_ff == TrainingConfig.cal_d_ff(64)


def test_a_printed_configuration_names_every_setting_and_its_origin(capsys):
    toml = write_toml("log_every = 3")
    assert main(["--config", toml, "--seed", "5", "--print-config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    setting = re.compile(r"(?:# )?(\w+) (?:= |is not set)")
    names = [setting.match(line)[1] for line in lines]
    assert names == ["preset", *asdict(TrainingConfig())]
    ends = {name: line.rsplit("# ", 1)[-1] for name, line in zip(names, lines, strict=True)}
    assert ends["log_every"] == f"file {toml}"
    assert ends["seed"] == "command line"
    assert ends["d_model"] == "preset demo"
    assert ends["d_ff"] == "follows d_model"
    assert ends["eps"] == "default"
    assert not any(Path().glob("runs*"))


# --- mistakes ---


@pytest.mark.parametrize(
    "line, message",
    [
        ("batchsize = 3", "settings.toml: 'batchsize' is no setting; did you mean 'batch_size'?"),
        ("lr-maxx = 1e-3", "'lr-maxx' is no setting; did you mean 'lr_max'?"),
        ("zzz = 1", "'zzz' is no setting; known: "),
        ("resume = true", "'resume' is no setting"),
        ('batch_size = "8"', "batch_size = '8': it must be int"),
        ("batch_size = 8.0", "batch_size = 8.0: it must be int"),
        ("batch_size = true", "batch_size = True: it must be int"),
        ("compile = 1", "compile = 1: it must be bool"),
        ("lr_max = true", "lr_max = True: it must be float"),
        ('lr_max = "1e-3"', "lr_max = '1e-3': it must be float"),
        ("target_dir = 5", "target_dir = 5: it must be str"),
        ("max_minutes = false", "max_minutes = False: it must be float"),
        ("betas = [0.9]", r"betas = [0.9]: it must be tuple[float, float]"),
        ("betas = [0.9, true]", "betas = True: it must be float"),
        ('data = "a.bin"', "data = 'a.bin': it must be tuple[str, ...]"),
        ('schedule = "linear"', "schedule = 'linear': it must be one of 'cosine', 'wsd'"),
        ('data_dtype = "int8"', "data_dtype = 'int8': it must be one of 'uint8', 'uint16'"),
        ("batch_size = -1", "batch_size=-1: it must be positive"),
        ("batch_size = ", "settings.toml: is no TOML"),
        ('preset = "dem"', "preset='dem' is unknown; did you mean 'demo'?"),
    ],
)
def test_mistakes_in_a_file(line, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        parse(["--config", write_toml(line)])
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read():
    with pytest.raises(ConfigError, match=r"--config nowhere\.toml: cannot be read"):
        parse(["--config", "nowhere.toml"])
    with pytest.raises(ConfigError, match=r"--config \.: cannot be read"):
        parse(["--config", "."])
    Path("bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"bytes\.toml: is no TOML"):
        parse(["--config", "bytes.toml"])


def test_every_kind_of_setting_in_a_file():
    lines = ['data_dtype = "uint32"', 'data = ["a", "b"]', "betas = [0.5, 0.6]", "compile = true"]
    cfg, _ = parsed("--config", write_toml(*lines, 'dtype = "float16"', "d_ff = 3"))
    assert (cfg.data_dtype, cfg.data, cfg.betas) == ("uint32", ("a", "b"), (0.5, 0.6))
    assert (cfg.compile, cfg.dtype, cfg.d_ff) == (True, "float16", 3)


def test_integers_are_floats_where_a_float_is_wanted():
    cfg, _ = parsed("--config", write_toml("max_minutes = 3", "betas = [0, 0]", "lr_max = 1"))
    assert (cfg.max_minutes, cfg.betas, cfg.lr_max) == (3.0, (0.0, 0.0), 1.0)
    assert isinstance(cfg.max_minutes, float) and isinstance(cfg.lr_max, float)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--bach-size", "3"], "--batch-size"),
        (["--total-stps=3"], "--total-steps"),
        (["--total-steps", "x"], "total-steps"),
        (["--dtype", "fp8"], "bfloat16"),
        (["--preset"], "preset"),
        (["--seed"], "seed"),
    ],
)
def test_mistaken_flags_exit_with_2_and_name_the_nearest(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--preset", "gpt2"], "preset='gpt2' is unknown; did you mean 'gpt2-124m'?"),
        (["--preset", "x"], "preset='x' is unknown; known: demo, demo-gpu, notebook, gpt2-124m"),
        (["--max-epochs", "2", "--total-steps", "5"], "--max-epochs limits what --train-minutes"),
        (["--num-heads", "3"], "d_model=128 is not divisible by num_heads=3"),
        (["--batch-size", "0"], "batch_size=0: it must be positive"),
    ],
)
def test_impossible_settings_are_config_errors(argv, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(argv)


def test_help_lists_every_setting_with_its_text(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name in asdict(TrainingConfig()):
        assert f"--{name.replace('_', '-')}" in shown, name
    for more in ("--preset", "--config", "--resume", "--print-config", *PRESETS):
        assert more in shown, more
    assert "Micro-batches of each process in a step." in shown
    # With --resume too, which must not look for a checkpoint first.
    with pytest.raises(SystemExit) as caught:
        parse(["--resume", "--help"])
    assert caught.value.code == 0


def test_format_config_of_a_python_config_is_complete():
    invocation = parse(["--preset", "demo", "--vocab-size", str(TINY["vocab_size"])])
    assert len(format_config(invocation).splitlines()) == 1 + len(asdict(invocation.config))
