"""python -m fastlm.doctor: what it measures and foretells, and what it says would stop a run."""

import json
import os
import re
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from in_process import checkpoint, run_tiny
from training_runs import flags, tiny_config, tiny_flags, tokens, write_prepared, write_tokens

import fastlm.doctor as doctor
import fastlm.run.estimate as estimate
from fastlm import create_model_and_optimizer, save_checkpoint
from fastlm.measure import copy_rate, free_memory
from fastlm.model_loss import ModelLoss
from fastlm.step import create_model

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
compiler_error = doctor.compiler_error
FORMS = {
    "compiler": r"\S.*, builds what --compile needs",
    "machine": r"cpu \(.+, 1 threads\), \d+\.\d\d GiB free",
    "CPU": r"(\w+(, )?)+; torch uses .+",
    "versions": r"Python 3\.\d+\.\d+, fastlm .+, torch .+, numpy .+, triton .+",
    "ops": r"cross_entropy: cpp, .*causal_attention: cpp",
    "data": r"4,000 training and 500 validation tokens",
    "matmul": r"float32 \S+, bfloat16 \S+, float16 \S+ TFLOP/s; this run computes in float32",
    "copy": r"\d+\.\d GB/s, read and written",
    "model": r"0\.\d\d M parameters \(5 layers, d_model 32, 2 heads, vocabulary 64\)",
    "memory": r"about \d+\.\d\d GiB of \d+\.\d\d that are free, .*",
    "step": r"\S+ s for 128 tokens, not compiled: [\d,]+ tokens/s \(from models of 2 and 3 of 5 "
    r"layers, 4 of 4 windows\)",
    "time": r"12 steps: \d+ seconds not compiled, 0 seconds for the matmuls alone",
    "checkpoints": r"\d+ MB each, at most \d+ MB at a time; [\d,]+ MB are free under /.*",
    "result": r"nothing was found that would stop this run",
}


@pytest.fixture
def quick(monkeypatch):
    """The rates of a machine that is not there, and what a run would take there."""
    memory = estimate.Memory(weights=1, moments=2, working=3, copy=4, process=5 << 20)
    monkeypatch.setattr(doctor, "memory_needed", lambda *_: memory)
    monkeypatch.setattr(doctor, "step_time", lambda *_: estimate.StepTime(0.5, (2,), 4))
    monkeypatch.setattr(doctor, "matmul_ceiling", lambda *_, **options: 1e11)
    monkeypatch.setattr(doctor, "copy_rate", lambda *_: 1e10)
    monkeypatch.setattr(doctor, "compiler_error", lambda _: None)


def examined(capsys, argv) -> tuple[int, dict[str, str], list[str]]:
    """(exit code, what is said of each thing, problems)"""
    code = doctor.main(argv)
    captured = capsys.readouterr()
    assert captured.err == "", captured.err
    lines = [re.fullmatch(r"\[doctor\] (\w+:?) +(.*)", line) for line in captured.out.splitlines()]
    assert all(lines), captured.out
    told = [(line[1], line[2]) for line in lines]
    return code, dict(told), [text for name, text in told if name == "PROBLEM"]


