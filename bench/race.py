"""Quality over time: bits per byte of held-out text, fastlm's trainer beside nanoGPT.

    python bench/race.py --minutes 4 --nanogpt DIR [--data DIR] [--out PREFIX] [-- TRAINER OPTIONS]

Writes PREFIX.json and PREFIX.png (default bench/results/race-DATE). On the CPU of a quiet machine,
one after the other: `python -m fastlm.train --compile --preset demo`, then nanoGPT's model in its
loop, with autocast where that is faster and the fused AdamW. Same token files, layers, heads,
width, context and allocator. The clock runs in training steps only: compilation comes before it,
evaluations stop it. Both are evaluated on the same windows, at the end on every held-out token.

Several --minutes: a run of each length, for a learning rate falls until a run's end. Several
--nanogpt-lr: all of that with each.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peers
import torch
from nanogpt_peer import nanogpt_folder, nanogpt_model, nanogpt_step

from fastlm import TrainingConfig, keep_freed_memory
from fastlm.corpus import default_corpus
from fastlm.data.files import Data, open_data
from fastlm.data.loader import spread_batches
from fastlm.evaluate import bits_per_byte, evaluating, loss_over_all, mean_loss, summed_loss
from fastlm.hardware import autocast, back_heap_with_huge_pages, device_name, select_dtype
from fastlm.presets import PRESETS

CPU = torch.device("cpu")
EVAL_BATCHES = 20


def run_ours(minutes: float, data: Path, options: list[str]) -> dict:
    """A run of the trainer in a process of its own; the figures are its own."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "fastlm.train", "--compile", "--preset", "demo"]
        command += ["--device", "cpu", "--data", str(data), "--target-dir", directory]
        command += ["--train-minutes", str(minutes), "--eval-batches", str(EVAL_BATCHES)]
        command += ["--eval-every", "100", "--log-every", "20", *options]
        print("+ " + " ".join(command), flush=True)
        subprocess.run(command, check=True)
        (path,) = Path(directory).rglob("metrics.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    run = {"trainer": "fastlm", "rate": "", "minutes": minutes, "options": options}
    return run | points_of(rows)


def points_of(rows: list[dict]) -> dict:
    """The curve, as (seconds in steps, mean loss), and the end of a run, from its metrics."""
    config = next(row for row in rows if row["event"] == "start")["config"]
    summary = next(row for row in rows if row["event"] == "summary")
    tokens = config["batch_size"] * config["context_len"] * config["grad_accum"]
    seconds, counted, curve = 0.0, -1, []
    for row in rows:
        if row["event"] == "train":  # the mean speed since the row before
            seconds += (row["step"] - counted) * tokens / row["tokens_per_second"]
            counted = row["step"]
        elif row["event"] == "val" and row["step"] == counted:  # the last has its own below
            curve.append((seconds, row["val_loss"]))
    return {
        "curve": curve,
        "steps": summary["steps"],
        "seconds": summary["step_seconds"],
        "compile_seconds": summary["compile_seconds"],
        "tokens_per_second": summary["tokens_per_second"],
        "bits_per_byte": summary["bits_per_byte"],
    }


def run_nanogpt(minutes: float, data: Data, folder: Path, lr: float, batch_size: int) -> dict:
    """nanoGPT's model in its loop: warm-up, cosine to a tenth of the rate, random batches."""
    preset = {**PRESETS["demo"], "batch_size": batch_size}
    cfg = TrainingConfig(**preset, vocab_size=data.manifest.vocab_size, device="cpu")
    torch.manual_seed(0)
    torch.compiler.reset()
    dtype = select_dtype("auto", CPU)
    model = nanogpt_model(folder, cfg)
    step = nanogpt_step(model, dtype, betas=(0.9, 0.99))
    tokens = np.concatenate(data.train.segments)

    def train(rate: float) -> None:
        x, y = peers.nanogpt_batch(tokens, batch_size, cfg.context_len, CPU)
        step.run(x, y, rate)

    def summed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with autocast(CPU, dtype):
            logits, _ = model(x, x)  # with targets: the logits of all positions
        return summed_loss(logits, y)

    begin = time.perf_counter()
    train(0.0)
    compile_seconds = time.perf_counter() - begin
    train(0.0)
    back_heap_with_huge_pages()
    a_step = np.quantile([timed(train, 0.0) for _ in range(10)], 0.25)
    steps = round(60 * minutes / float(a_step))
    step.optimizer.state.clear()

    seconds, curve = 0.0, []
    for number in range(steps):
        seconds += timed(train, nanogpt_rate(number, steps, lr))
        if number % 100 == 0 and number > 0:
            batches = spread_batches(data.val, batch_size, cfg.context_len, EVAL_BATCHES, CPU)
            with evaluating(model):
                curve.append((seconds, mean_loss(summed, batches)))
    with evaluating(model):
        final = loss_over_all(summed, data.val, batch_size, cfg.context_len, CPU)
    return {
        "trainer": "nanoGPT",
        "rate": f", lr {lr:g}",
        "minutes": minutes,
        "options": [f"lr {lr:g}", f"batch size {batch_size}", str(dtype)],
        "curve": curve,
        "steps": steps,
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "tokens_per_second": steps * batch_size * cfg.context_len / seconds,
        "bits_per_byte": bits_per_byte(final.loss, final.of_targets, data.val_bytes),
    }


def nanogpt_rate(step: int, steps: int, lr: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine down to lr / 10."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, steps - warmup)
    return lr / 10 + 0.5 * (1 + math.cos(math.pi * share)) * (lr - lr / 10)


def timed(work: Callable, *arguments: object) -> float:
    begin = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begin


def draw(runs: list[dict], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=200, layout="tight")
    axes = figure.add_subplot()
    # Ends that lie near each other have their values above and below.
    colors = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728")
    styles = zip(colors, ("bottom", "top") * 2, strict=True)
    for name, group in itertools.groupby(runs, key=lambda run: run["trainer"] + run["rate"]):
        color, above = next(styles)
        for number, run in enumerate(group):
            points = [*run["curve"], (run["seconds"], run["bits_per_byte"])]
            label = None if number else f"{name}, {run['tokens_per_second']:,.0f} tokens/s"
            axes.plot(*zip(*points, strict=True), color=color, label=label, lw=1)
            axes.plot(*points[-1], color=color, marker="o", ms=4)
            axes.annotate(f"{points[-1][1]:.3f}", points[-1], fontsize=7, va=above, ha="right")
    axes.set(xlabel="seconds in training steps", ylabel="held-out bits per byte")
    axes.set_title(title, fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Options after -- are fastlm.train's.")
    parser.add_argument("--minutes", type=float, nargs="+", default=[4.0])
    folder = nanogpt_folder()
    parser.add_argument("--nanogpt", type=Path, default=folder, required=not folder, metavar="DIR")
    parser.add_argument("--data", type=Path, help="a prepared directory (default: the demo's)")
    parser.add_argument("--out", type=Path, metavar="PREFIX")
    rates = dict(type=float, nargs="+", metavar="LR")
    parser.add_argument("--nanogpt-lr", **rates, default=[1e-3], help="its own for small models")
    parser.add_argument("--nanogpt-batch-size", type=int, default=PRESETS["demo"]["batch_size"])
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:split])
    data = open_data((str(directory := args.data or default_corpus()),))
    if data.val_bytes is None:
        parser.error(f"--data {directory}: bits per byte need a prepared directory")
    runs = [run_ours(minutes, directory, sys.argv[split + 1 :]) for minutes in args.minutes]
    keep_freed_memory()  # the trainer does it, too
    runs += [
        run_nanogpt(minutes, data, args.nanogpt, lr, args.nanogpt_batch_size)
        for lr in args.nanogpt_lr
        for minutes in args.minutes
    ]
    for run in runs:
        run["curve"] = [
            (seconds, bits_per_byte(loss, len(data.val) - 1, data.val_bytes))
            for seconds, loss in run["curve"]
        ]
        print(
            f"{run['trainer']}{run['rate']}, {run['minutes']:g} min: "
            f"{run['bits_per_byte']:.4f} bits/byte, "
            f"{run['tokens_per_second']:,.0f} tokens/s, {run['steps']} steps in "
            f"{run['seconds']:.1f} s, compiled before that in {run['compile_seconds']:.1f} s"
        )
    prefix = args.out or Path(__file__).parent / "results" / f"race-{time.strftime('%Y-%m-%d')}"
    title = f"{device_name(CPU)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    race = {"machine": title, "data": data.fingerprint, "runs": runs}
    Path(f"{prefix}.json").write_text(json.dumps(race, indent=1) + "\n")
    draw(runs, Path(f"{prefix}.png"), title)
    print(f"written: {prefix}.json, {prefix}.png")


if __name__ == "__main__":
    main()
