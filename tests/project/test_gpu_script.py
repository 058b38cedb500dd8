"""bench/gpu.sh without a GPU: what it would run is there, what it runs is kept, its rows' programs.

`make test-all` rehearses every part in full, as DEVICE=cpu bench/gpu.sh PART OUT_DIR does.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import gpu_rows
import gpu_steps
import gpu_turns
import harness
import pytest
import torch
from training_runs import write_prepared

from fastlm import TrainingConfig
from fastlm.presets import PRESETS
from fastlm.run.cli import parse

ROOT = Path(__file__).resolve().parents[2]
PARTS = [part for part in gpu_steps.PARTS if part != "setup"]


@pytest.mark.parametrize(
    "arguments, told",
    [((), "usage"), (("everything", "out"), "usage"), (("kernels",), "second argument")],
)
def test_a_mistake_is_told(arguments, told):
    run = subprocess.run(
        ["bash", "bench/gpu.sh", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 2 and told in run.stderr and not run.stdout


@pytest.mark.parametrize("rehearsal", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_a_parts_commands_name_what_exists(part, rehearsal, monkeypatch):
    monkeypatch.setattr(gpu_steps, "REHEARSAL", rehearsal)
    monkeypatch.setattr(gpu_steps, "DEVICE", "cpu" if rehearsal else "cuda")
    steps = gpu_steps.PARTS[part]()
    assert len({step.name for step in steps}) == len(steps) >= 3
    options_of_all = []
    for step in steps:
        words = [word for word in step.command if re.match(r"(tests|bench)/", word)]
        words += [f"fastlm/{word[7:]}.py" for word in step.command if word.startswith("fastlm.")]
        assert words and all((ROOT / word).exists() for word in words), step
        if "bench/gpu_rows.py" in step.command:
            options_of_all.append(gpu_rows.arguments(step.command[2:]).options)
        variants = [w.split("=", 2)[2] for w in step.command if w.startswith("--variant=")]
        options_of_all += [options for options in variants if options != "nanogpt"]
    for options in options_of_all:  # as the trainer's command line takes them
        parse(["--preset", "gpt2-124m", "--device", "cpu", *shlex.split(options)])
    assert part != "trainer" or len(options_of_all) > 30
    if not rehearsal:
        assert all(step.seconds <= 420 for step in steps)


def test_rows_are_chosen(monkeypatch):
    monkeypatch.setenv("ROWS", "^guard|profile of f")
    assert [step.name for step in gpu_steps.steps_of("trainer")] == [
        "profile of fastlm",
        "guard off",
    ]


def test_what_a_part_found_is_kept(tmp_path, monkeypatch):
    """Of a step that fails, of one that is cut off, with all its children, and of those that never
    began; the results are there from the first step on."""
    results = tmp_path / "gpu-rehearsal-2026-01-02-setup.json"
    row = {"name": "a", "tokens_per_second": 3.0}
    comparisons = {"comparisons": [{"op": "adamw"}]}
    written = "open(os.environ['STEP'] + '/{}', 'w').write({!r})"
    slow = "subprocess.Popen(['sleep', '60']); print('so far', flush=True); "
    slow += f"{written.format('bench-as-is.json', json.dumps(comparisons))}; time.sleep(60)"

    def step(name, code, seconds=30.0, read=gpu_steps.of_program):
        code = f"import json, os, subprocess, time; {code}"
        return gpu_steps.Step(name, [sys.executable, "-c", code, "$STEP"], seconds, read)

    steps = [
        step("row", written.format("found.json", json.dumps({"rows": [row]}))),
        step("tests", f"assert os.path.exists({str(results)!r}); print('FAILED tests/a.py::b - x')"
             "; print('1 failed, 2 passed in 3s'); os._exit(1)", read=gpu_steps.of_pytest),
        step("no last line", "", read=gpu_steps.of_pytest),
        step("slow", slow, 1.5, gpu_steps.of_benches),
        step("late", "print('never')"),
    ]  # fmt: skip
    monkeypatch.setitem(gpu_steps.PARTS, "setup", lambda: steps)
    told = {"date": "2026-01-02 03:04:05", "gpu": None, "commit": "abc1234"}
    monkeypatch.setattr(gpu_steps, "ask", lambda expression: dict(told))
    clock = time.perf_counter
    late = [False]
    monkeypatch.setattr(gpu_steps.time, "perf_counter", lambda: clock() + (600 if late[0] else 0))
    real = gpu_steps.run_step

    def run_step(current, seconds):
        found = real(current, seconds)
        late[0] = current.name == "slow"
        return found

    monkeypatch.setattr(gpu_steps, "run_step", run_step)
    assert gpu_steps.run_part("setup", tmp_path, minutes=9.0, used=3.0) == 1
    found = json.loads(results.read_text())
    assert found["rows"] == [row] and found["comparisons"] == comparisons["comparisons"]
    assert found["commit"] == "abc1234" and found["part"] == "setup"
    outcomes = {s["name"]: (s["exit_code"], s["cut_off"]) for s in found["steps"]}
    assert outcomes == {
        "row": (0, False), "tests": (1, False), "no last line": (0, False), "slow": (None, True),
        "late": (None, True),
    }  # fmt: skip
    _, tests, empty, slow, late = found["steps"]
    assert tests["tests"] == {"failed": 1, "passed": 2, "names": ["tests/a.py::b - x"]}
    assert "ValueError" in empty["unreadable"]
    assert slow["seconds"] < 20 and slow["tail"] == "so far\n" and late["seconds"] == 0


def test_circumstances_name_the_commit_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("COMMIT", "abc1234")
    found = harness.circumstances(["bench/gpu.sh", "kernels"])
    assert found["commit"] == "abc1234" and found["command"] == "bench/gpu.sh kernels"
    assert torch.__version__.startswith(found["versions"]["torch"])  # "2.14.1+cu130" is 2.14.1


# --- the rows' programs ---


@pytest.fixture
def rehearsed(tmp_path, monkeypatch, without_extras, one_thread):
    """row(*arguments) in this process; the trainer runs in it, too."""
    from fastlm.train import main as train

    def run(command):
        assert command[1:3] == ["-m", "fastlm.train"]
        assert train(command[3:]) == 0

    monkeypatch.setenv("DATA", str(write_prepared(tmp_path / "prepared")))
    monkeypatch.setattr(gpu_rows, "REHEARSAL", True)
    monkeypatch.setattr(gpu_rows, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_rows, "run", run)
    monkeypatch.setattr(gpu_rows, "matmul_ceiling", lambda *_, **__: 1e12)
    monkeypatch.setattr(harness, "TINY", True)
    monkeypatch.setattr("fastlm.run.finish.print_samples", lambda *_, **__: None)

    def row(*arguments) -> dict:
        out = tmp_path / "found.json"
        gpu_rows.main([*arguments, "--out", str(out)])
        found = json.loads(out.read_text())["rows"]
        return found if len(found) > 1 else found[0]

    return row


def test_the_row_of_a_run(rehearsed):
    found = rehearsed("fastlm", "--name", "guard off", "--full", "--options=--guard off")
    assert found["name"] == "guard off" and found["full"] and found["steps"] == 12
    assert found["tokens"] == 12 * 1024 and found["tokens_per_second"] > 0
    assert 0 < found["loss"] < 8.5 and found["peak_memory_bytes"] > 0


@pytest.mark.filterwarnings("ignore::UserWarning")  # the peer's own
def test_switches_in_turns(rehearsed, tmp_path, monkeypatch):
    """Each with the first; what was found is written before the next is made."""
    monkeypatch.setattr(gpu_turns, "matmul_ceiling", lambda *_, **__: 1e12)
    monkeypatch.setattr(gpu_turns, "nanogpt_folder", lambda: Path("somewhere"))
    monkeypatch.setattr(gpu_rows, "nanogpt_folder", lambda: Path("somewhere"))
    monkeypatch.setattr(gpu_rows, "nanogpt_model", lambda folder, cfg: TheirGPT(cfg))
    out, written, make = tmp_path / "turns.json", [], gpu_turns.contender

    def noted(variant):
        written.append(json.loads(out.read_text())["rows"] if out.exists() else [])
        return make(variant)

    monkeypatch.setattr(gpu_turns, "contender", noted)
    variants = ["fastlm=", "nanoGPT=nanogpt", "guard off=--guard off"]
    gpu_turns.main(["--out", str(out), *(f"--variant={variant}" for variant in variants)])
    assert [len(rows) for rows in written] == [0, 0, 2]
    fastlm, peer, off = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in (fastlm, peer, off)] == [
        "steps: fastlm", "steps: nanoGPT", "steps: guard off",
    ]  # fmt: skip
    assert off["options"] == "--guard off" and fastlm["loss"] != off["loss"] > 7
    assert (fastlm["steps"], peer["steps"], off["steps"]) == (4, 2, 2)
    assert peer["tokens"] == off["tokens"] == 2048 and fastlm["speed_to_first"] == 1
    for row in (fastlm, peer, off):
        assert min(row["tokens_per_second"], row["peak_memory_bytes"], row["speed_to_first"]) > 0


def test_speeds_in_turns_are_compared_round_by_round():
    cfg = TrainingConfig(batch_size=2, context_len=32, grad_accum=3)
    row = {"peak_memory_bytes": 1, "compile_seconds": 1.0, "flops_per_token": 10}
    first, second = (gpu_turns.Contender(name, "", cfg, None, dict(row)) for name in "ab")
    first.seconds, second.seconds = [9.0, 9.0, 9.0, 2.0, 4.0, 6.0], [9.0, 1.0, 1.0, 2.0]
    found = second.measured(first, 1e3)
    assert found["speed_to_first"] == 3.0 and found["tokens_per_second"] == 192
    assert found["mfu"] == 1.92 and found["steps"] == 4 and found["tokens"] == 4 * 192


def test_a_variant_that_fails_leaves_the_others_and_is_told(rehearsed, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_turns, "matmul_ceiling", lambda *_, **__: 1e12)
    out = tmp_path / "turns.json"
    variants = [f"--variant={variant}" for variant in ("a=", "b=--d-model 31", "c=")]
    with pytest.raises(RuntimeError, match=r"not measured: b=--d-model 31$"):
        gpu_turns.main(["--out", str(out), *variants])
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["steps: a", "steps: c"]


def test_turns_without_nanogpt(rehearsed, monkeypatch, capsys):
    monkeypatch.setattr(gpu_turns, "nanogpt_folder", lambda: None)
    monkeypatch.setattr(gpu_turns, "matmul_ceiling", lambda *_, **__: 1e12)
    assert list(gpu_turns.rows_in_turns(["fastlm=", "nanoGPT=nanogpt"])) == []
    assert "nanoGPT is left out" in capsys.readouterr().out


def test_the_row_of_a_demo_and_of_the_machine(rehearsed):
    found = rehearsed("demo")
    assert found["bits_per_byte"] > 0 and found["steps"] >= 10
    machine = rehearsed("machine")
    assert machine["copy_bytes_per_second"] > 0 and machine["matmul_bfloat16_flops"] == 1e12


class TheirGPT(torch.nn.Module):
    """What is asked of nanoGPT's model."""

    def __init__(self, cfg):
        super().__init__()
        self.embedding = torch.nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.head = torch.nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)

    def forward(self, x, y):
        logits = self.head(self.embedding(x))
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def test_nanogpts_row_has_the_batches_of_ours(rehearsed, monkeypatch):
    monkeypatch.setattr(gpu_rows, "nanogpt_folder", lambda: Path("somewhere"))
    monkeypatch.setattr(gpu_rows, "nanogpt_model", lambda folder, cfg: TheirGPT(cfg))
    asked, batch = {}, gpu_rows.TrainLoader.batch

    def noted(loader, first):
        asked[program].append(first)
        return batch(loader, first)

    monkeypatch.setattr(gpu_rows.TrainLoader, "batch", noted)
    for program in ("nanogpt", "fastlm"):
        asked[program] = []
        found = rehearsed(program, "--full")
        assert found["tokens"] == 12 * 1024 and found["loss"] < 8.5
        assert found["flops_per_token"] > 6 * 4096 * 32
    # Both warm up with the first of them; and fastlm evaluates once before and after.
    assert asked["nanogpt"] == [*range(0, 32, 2)] * 2 + [*range(0, 12 * 32, 2)]
    assert set(asked["nanogpt"]) <= set(asked["fastlm"])
    assert rehearsed("nanogpt", "--profile")["top_kernels"]["top"]


