"""The programs behind bench/gpu_steps.py's rows, each in a process of its own.

    python bench/gpu_rows.py machine|fastlm|nanogpt|demo|kill --out FILE [--name NAME] ...

machine: copy and matmul rates. fastlm: a run of `python -m fastlm.train` on the preset gpt2-124m.
nanogpt: nanoGPT's model in its loop, on the same batches. demo: the preset demo-gpu. kill: a run
that is killed with SIGKILL and resumed, against one that is not.

Data: the prepared directory that DATA names, else .gpu/corpus, else the default corpus.
"""

import argparse
import gzip
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from nanogpt_peer import nanogpt_folder, nanogpt_model, nanogpt_step
from peer_model import PeerStep

from fastlm import TrainingConfig
from fastlm.corpus import default_corpus
from fastlm.data.files import open_data
from fastlm.data.loader import TrainLoader
from fastlm.hardware import select_dtype, synchronize
from fastlm.measure import PeakMemory, matmul_ceiling
from fastlm.presets import PRESETS
from fastlm.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[1]
REHEARSAL = os.environ.get("DEVICE") == "cpu"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
# What is measured in 20 s, and long enough for a loss to be compared: 500 steps of one micro-batch.
SHORT = dict(batch_size=16, tokens_per_step=16 * 1024, total_steps=500, warmup_iters=50)
FULL = dict(total_steps=12, warmup_iters=2)  # of the preset's 524,288 tokens
TINY = dict(batch_size=2, context_len=32, num_layers=1, num_heads=2, d_model=48)
LAST = 5  # logged losses whose mean is the loss at the end
LOG_EVERY = 10


def settings(full: bool) -> dict[str, Any]:
    """What a run differs in from the preset gpt2-124m."""
    found = {**(FULL if full else SHORT), "vocab_size": 50304, "seed": 0}
    if REHEARSAL:
        found |= {**TINY, "tokens_per_step": 1024 if full else 64, "total_steps": 12}
        found |= {"vocab_size": 4096}  # the default corpus's
    return found


def data_directory() -> Path:
    carried = ROOT / ".gpu" / "corpus"
    given = os.environ.get("DATA") or (carried if carried.is_dir() else None)
    return Path(given) if given else default_corpus(log=lambda line: None)


def flags(found: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in found.items()]


def train_command(target: Path, *options: str) -> list[str]:
    """A run on DEVICE that evaluates and saves at its end alone; options go before all else."""
    command = [sys.executable, "-m", "fastlm.train", f"--device={DEVICE.type}", "--compile"]
    command += [f"--data={data_directory()}", f"--target-dir={target}", "--eval-every=0"]
    command += ["--ckpt-every=0", f"--log-every={LOG_EVERY}"]
    # A rehearsal compiles nothing, and evaluates little.
    command += ["--no-compile", "--final-eval-tokens=1000"] if REHEARSAL else []
    return [*command, *options]


