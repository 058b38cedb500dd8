"""The command: what it says and writes, and that nothing stops a run for good.

"Equal" is bit for bit here, for weights, moments, random state and losses.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_server import commands
from in_process import (
    apart,
    checkpoint,
    expected_events,
    log_events,
)
from training_runs import (
    listing,
    losses,
    metrics,
    same,
    state,
    tiny_flags,
    write_prepared,
    write_tokens,
)

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")

# --- the command ---

SIGNALS = [
    ("SIGTERM", 143),
    ("SIGUSR1", 0),
    # test_signals.py has them, too, in its own process.
    pytest.param("SIGINT", 130, marks=pytest.mark.exhaustive),
    pytest.param("SIGHUP", 129, marks=pytest.mark.exhaustive),
]
LONG = dict(total_steps=300, dropout=0.1, ckpt_every=20, log_every=1, eval_every=50)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """300 steps without an interruption."""
    directory = tmp_path_factory.mktemp("straight")
    write_tokens(directory)
    result = commands().run(tiny_flags(**LONG), directory, extras=True)
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
    assert apart(log_events(straight)) == apart(expected_events(300, 1, 50, 20))
    config = torch.load(checkpoint(straight, "model"), weights_only=True)["config"]
    assert (config["d_model"], config["total_steps"], config["dropout"]) == (32, 300, 0.1)


def test_what_a_run_says(here):
    write_prepared(here / "prepared")
    settings = dict(data="prepared", val_data=None, vocab_size=None, target_dir=None, eval_every=5)
    result = commands().run(tiny_flags(**settings), here, extras=True)
    assert result.returncode == 0 and result.stderr == "", result.output
    out = result.stdout
    (target,) = (here / "runs").iterdir()
    assert re.fullmatch(r"demo-\d{8}-\d{6}", target.name)
    for form in (
        r"^\[run\] fastlm \S+, preset demo",
        r"^\[load_token_dataset\] Loaded \S+train_00000.bin, shape=\(\d+,\), dtype=uint16$",
        r"^\[run\] model: 0\.\d\d M parameters \(2 layers, d_model 32, 2 heads, vocabulary 270\)$",
        r"^\[run\] data: [\d,]+ training and \d+ validation tokens, fingerprint [0-9a-f]{16}$",
        r"^\[run\] on cpu \(.*\), torch \S+, float32, not compiled",
        r"^\[run\] 12 steps of 128 tokens, AdamW, seed 0, into runs.demo-",
        r"^\[train\] step 0/12 \| avg_loss=",
        r"^\[VAL\] step 000005 val_loss \d\.\d{4}$",
        r"^\[VAL\] step 000011 val_loss \d\.\d{4}$",
        r"^\[CKPT\] Saved to runs.demo-\S+checkpoint_final.pt$",
        r"^\[plotter\] Saved training curve to runs.demo-\S+train_loss_curve.png$",
        r"^\[summary\] training    12 steps, 1,536 tokens in [\d.]+ s: [\d,]+ tokens/s in steps, "
        r"[\d,]+ over the whole run$",
        r"^\[summary\] model FLOPs [\d.]+ M a token \(6 \* matmul weights \+ 6 \* layers \* "
        r"context_len \* num_heads \* head_dim\)",
        r"^\[summary\] MFU         [\d.]+% of [\d.]+ TFLOP/s, the best of several matmul shapes",
        r"^\[summary\] peak memory \d+\.\d\d GiB allocated by the process$",
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
    # The limit of a run's last evaluation is none of this one's, unless it is asked for here.
    result = commands().run([*argv, "--final-eval-tokens", "70"], straight.parent)
    assert "over 51 of 499 targets, evenly spread" in result.stdout, result.output
    assert listing(straight.parent) == before  # and nothing was written


@pytest.mark.parametrize("name, code", SIGNALS)
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
    assert again == "--resume run --device cpu"
    result = commands().run([*tiny_flags(**LONG), *again.split()], here)
    assert result.returncode == 0, result.output
    assert f"[resume] at step {stopped}" in result.stdout
    assert_equal_runs(here / "run", straight)


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 0)])
def test_a_signal_before_the_first_step_leaves_nothing(here, name, code):
    before = listing(here)
    argv = tiny_flags(total_steps=None, train_minutes=1, target_dir="runs/a/b")
    command = commands().start(argv, here)
    command.until(r"\[run\] as many steps of [\d,]+ tokens as take 1 minutes")
    time.sleep(0.3)  # in the calibration, or the warm-up before it
    command.signal(getattr(signal, name))
    result = command.wait()
    assert result.returncode == code, result.output
    assert result.stderr == "\n[train] stopping: nothing is saved yet (again: stop at once)\n"
    assert "[calibrate]" not in result.stdout and listing(here) == before


def test_a_second_ctrl_c_exits_at_once(here):
    command = commands().start(
        tiny_flags(total_steps=50, ckpt_every=2), here, call="command_programs:train_slowly_from_3"
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
    assert names == ["checkpoint_2.pt", "run.lock"]  # which nobody holds any more


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
    assert apart(log_events(here / "run")) == apart(expected_events(3, 1, 0, 1))


def test_two_runs_with_other_prefixes_share_a_directory(here):
    for prefix in ("a", "b"):
        extra = dict(ckpt_save_prefix=prefix, log_save_prefix=f"log_{prefix}", total_steps=2)
        result = commands().run(tiny_flags(**extra), here, extras=prefix == "b")
        assert result.returncode == 0, result.output
    for prefix in ("a", "b"):
        assert (here / "run" / "checkpoints" / f"{prefix}_final.pt").exists()
        assert (here / "run" / "logs" / f"log_{prefix}.log").exists()
    assert (here / "run" / "logs" / "log_b_loss_curve.png").exists()


def test_compiled(here):
    """The real command, end to end: compile time apart, no recompilation, the eager results."""
    settings = dict(total_steps=20, eval_every=5, ckpt_every=10, grad_accum=2, num_layers=1)
    command = [sys.executable, "-m", "fastlm.train"]
    done = subprocess.run(
        [*command, *tiny_flags(**settings, compile=True)],
        cwd=here, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # What a CUDA build of torch says where there is nvcc and no GPU.
    no_gpu = "No CUDA runtime is found, using CUDA_HOME="
    assert [line for line in done.stderr.splitlines() if no_gpu not in line] == []
    seconds = float(re.search(r"\[compile\] done in ([\d.]+) s, not counted", done.stdout)[1])
    (summary,) = metrics(here / "run", "summary")
    assert seconds == pytest.approx(summary["compile_seconds"], abs=0.06)
    assert f"[summary] compilation {seconds:.1f} s" in done.stdout
    assert "0 recompilations during the run" in done.stdout and summary["recompiles"] == 0
    # The steps' time, which tokens/s divides by, is beside the compiler's and not part of it.
    assert 1 < summary["compile_seconds"] < summary["run_seconds"] - summary["step_seconds"]
    assert summary["tokens_per_second"] == pytest.approx(
        summary["tokens"] / summary["step_seconds"], rel=0.01
    )
    payload = torch.load(checkpoint(here / "run"), weights_only=True)
    assert not any("_orig_mod" in name for name in payload["model_state"])

    eager = commands().run(tiny_flags(**settings, target_dir="eager"), here)
    assert eager.returncode == 0, eager.output
    a, b = losses(here / "run"), losses(here / "eager")
    assert [*a.values()] == pytest.approx([*b.values()], rel=1e-3)
    a, b = (metrics(here / name, "summary")[0]["val_loss"] for name in ("run", "eager"))
    assert a == pytest.approx(b, rel=1e-3)