def test_without_nanogpt_its_row_says_so(rehearsed, monkeypatch):
    monkeypatch.setattr(gpu_rows, "nanogpt_folder", lambda: None)
    with pytest.raises(SystemExit, match=r"no checkout of nanoGPT: .*\.gpu/nanoGPT"):
        rehearsed("nanogpt")


def test_the_kernels_with_the_most_time(monkeypatch):
    monkeypatch.setattr(gpu_rows, "DEVICE", torch.device("cuda"))
    events = [{"cat": "kernel", "name": f"k{i}", "dur": 1000.0 * i} for i in range(1, 13)]
    events += [{"cat": "kernel", "name": "k12", "dur": 2000.0}, {"cat": "cpu_op", "name": "no"}]
    events += [{"cat": "gpu_memset", "name": "Memset", "dur": 500.0}, {"name": "metadata"}]
    found = gpu_rows.top_kernels({"traceEvents": events}, steps=2)
    assert found["busy_ms"] == pytest.approx(40.25) and len(found["top"]) == 13
    first = {"name": "k12", "ms": 7.0, "calls": 1.0, "share": pytest.approx(14 / 80.5)}
    assert found["top"][0] == first


def test_a_run_that_ends_too_early_is_not_killed(tmp_path):
    assert gpu_rows.kill_behind([sys.executable, "-c", ""], tmp_path / "never") == 0
    with pytest.raises(SystemExit, match="exit code 3 before never"):
        gpu_rows.kill_behind([sys.executable, "-c", "exit(3)"], tmp_path / "never")
    waits = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert gpu_rows.kill_behind(waits, ROOT / "README.md") == 1


def test_rows_differ_from_the_preset_in_its_own_settings():
    for found in (gpu_rows.SHORT, gpu_rows.FULL, gpu_rows.TINY):
        assert set(found) <= set(PRESETS["gpt2-124m"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", PARTS)
def test_a_rehearsal_of_all_of_it(part, tmp_path):
    """Twenty minutes on two cores: Inductor compiles for every bench."""
    environment = {**os.environ, "DEVICE": "cpu", "OMP_NUM_THREADS": "1", "MINUTES": "30"}
    environment["DATA"] = str(write_prepared(tmp_path / "prepared"))
    environment["PYTHON"] = sys.executable
    run = subprocess.run(
        ["bash", "bench/gpu.sh", part, str(tmp_path)], cwd=ROOT, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    (path,) = tmp_path.glob(f"gpu-rehearsal-*-{part}.json")
    without = {"nanoGPT", "nanoGPT, the preset's step", "profile of nanogpt"}
    allowed = without if gpu_rows.nanogpt_folder() is None else set()
    failed = {s["name"] for s in json.loads(path.read_text())["steps"] if s["exit_code"] != 0}
    assert failed <= allowed, run.stdout[-6000:]