def run(command: list[str]) -> None:
    print("+ " + shlex.join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def metrics_of(target: Path) -> list[dict[str, Any]]:
    (path,) = target.rglob("metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def row_of_run(target: Path) -> dict[str, Any]:
    """The figures of a run of the trainer, which are its own."""
    rows = metrics_of(target)
    summary = next(row for row in rows if row["event"] == "summary")
    losses = [row["loss"] for row in rows if row["event"] == "train"]
    wanted = (
        "steps", "tokens", "tokens_per_second", "mfu", "matmul_ceiling_flops", "flops_per_token",
        "peak_memory_bytes", "compile_seconds", "step_seconds", "run_seconds", "skipped",
        "bits_per_byte", "data_wait_seconds",
    )  # fmt: skip
    found = {name: summary[name] for name in wanted}
    return {**found, "loss": sum(losses[-LAST:]) / len(losses[-LAST:])}


def fastlm_row(args: argparse.Namespace) -> dict[str, Any]:
    chosen = settings(args.full)
    if args.profile:
        chosen |= {"total_steps": 8, "warmup_iters": 2}
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "run"
        profile = ["--profile=4:6"] if args.profile else []
        options = ["--preset=gpt2-124m", *flags(chosen), *profile, *shlex.split(args.options)]
        options += ["--total-steps=12"] if REHEARSAL else []
        run(train_command(target, *options))
        if not args.profile:
            return row_of_run(target)
        (trace,) = target.rglob("trace_rank0.json.gz")
        return {"top_kernels": top_kernels(json.loads(gzip.decompress(trace.read_bytes())), 2)}


def nanogpt_loop(
    cfg: TrainingConfig,
) -> tuple[torch.nn.Module, PeerStep, Callable[[int, float], torch.Tensor]]:
    """(model, step, train(number, rate) -> loss): its loop on the batches that fastlm takes, each
    made while the device works on the one before."""
    if (folder := nanogpt_folder()) is None:
        sys.exit("error: no checkout of nanoGPT: take its files along in .gpu/nanoGPT")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as it does
    data = open_data((str(data_directory()),))
    loader = TrainLoader(data.train, cfg.batch_size, cfg.context_len, seed=cfg.seed, device=DEVICE)
    torch.manual_seed(cfg.seed)
    model = nanogpt_model(folder, cfg)
    step = nanogpt_step(model, select_dtype(cfg.dtype, DEVICE), compiled=not REHEARSAL)

    def train(number: int, rate: float) -> torch.Tensor:
        first = number * cfg.batch_size * cfg.grad_accum
        batches = (loader.batch(first + micro * cfg.batch_size) for micro in range(cfg.grad_accum))
        return step.accumulate(batches, rate, count=cfg.grad_accum)

    return model, step, train


def nanogpt_flops(model: torch.nn.Module, cfg: TrainingConfig) -> int:
    """A token's, forward and backward, counted as fastlm counts its own."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    per_token = 6 * sum(layer.weight.numel() for layer in layers)
    return per_token + 6 * cfg.num_layers * cfg.context_len * cfg.d_model


def warmed_up(train: Callable[[int, float], torch.Tensor]) -> float:
    """Seconds of two steps that change nothing but the optimizer's state."""
    begin = time.perf_counter()
    for _ in range(2):
        train(0, 0.0)
    synchronize(DEVICE)
    return time.perf_counter() - begin


def nanogpt_row(args: argparse.Namespace) -> dict[str, Any]:
    preset = {**PRESETS["gpt2-124m"], **settings(args.full)}
    cfg = TrainingConfig(**preset, device=DEVICE.type).accumulated(1)
    model, step, train = nanogpt_loop(cfg)
    compile_seconds = warmed_up(train)
    step.optimizer.state.clear()
    if args.profile:
        return {"top_kernels": profiled(lambda: [train(number, 0.0) for number in range(2)], 2)}
    memory = PeakMemory(DEVICE)
    losses = []
    begin = time.perf_counter()
    for number in range(cfg.total_steps):
        loss = train(number, learning_rate(number, cfg))
        if number % LOG_EVERY == 0:  # it reads its loss there, too
            losses.append(float(loss))
    synchronize(DEVICE)
    seconds = time.perf_counter() - begin
    memory.sample()
    tokens = cfg.total_steps * cfg.batch_size * cfg.grad_accum * cfg.context_len
    per_token, ceiling = nanogpt_flops(model, cfg), matmul_ceiling(DEVICE, step.dtype)
    return {
        "steps": cfg.total_steps,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "mfu": tokens / seconds * per_token / ceiling,
        "matmul_ceiling_flops": ceiling,
        "flops_per_token": per_token,
        "peak_memory_bytes": memory.bytes,
        "compile_seconds": compile_seconds,
        "step_seconds": seconds,
        "loss": sum(losses[-LAST:]) / len(losses[-LAST:]),
    }


def profiled(work: Any, steps: int) -> dict[str, Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if DEVICE.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        work()
        synchronize(DEVICE)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profile.export_chrome_trace(str(path))
        return top_kernels(json.loads(path.read_text()), steps)


def top_kernels(trace: dict[str, Any], steps: int) -> dict[str, Any]:
    """{"busy_ms": of a step, "top": the thirty names with the most time}; on a CPU of operators,
    which contain each other."""
    kinds = ("cpu_op",) if DEVICE.type == "cpu" else ("kernel", "gpu_memcpy", "gpu_memset")
    times: dict[str, list[float]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("cat") in kinds:
            times[event["name"][:160]].append(event["dur"] / 1e3)  # from us
    total = sum(sum(found) for found in times.values())
    most = sorted(times.items(), key=lambda item: -sum(item[1]))[:30]
    top = [
        {"name": name, "ms": sum(found) / steps, "calls": len(found) / steps,
         "share": sum(found) / total}
        for name, found in most
    ]  # fmt: skip
    return {"busy_ms": total / steps, "top": top}


def demo_row(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "run"
        options = ["--preset=demo-gpu"]
        if REHEARSAL:
            options += [*flags(TINY), "--train-minutes=0.001"]
        run(train_command(target, *options))
        return row_of_run(target)


def kill_row(args: argparse.Namespace) -> dict[str, Any]:
    """Twice killed behind a checkpoint, and resumed to the end: are the weights those of a run that
    was left alone, bit for bit?"""
    steps, every = (30, 5) if REHEARSAL else (300, 25)
    options = ["--preset=notebook", "--deterministic", f"--total-steps={steps}", "--no-compile"]
    options += [f"--ckpt-every={every}", "--keep-last=0", *(flags(TINY) if REHEARSAL else [])]
    with tempfile.TemporaryDirectory() as directory:
        alone, killed = Path(directory) / "alone", Path(directory) / "killed"
        run(train_command(alone, *options))
        command, kills = train_command(killed, *options), 0
        for number in (2, 5):
            reached = killed / "checkpoints" / f"checkpoint_{number * every}.pt"
            kills += kill_behind(command, reached)
            command = train_command(killed, *options, "--resume")
        run(command)
        ends = [torch.load(end / "checkpoints" / "checkpoint_model.pt", weights_only=True)
                for end in (alone, killed)]  # fmt: skip
        weights = [tensors_of(end) for end in ends]
        equal = weights[0].keys() == weights[1].keys() and all(
            torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items()
        )
    if not kills:
        sys.exit("error: both runs came to their end before they could be killed")
    return {"kills": kills, "bit_equal": equal, "tensors": len(weights[0])}


def kill_behind(command: list[str], path: Path) -> int:
    """Starts a run and kills it as soon as `path` is there; 0 if it came to its end before."""
    print("+ " + shlex.join(command) + "  # killed", flush=True)
    process = subprocess.Popen(command, cwd=ROOT)
    while process.poll() is None:
        if path.exists():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return 1
        time.sleep(0.005)
    if process.returncode:
        sys.exit(f"error: exit code {process.returncode} before {path.name}")
    return 0


def tensors_of(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else ()
    return {k: t for key, part in items for k, t in tensors_of(part, f"{name}.{key}").items()}


def machine_row(args: argparse.Namespace) -> dict[str, Any]:
    """What the card itself does: a copy, bytes read and written, and matmuls."""
    size = 1 << (20 if REHEARSAL else 32)
    copy = harness.copy_of(size, DEVICE)
    copy.run()
    harness.TINY = REHEARSAL
    seconds = min(harness.device_time(copy, DEVICE, 0.0) for _ in range(3 if REHEARSAL else 20))
    found: dict[str, Any] = {"copy_bytes_per_second": size / seconds}
    limit = 0.001 if REHEARSAL else 0.25
    for name in ("bfloat16", "float32"):
        dtype = select_dtype(name, DEVICE)
        found[f"matmul_{name}_flops"] = matmul_ceiling(DEVICE, dtype, seconds=limit)
    if DEVICE.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {"free_bytes": free, "total_bytes": total}
    return found


ROWS = {
    "machine": machine_row,
    "fastlm": fastlm_row,
    "nanogpt": nanogpt_row,
    "demo": demo_row,
    "kill": kill_row,
}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--name", help="of the row in the results")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--full", action="store_true", help="steps of the preset's 524,288 tokens")
    parser.add_argument("--options", default="", help="fastlm.train's, as one word")
    parser.add_argument("--profile", action="store_true", help="the ten kernels with the most time")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    args = arguments(words)
    row = {"name": args.name or args.row, "program": args.row, "options": args.options}
    row |= {"full": args.full, **ROWS[args.row](args)}
    args.out.write_text(json.dumps({"rows": [row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
