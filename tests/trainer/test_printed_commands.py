"""The commands that a run prints work as they stand, in directories of any name."""

import os
import re
import shlex
from pathlib import Path

import torch
from command_server import commands
from in_process import checkpoint, run_tiny
from training_runs import tiny_flags, write_prepared, write_tokens

from fastlm import TrainingConfig
from fastlm.run.commands import generate_command, resume_command


def arguments(printed: str, program: str) -> list[str]:
    """What a shell hands to the program."""
    words = shlex.split(printed)
    assert words[:3] == ["python", "-m", program]
    return words[3:]


def printed_by(result, before: str) -> str:
    assert result.returncode == 0 and result.stderr == "", result.output
    return re.search(rf"{before} +(python .*)", result.stdout)[1]


PLACES = dict(
    target_dir="-a 'run' $HOME",
    ckpt_dir="kept; here/c",
    log_dir="logs & more",
    ckpt_save_prefix="my model",
    log_save_prefix="my log",
)


def test_a_padded_vocabulary_stops_continues_and_generates(tmp_path):
    """270 ids in a vocabulary of 320; nothing but the printed lines from then on."""
    write_prepared(tmp_path / "my data")
    prepared = dict(data="my data", val_data=None, vocab_size=320, total_steps=3)
    flags = tiny_flags(**prepared, max_minutes=1e-9, target_dir=None)
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in PLACES.items()]
    result = commands().run(flags, tmp_path)
    again = printed_by(result, "continue with:")
    result = commands().run(arguments(again, "fastlm.train"), tmp_path)
    assert "[resume] at step 1" in result.stdout and "changed" not in result.stdout, result.output
    shown = printed_by(result, "try it")
    result = commands().run(
        arguments(shown, "fastlm.generate"), tmp_path, call="fastlm.generate:main"
    )
    assert result.returncode == 0, result.output
    cfg = TrainingConfig(**PLACES)
    final = tmp_path / cfg.ckpt_dir / f"{cfg.ckpt_save_prefix}_final.pt"
    assert torch.load(final, weights_only=True)["model_state"]["lm_head.weight"].shape[0] == 320
    assert (tmp_path / cfg.log_dir / f"{cfg.log_save_prefix}.log").exists()
    # Every file is where it was asked to be.
    tops = {Path(p).parts[0] for p in (cfg.target_dir, cfg.ckpt_dir, cfg.log_dir)}
    assert {path.name for path in tmp_path.iterdir()} == {"my data", *tops}


def test_a_run_without_a_tokenizer_says_how_to_sample(tmp_path):
    write_tokens(tmp_path)
    shown = printed_by(commands().run(tiny_flags(total_steps=1), tmp_path), "try it")
    argv = arguments(shown, "fastlm.generate")
    result = commands().run(argv, tmp_path, call="fastlm.generate:main")
    assert result.returncode == 0, result.output


def test_the_refusal_of_an_old_runs_directory_says_how_to_continue_it(tmp_path):
    write_tokens(tmp_path)
    argv = tiny_flags(target_dir="a b", max_minutes=1e-9)
    assert commands().run(argv, tmp_path).returncode == 0
    result = commands().run(argv, tmp_path)
    said = re.search(r"; (--resume .*) continues it", result.stderr)[1]
    result = commands().run(shlex.split(said), tmp_path)
    assert result.returncode == 0 and "[resume] at step 1" in result.stdout, result.output


def test_what_stands_in_a_command():
    cfg = TrainingConfig(target_dir="run")
    assert resume_command(cfg) == "python -m fastlm.train --resume run"
    cfg = TrainingConfig(target_dir="run", ckpt_dir="c d", device="cuda:1")
    assert resume_command(cfg) == (
        "python -m fastlm.train --resume --target-dir run --ckpt-dir 'c d' --device cuda:1"
    )
    assert generate_command(Path("a b.pt"), cfg, tokenizer=True) == (
        "python -m fastlm.generate --ckpt 'a b.pt' --prompt \"...\" --device cuda:1"
    )


def test_train_loop_says_what_its_caller_can_do(tmp_path, capsys, without_extras):
    run_tiny(tmp_path, max_minutes=1e-9)
    path = re.search(r"continue with: ckpt_path_to_resume='(.*)'", capsys.readouterr().out)[1]
    assert path == str(checkpoint(tmp_path, 1)) and os.path.exists(path)
    run_tiny(tmp_path, ckpt_path_to_resume=path)
    assert checkpoint(tmp_path).exists()


def test_file_names_that_are_not_utf8(tmp_path):
    write_tokens(tmp_path)
    name = os.fsdecode(b"caf\xe9")
    result = commands().run(tiny_flags(target_dir=name, total_steps=1), tmp_path)
    assert result.returncode == 0 and "into caf\udce9" in result.stdout, result.output
    assert checkpoint(tmp_path / name).exists()
    log = (tmp_path / name / "logs" / "train.log").read_bytes()
    assert b"Saved to caf\xe9/checkpoints" in log


def test_the_prefix_is_printed_where_there_are_others(tmp_path):
    from fastlm.run.commands import resume_command

    run_tiny(tmp_path, total_steps=2)
    cfg = run_tiny(tmp_path, total_steps=2, ckpt_save_prefix="b", log_save_prefix="b")
    assert "--ckpt-save-prefix b" in resume_command(cfg)
    cfg.ckpt_save_prefix = "checkpoint"
    assert "--ckpt-save-prefix checkpoint" in resume_command(cfg)
