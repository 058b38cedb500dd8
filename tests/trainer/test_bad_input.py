"""Mistakes at the command line: a line that names the thing and the fix, exit code 2, no files."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from command_server import NOBODY, commands
from training_runs import (
    VOCAB_SIZE,
    listing,
    tiny_config,
    tiny_flags,
    tokens,
    write_prepared,
    write_tokens,
)

from fastlm import TransformerLM, save_checkpoint

# Another user must be able to read the code that runs.
READABLE = all(path.stat().st_mode & 0o5 == 0o5 for path in Path(__file__).resolve().parents)
root_only = pytest.mark.skipif(
    sys.platform == "win32" or os.getuid() != 0 or not READABLE,
    reason="only root can become another user, who must be able to read this checkout",
)


@pytest.fixture
def here(tmp_path) -> Path:
    """A directory with tokens that a tiny run can use."""
    tmp_path.chmod(0o755)
    write_tokens(tmp_path)
    return tmp_path


def assert_refused(here: Path, *patterns: str, argv: list[str] | None = None, **options) -> str:
    """Runs the command and returns its error line, which must match every pattern."""
    before = listing(here)
    settings = {name: options.pop(name) for name in list(options) if name in SETTINGS}
    argv = [*tiny_flags(**settings), *(argv or [])]
    result = commands().run(argv, here, **options)
    assert result.returncode == 2, result.output
    assert result.stderr.startswith("error: "), result.output
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n"), result.stderr
    for pattern in patterns:
        assert re.search(pattern, result.stderr), (pattern, result.stderr)
    after = listing(here)
    for files in (before, after):
        files.pop("prepared/.verified.json", None)  # which shards were read and found right
    assert after == before  # neither half-written files nor directories
    return result.stderr


SETTINGS = {*asdict(tiny_config("unused")), "preset", "config", "resume"}


def save(path: Path, **settings) -> Path:
    """A checkpoint as the trainer writes them, without an optimizer."""
    cfg = tiny_config("unused", **settings)
    model = TransformerLM(
        cfg.vocab_size, cfg.d_model, cfg.num_heads, cfg.num_layers, cfg.context_len, cfg.d_ff
    )
    save_checkpoint(model, None, 3, path, config=asdict(cfg))
    return path


def test_the_command_itself(here):
    """Once through the interpreter: the other tests call main() in a forked process."""
    before = listing(here)
    done = subprocess.run(
        [sys.executable, "-m", "fastlm.train", *tiny_flags(data="nowhere.bin")],
        cwd=here, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: nowhere.bin: no such token file\n"
    assert listing(here) == before
    assert commands().run(tiny_flags(), here).returncode == 0  # and nothing else is wrong here


# --- data ---


def test_missing_data(here):
    assert_refused(here, r"nowhere\.bin: no such token file", data="nowhere.bin")
    assert_refused(here, r"nowhere\.npy: no such token file", val_data="nowhere.npy")
    assert_refused(here, r"nowhere\.npy", data=("train.npy", "nowhere.npy"))
    (here / "empty").mkdir()
    line = assert_refused(here, "empty: holds neither manifest.json nor", data="empty")
    assert "python -m fastlm.prepare" in line
    # A directory is no file, and two are not one.
    assert_refused(here, "give one directory, or files", data=("empty", "empty"))
    assert_refused(here, "empty: is a directory", data=("train.npy", "empty"))


def test_empty_data(here):
    for name in ("empty.bin", "empty.npy"):
        (here / name).touch()
        assert_refused(here, rf"{name}: is empty", data=name)
        assert_refused(here, rf"{name}: is empty", val_data=name)
    np.save(here / "none.npy", np.zeros(0, dtype=np.uint16))
    assert_refused(here, r"none\.npy: is empty", data="none.npy")


def test_data_that_is_too_short(here):
    tokens(32).tofile(here / "short.bin")
    form = r"{} data \(short\.bin\) holds 32 tokens; context_len=32 needs at least 33"
    assert_refused(here, form.format("training"), data="short.bin")
    assert_refused(here, form.format("validation"), val_data="short.bin")
    # What is held out of a file can be too short as well.
    tokens(100).tofile(here / "hundred.bin")
    assert_refused(here, "validation data.*holds 5 tokens", data="hundred.bin", val_data=None)
    tokens(33).tofile(here / "enough.bin")
    result = commands().run(
        tiny_flags(data="enough.bin", val_data="enough.bin", total_steps=1), here
    )
    assert result.returncode == 0, result.output


def test_a_size_that_is_no_multiple_of_the_dtype(here):
    (here / "odd.bin").write_bytes(bytes(1001))
    assert_refused(
        here, r"odd\.bin: 1001 bytes are no multiple of 2.*uint16.*--data-dtype", data="odd.bin"
    )
    (here / "even.bin").write_bytes(bytes(1002))
    assert_refused(
        here, r"even\.bin: 1002 bytes are no multiple of 4.*uint32",
        data="even.bin", data_dtype="uint32",
    )  # fmt: skip


def test_files_that_hold_no_tokens(here):
    np.save(here / "two.npy", np.zeros((50, 2), dtype=np.uint16))
    np.save(here / "float.npy", np.zeros(500))
    (here / "text.npy").write_text("not an array\n" * 100)
    assert_refused(here, r"two\.npy: holds a 2-D array", data="two.npy")
    assert_refused(here, r"float\.npy: holds a 1-D array of float64", data="float.npy")
    assert_refused(here, r"text\.npy: not a readable \.npy file", data="text.npy")


def test_token_ids_outside_the_vocabulary(here):
    bad = tokens(4000)
    bad[1234] = VOCAB_SIZE
    np.save(here / "bad.npy", bad)
    form = r"bad\.npy: token id 64 at offset {} is outside the vocabulary of 64.*--vocab-size"
    assert_refused(here, form.format(1234), data="bad.npy")
    assert_refused(here, form.format(1234), data=("train.npy", "bad.npy"))
    assert_refused(here, form.format(1234), val_data="bad.npy")
    bad[1234], bad[3999] = 0, VOCAB_SIZE  # in the part that is held out
    np.save(here / "bad.npy", bad)
    assert_refused(here, form.format(3999), data="bad.npy", val_data=None)
    negative = tokens(4000).astype(np.int64)
    negative[77] = -1
    np.save(here / "negative.npy", negative)
    assert_refused(here, r"negative\.npy: token id -1 at offset 77", data="negative.npy")
    # Tokens of another dtype than they are read as.
    tokens(4000).astype(np.uint32).tofile(here / "wide.bin")
    (here / "wide.bin").write_bytes(bytes([1, 2, 3, 4]) * 4000)
    assert_refused(here, r"wide\.bin: token id 513 at offset 0.*--data-dtype", data="wide.bin")


def test_a_vocabulary_that_is_too_small(here):
    assert_refused(here, r"train\.npy: token id \d+ at offset \d+", vocab_size=20)
    write_prepared(here / "prepared")
    assert_refused(
        here, "vocab_size=100 is less than the 270 of the data's tokenizer.*leave it out",
        data="prepared", val_data=None, vocab_size=100,
    )  # fmt: skip


def test_a_prepared_directory_that_is_damaged(here):
    prepared = write_prepared(here / "prepared")
    shard, manifest = prepared / "train_00000.bin", prepared / "manifest.json"
    settings = dict(data="prepared", val_data=None, vocab_size=None)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    assert_refused(
        here,
        r"train_00000\.bin: holds 1500 tokens, .* says 1501; .*prepare the data again",
        **settings,
    )
    shard.unlink()
    assert_refused(here, r"train_00000\.bin: no such token file", **settings)
    shard.write_bytes(whole)
    text = manifest.read_text()
    for content in ("{", "{}", "[]", text.replace('"version": 1', '"version": 99')):
        manifest.write_text(content)
        assert_refused(here, r"manifest\.json: .* again", **settings)


# --- settings ---


def test_sizes_that_do_not_fit(here):
    assert_refused(here, "d_model=32 is not divisible by num_heads=3", num_heads=3)
    assert_refused(here, "d_model=32 over num_heads=32 gives heads of 1.*even", num_heads=32)
    assert_refused(here, "batch_size=0: it must be positive", batch_size=0)
    assert_refused(here, r"lr_min=1\.0: it must not be above lr_max", lr_min=1)


def test_unknown_names(here):
    assert_refused(here, "preset='dem' is unknown; did you mean 'demo'", preset="dem")
    assert_refused(here, r"--config nowhere\.toml: cannot be read", config="nowhere.toml")
    (here / "a.toml").write_text("batch_sise = 3\n")
    assert_refused(here, r"a\.toml: 'batch_sise' .* did you mean 'batch_size'", config="a.toml")


def test_unknown_flags(here):
    """Of these tyro writes more than a line; the nearest flag is among them."""
    before = listing(here)
    result = commands().run([*tiny_flags(), "--bach-size", "3"], here)
    assert result.returncode == 2 and "--batch-size" in result.stderr
    assert listing(here) == before


def test_devices(here):
    assert_refused(here, "device='gpu' is unknown: auto, cpu, cuda, cuda:0, mps", device="gpu")
    assert_refused(here, "device='meta' is not supported", device="meta")
    if not torch.cuda.is_available():
        assert_refused(here, "device='cuda' is not available: .*(build|nvidia-smi)", device="cuda")
    else:
        assert_refused(here, "device='cuda:99' is not available", device="cuda:99")
    if sys.platform != "darwin":
        assert_refused(here, "device='mps' is not available: it needs macOS", device="mps")


def test_compiling_without_a_compiler(here):
    assert_refused(
        here, r"--compile needs a C\+\+ compiler.*apt-get install g\+\+.*or drop --compile",
        compile=True, env={"PATH": str(here), "CXX": ""},
    )  # fmt: skip


def test_compiling_with_a_broken_compiler(here):
    """One that is there, and fails."""
    (here / "g++").write_text("#!/bin/sh\nexit 1\n")
    (here / "g++").chmod(0o755)
    cache = here.parent / "inductor"  # nothing that another run has compiled
    environment = {
        "PATH": f"{here}:{os.environ['PATH']}",
        "CXX": "",
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
    }
    assert_refused(here, r"--compile.*compiler.*drop --compile", compile=True, env=environment)
    shutil.rmtree(cache, ignore_errors=True)


# --- checkpoints ---


def test_checkpoints_that_are_not_there(here):
    assert_refused(here, "--resume nowhere: no such checkpoint or directory", resume="nowhere")
    assert_refused(here, "--resume: no run under runs/.*--resume PATH", argv=["--resume"],
                   target_dir=None)  # fmt: skip
    assert_refused(here, r"run.checkpoints: holds no readable checkpoint", argv=["--resume"])
    assert_refused(here, r"nowhere\.pt: no such checkpoint", init_from="nowhere.pt")
    assert_refused(here, "--eval-only needs the checkpoint.*--resume or --init-from",
                   eval_only=True)  # fmt: skip


def test_checkpoints_of_another_architecture(here):
    save(here / "wide.pt", d_model=64)
    save(here / "deep.pt", num_layers=3)
    save(here / "heads.pt", num_heads=4)
    save(here / "normed.pt", qk_norm=True)
    form = r"{}\.pt: the checkpoint is of another architecture: {}"
    for how in ("resume", "init_from"):
        wide = dict(d_model=32, d_ff=128)
        assert_refused(
            here, form.format("wide", r"layers\.0\.attn.* is \(64, 64\), not \(32, 32\)"),
            **{how: "wide.pt"}, **wide,
        )  # fmt: skip
        assert_refused(
            here, form.format("deep", r"layers\.2\.attn.* is \(32, 32\), not missing"),
            **{how: "deep.pt"},
        )  # fmt: skip
        assert_refused(here, form.format("heads", "num_heads=4, not 2"), **{how: "heads.pt"})
    other = form.format("normed", "qk_norm=True, not False")
    assert_refused(here, other, init_from="normed.pt")
    torch.save({"model": {"transformer.wte.weight": torch.zeros(3)}}, here / "nanogpt.pt")
    assert_refused(here, "nanogpt.*another architecture", init_from="nanogpt.pt")


def test_checkpoints_that_are_damaged_or_none(here):
    path = save(here / "whole.pt")
    (here / "cut.pt").write_bytes(path.read_bytes()[:-1])
    (here / "text.pt").write_text("no checkpoint\n" * 100)
    (here / "empty.pt").touch()
    torch.save([1, 2], here / "list.pt")
    for how in ("resume", "init_from"):
        assert_refused(here, r"cut\.pt: is damaged", **{how: "cut.pt"})
        for name in ("text.pt", "empty.pt"):
            assert_refused(here, rf"{name}: is no readable checkpoint", **{how: name})
        assert_refused(here, r"list\.pt: is no checkpoint but a list", **{how: "list.pt"})
    assert_refused(here, r"whole\.pt: holds no optimizer state.*--init-from", resume="whole.pt")


def test_a_checkpoint_of_other_data(here):
    stopped = tiny_flags(max_minutes=1e-9)
    assert commands().run(stopped, here).returncode == 0
    np.save(here / "other.npy", tokens(3000))
    assert_refused(
        here, r"checkpoint_1\.pt: its run read other data .*--init-from",
        resume="run", data="other.npy",
    )  # fmt: skip


# --- places ---


def test_output_directories_that_cannot_be(here):
    (here / "file").write_text("mine")
    assert_refused(here, r"target_dir=file: cannot be written .*--target-dir", target_dir="file")
    assert_refused(here, "target_dir=file/run: cannot be written", target_dir="file/run")
    assert_refused(here, "log_dir=file: cannot be written.*--log-dir", log_dir="file")
    assert_refused(here, "ckpt_dir=file: cannot be written.*--ckpt-dir", ckpt_dir="file")
    # Parents that were made on the way do not stay.
    deep = f"new/{'x' * 300}"
    assert_refused(here, "target_dir=new/x+: cannot be written", target_dir=deep)


@root_only
def test_output_directories_of_somebody_else(here):
    (here / "secret").mkdir(mode=0o700)
    (here / "shut").mkdir(mode=0o755)
    options = dict(uid=NOBODY, env={"HOME": str(here)})
    assert_refused(here, r"target_dir=run: cannot be written \(Permission denied\)", **options)
    assert_refused(here, r"target_dir=shut: .*Permission denied", target_dir="shut", **options)
    assert_refused(
        here, r"secret/run.*Permission denied.*choose another", target_dir="secret/run", **options
    )
    assert_refused(here, r"target_dir=runs.demo-.*Permission denied", target_dir=None, **options)


@root_only
def test_files_of_somebody_else(here):
    path = save(here / "mine.pt")
    (here / "open").mkdir()
    (here / "open").chmod(0o777)
    for name in ("mine.pt", "val.npy"):
        (here / name).chmod(0o600)
    settings = dict(target_dir="open/run", uid=NOBODY, env={"HOME": str(here)})
    assert_refused(here, r"val\.npy: cannot be read \(Permission denied\)", **settings)
    (here / "val.npy").chmod(0o644)
    assert_refused(here, rf"{path.name}: .*Permission denied", init_from="mine.pt", **settings)
    assert_refused(here, rf"{path.name}: .*Permission denied", resume="mine.pt", **settings)


@root_only
def test_directories_that_only_somebody_else_may_enter(here):
    """Even asking whether something is in there fails."""
    (here / "secret").mkdir(mode=0o700)
    write_prepared(here / "secret" / "prepared")
    save(here / "secret" / "a.pt")
    settings = dict(uid=NOBODY, env={"HOME": str(here)})
    for arguments in (
        dict(data="secret/prepared"),
        dict(data="secret/train.npy"),
        dict(resume="secret/a.pt"),
        dict(init_from="secret/a.pt"),
        dict(config="secret/a.toml"),
    ):
        assert_refused(here, r"secret/.*Permission denied", **arguments, **settings)
    argv = ["--ckpt", "secret/a.pt", "--device", "cpu"]
    result = commands().run(argv, here, call="fastlm.generate:main", **settings)
    assert result.returncode == 2
    assert re.fullmatch(r"error: .*secret/a\.pt.*Permission denied.*\n", result.stderr)


def test_a_disk_that_is_full(here):
    """From the first checkpoint on; the log, the metrics and the curve still fit."""
    argv = tiny_flags(ckpt_every=5, total_steps=8)
    result = commands().run(argv, here, limits={"fsize": 120_000})
    assert result.returncode == 1, result.output
    names = ("5", "final", "model")
    missing = [f"run/checkpoints/checkpoint_{name}.pt (File too large)" for name in names]
    assert result.stderr == ""
    assert result.stdout.endswith(f"[train] missing: {'; '.join(missing)}\n")
    assert "try it" not in result.stdout  # there is no model to try
    for name in names:
        assert re.search(rf"CKPT. FAILED: .*checkpoint_{name}\.pt.*the run goes on", result.stdout)
    assert "[summary] validation" in result.stdout
    assert list((here / "run" / "checkpoints").iterdir()) == []


# --- memory ---


def test_out_of_memory_says_what_to_lower(here):
    advice = r"out of memory .*lower --batch-size .*--grad-accum.*--context-len.*"
    advice += "--activation-checkpointing"
    # An array that nobody has, whether numpy or torch is asked for it. A CUDA build of torch takes
    # 4 GiB of addresses for itself.
    assert_refused(here, advice, batch_size=1 << 45)
    wide = dict(batch_size=2048, d_ff=1 << 15)  # 8 GiB of them
    assert_refused(here, advice, **wide, limits={"as": 6 << 30})
    assert_refused(here, advice, eval_only=True, init_from=str(save(here / "a.pt")),
                   batch_size=1 << 45)  # fmt: skip
    assert_refused(here, "out of memory", d_model=1 << 20, num_heads=1 << 10)