def test_what_it_tells(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "matmul_ceiling", lambda *_, **options: 1e11)
    monkeypatch.setattr(doctor, "copy_rate", lambda *_: 1e10)
    monkeypatch.chdir(tmp_path)
    write_tokens(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, told, problems = examined(capsys, tiny_flags(num_layers=5))
    assert (code, problems) == (0, [])
    assert told.pop("settings:").startswith("preset demo")
    assert told.keys() == FORMS.keys()
    for name, form in FORMS.items():
        assert re.fullmatch(form, told[name]), (name, told[name])
    assert sorted(tmp_path.iterdir()) == before  # nothing is written


def test_several_things_would_stop_a_run(tmp_path, monkeypatch, capsys, quick):
    monkeypatch.setattr(doctor, "compiler_error", compiler_error)
    monkeypatch.chdir(tmp_path)
    write_tokens(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(doctor, "free_memory", lambda _: 1 << 20)
    monkeypatch.setattr(
        os, "statvfs", lambda _: os.statvfs_result([1, 1, 9, 1, 1, 9, 9, 9, 0, 255])
    )
    code, told, problems = examined(capsys, tiny_flags(compile=True))
    assert code == 1 and len(problems) == 3
    assert "no-such-compiler" in problems[0] and "apt-get install g++" in problems[0]
    form = r"memory: a step takes at least \S+ GiB and 0.00 GiB are free; lower"
    assert re.match(form, problems[1])
    assert re.match(r"disk: the run's checkpoints take up to \d+ MB and 0 MB are free", problems[2])
    assert "result" not in told
    # Without --compile the compiler is not missed.
    _, told, problems = examined(capsys, tiny_flags())
    assert told["compiler"].startswith("none for --compile") and len(problems) == 2


@pytest.mark.parametrize(
    "settings, form",
    [
        ({"data": "nowhere.npy"}, "nowhere.npy: no such token file"),
        ({"context_len": 600}, "validation data.* 500"),
        ({"device": "cuda:7"}, "device='cuda:7' is not available"),
        ({"data": "prepared", "val_data": None, "vocab_size": 10}, "vocab_size=10 is less than"),
        ({"tokens_per_step": 100}, "tokens_per_step=100"),
        ({"data": ["train.npy:0.9", "short.npy:0.1"]}, "training set short.npy data .* 20 tokens"),
        ({"val_data": ["a=val.npy", "b=short.npy"]}, "validation set b data .* holds 20 tokens"),
        ({"doc_mask": True}, "doc_mask=True: the data has no manifest"),
        ({"attention": "flash"}, "attention='flash': it chooses among CUDA's kernels"),
        ({"fp8_head": True, "vocab_size": 80}, "fp8_head: .* has no matrix units for float8"),
        ({"residual_dtype": "bfloat16"}, "residual_dtype='bfloat16' with matmuls in float32"),
        ({"target_dir": "old"}, "old/checkpoints holds the checkpoints of another run"),
        ({"init_from": "nowhere.pt"}, "nowhere.pt: no such checkpoint"),
        (
            {"init_from": "other.pt", "data": "prepared", "val_data": None, "vocab_size": 270},
            "other.pt: its tokenizer is not the data's: id 1 is",
        ),
        ({"init_from": "other.pt", "num_layers": 1}, "other.pt: .* of another architecture"),
        (
            {"ckpt_path_to_resume": "other.pt", "vocab_size": 270, "optimizer": "muon"},
            "its optimizer is 'adamw'",
        ),
    ],
)
def test_each_problem_says_what_to_do(tmp_path, monkeypatch, capsys, quick, settings, form):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_tokens(tmp_path)
    np.save("short.npy", tokens(20))
    tokenizer = json.loads((write_prepared(tmp_path / "prepared") / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    cfg = tiny_config("unused", vocab_size=270)
    model, optimizer, _ = create_model_and_optimizer(cfg)
    save_checkpoint(
        model, optimizer, 1, "other.pt", config=asdict(cfg), tokenizer=json.dumps(tokenizer)
    )
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    shutil.copy("other.pt", "old/checkpoints/checkpoint_1.pt")
    capsys.readouterr()
    code, _, problems = examined(capsys, tiny_flags(**settings))
    assert code == 1 and len(problems) == 1
    assert re.search(form, problems[0]), problems


@pytest.mark.parametrize(
    "free, stops", [(110, (False, False)), (80, (False, True)), (50, (True,) * 2)]
)
def test_compiled_a_run_takes_less(tmp_path, monkeypatch, capsys, quick, free, stops):
    """Weights of 10 MiB, and 90 MiB of gradients and activations not compiled."""
    monkeypatch.chdir(tmp_path)
    write_tokens(tmp_path)
    memory = estimate.Memory(weights=10 << 20, moments=0, working=90 << 20, copy=0, process=0)
    monkeypatch.setattr(doctor, "memory_needed", lambda *_: memory)
    monkeypatch.setattr(doctor, "free_memory", lambda _: free << 20)
    for compiled, stopped in zip((True, False), stops, strict=True):
        _, _, problems = examined(capsys, tiny_flags(compile=compiled))
        assert [text[:7] for text in problems] == ["memory:"] * stopped


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch, capsys, quick):
    monkeypatch.chdir(tmp_path)
    write_tokens(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    code, _, problems = examined(capsys, tiny_flags())
    assert code == 1 and "cannot be written; choose another --target-dir" in problems[0]


def test_settings_are_the_trainers(tmp_path, monkeypatch, capsys, quick):
    """A wrong one is an error with its code; a checkpoint brings its own, without its tensors."""
    monkeypatch.chdir(tmp_path)
    assert doctor.main(flags(d_model=30, num_heads=4)) == 2
    assert "d_model=30 is not divisible" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ending:
        doctor.main(["--help"])
    assert ending.value.code == 0
    text = capsys.readouterr().out
    assert "python -m fastlm.doctor" in text and "--batch-size" in text
    write_tokens(tmp_path)
    run_tiny(tmp_path / "run", total_steps=4, ckpt_every=2, num_layers=5)
    capsys.readouterr()
    code, told, problems = examined(
        capsys, ["--resume", "run", "--data", "train.npy", "--val-data", "val.npy"]
    )
    assert (code, problems) == (0, []) and "5 layers" in told["model"]


def test_a_compiler_that_fails_is_a_problem(tmp_path, monkeypatch, capsys):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'a.cpp:1: fatal error: omp.h: No such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "cannot build what --compile needs (a.cpp:1: fatal error: omp.h" in (
        doctor.compiler_error(CPU) or ""
    )
    if shutil.which("g++"):
        monkeypatch.setenv("CXX", "g++")
        assert doctor.compiler_error(CPU) is None


@pytest.mark.parametrize(
    "checkpointing, grad_accum, doc_mask",
    [
        (False, 3, False),
        (True, 1, False),
        (False, 1, True),
        pytest.param(False, 1, False, marks=pytest.mark.exhaustive),
        pytest.param(True, 3, False, marks=pytest.mark.exhaustive),
    ],
)
def test_memory_foretold_is_what_a_step_takes(checkpointing, grad_accum, doc_mask):
    """Of seven layers, from runs of two and three without content."""
    cfg = tiny_config(
        "unused", num_layers=7, d_model=64, context_len=64, grad_accum=grad_accum,
        activation_checkpointing=checkpointing, dropout=0.1, doc_mask=doc_mask,
    )  # fmt: skip
    told = estimate.memory_needed(cfg, estimate.Sizes.of(cfg), CPU)
    model = create_model(cfg)
    model.document_end = 0 if doc_mask else None
    loss = ModelLoss(model, CPU, cfg)
    x = torch.zeros(cfg.batch_size, cfg.context_len, dtype=torch.int64)
    with estimate._LiveBytes() as live:
        for _ in range(grad_accum):
            loss(x, x, torch.tensor(5)).backward()
    head = told.working - live.peak  # its scratch is inside the op, where nobody counts
    assert 0 <= head < 0.2 * live.peak, (told, live.peak)
    assert told.weights == 4 * sum(p.numel() for p in loss.parameters())
    assert told.on(CPU) > told.on(torch.device("cuda")) == 3 * told.weights + told.working


def test_an_fp8_heads_copies_are_foretold():
    plain, fp8 = (
        estimate.memory_needed(cfg, estimate.Sizes.of(cfg), CPU).working
        for cfg in (tiny_config("unused", fp8_head=fp8) for fp8 in (False, True))
    )
    assert fp8 - plain == 64 * 32 * (1 + 4)  # V D: the weight in float8, and what is rounded to it


def test_live_bytes_are_counted_once_and_until_freed():
    with estimate._LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:]
        assert live.now == 4000
        c = a + 1
        assert live.now == 8000
        del a, c
        assert live.now == 4000
        del b
    assert (live.now, live.peak) == (0, 8000)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_checkpoints_have_the_size_that_was_foretold(tmp_path, optimizer, without_extras):
    settings = dict(d_model=64, total_steps=2, optimizer=optimizer, tie_embeddings=True)
    cfg = run_tiny(tmp_path / "run", ckpt_every=1, **settings)
    sizes = estimate.Sizes.of(cfg)
    # Beside the tensors' bytes: names, settings, the archive's structure.
    assert 0 <= checkpoint(tmp_path / "run").stat().st_size - sizes.checkpoint < 60_000
    assert 0 <= checkpoint(tmp_path / "run", "model").stat().st_size - sizes.weights < 60_000
    files = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").glob("*.pt"))
    assert sizes.checkpoint * 2 + sizes.weights < files < sizes.disk(cfg) + 200_000


def test_what_the_machine_has():
    assert 1 << 20 < free_memory(CPU) < 1 << 50
    assert 1e7 < copy_rate(CPU, seconds=0.01) < 1e13
