"""Steps of fastlm's trainer on gpt2-124m, each --variant in turns with the first, in one process.

    python bench/gpu_turns.py --out FILE --variant NAME=OPTIONS --variant NAME=OPTIONS|nanogpt ...

Steps of 131,072 tokens: what a switch is worth, or how far nanoGPT's model and loop are, in a tenth
of the time of two runs. Everything else as in gpu_rows.py.
"""

import argparse
import gc
import json
import shlex
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_rows
import torch
from nanogpt_peer import ABSENT, nanogpt_folder

from fastlm import TrainingConfig
from fastlm.data.files import open_data
from fastlm.data.loader import TrainLoader
from fastlm.hardware import select_dtype, synchronize
from fastlm.measure import PeakMemory, matmul_ceiling
from fastlm.model import training_flops_per_token
from fastlm.model_loss import ModelLoss
from fastlm.run.backends import backends
from fastlm.run.cli import parse
from fastlm.schedule import learning_rate
from fastlm.step import TrainStep, create_model_and_optimizer, set_seed


@dataclass
class Contender:
    """Whose steps are measured in turns with another's."""

    name: str
    options: str
    cfg: TrainingConfig
    train: Callable[[int, float], torch.Tensor]  # (number, rate) -> loss
    row: dict[str, Any]
    seconds: list[float] = field(default_factory=list)

    def time_step(self, number: int) -> None:
        """From an idle device until it is idle again."""
        synchronize(gpu_rows.DEVICE)
        begin = time.perf_counter()
        with backends(self.cfg):
            loss = self.train(number, learning_rate(number, self.cfg))
        synchronize(gpu_rows.DEVICE)
        self.seconds.append(time.perf_counter() - begin)
        self.row["loss"] = float(loss)

    def measured(self, first: "Contender", ceiling: float) -> dict[str, Any]:
        cfg, seconds = self.cfg, self.seconds[1:]
        tokens = cfg.batch_size * cfg.grad_accum * cfg.context_len
        speed = tokens / statistics.median(seconds)
        others = first.seconds[-len(seconds) :]
        ratio = statistics.median(a / b for a, b in zip(others, seconds, strict=True))
        return {
            "name": f"steps: {self.name}",
            "program": "steps",
            "options": self.options,
            "full": False,
            "steps": len(self.seconds),
            "tokens": tokens * len(self.seconds),
            "tokens_per_second": speed,
            "speed_to_first": ratio,
            "mfu": speed * self.row["flops_per_token"] / ceiling,
            "matmul_ceiling_flops": ceiling,
            "step_seconds": sum(self.seconds),
            **self.row,
        }


def contender(variant: str) -> Contender:
    """NAME=OPTIONS, or NAME=nanogpt, compiled."""
    name, options = variant.split("=", 1)
    device, rehearsal, peer = gpu_rows.DEVICE, gpu_rows.REHEARSAL, options == "nanogpt"
    chosen = gpu_rows.settings(full=True)
    if not rehearsal:
        # Ours in the preset's micro-batches, which follow from the GPU's memory.
        chosen |= {"tokens_per_step": 131_072, **({"batch_size": 16} if peer else {})}
    words = [
        "--preset=gpt2-124m",
        f"--device={device.type}",
        "--compile",
        *gpu_rows.flags(chosen),
    ]
    words += [*([] if peer else shlex.split(options)), *["--no-compile"] * rehearsal]
    cfg = parse(words).config.accumulated(1)
    others = 0  # what is held already
    if device.type == "cuda":
        others = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    with backends(cfg):
        if peer:
            model, _, train = gpu_rows.nanogpt_loop(cfg)
            compile_seconds, flops = gpu_rows.warmed_up(train), gpu_rows.nanogpt_flops(model, cfg)
        else:
            data = open_data((str(gpu_rows.data_directory()),))
            loader = TrainLoader(data.train, cfg.batch_size, cfg.context_len, seed=0, device=device)
            set_seed(cfg.seed)
            model, optimizer, _ = create_model_and_optimizer(cfg)
            runner = TrainStep(ModelLoss(model, device, cfg), optimizer, loader, cfg)
            runner.warm_up()
            compile_seconds = runner.compile_seconds
            flops = training_flops_per_token(model, cfg.context_len)

            def train(number: int, rate: float) -> torch.Tensor:
                return runner.run(number * runner.samples, rate)

    memory = PeakMemory(device)
    memory.sample()
    row = {
        "peak_memory_bytes": memory.bytes - others,
        "compile_seconds": compile_seconds,
        "flops_per_token": flops,
    }
    return Contender(name, options, cfg, train, row)


def rows_in_turns(variants: list[str]) -> Iterator[list[dict[str, Any]]]:
    """After each variant the rows so far. Each is let go before the next is made. RuntimeError at
    the end, naming them, if some could not be measured."""
    torch._dynamo.config.recompile_limit = 4 * len(variants) + 8  # of the code they share
    first, rows, failed = contender(variants[0]), [], []
    ceiling = matmul_ceiling(gpu_rows.DEVICE, select_dtype(first.cfg.dtype, gpu_rows.DEVICE))
    for variant in variants[1:]:
        if variant.endswith("=nanogpt") and nanogpt_folder() is None:
            print(ABSENT)
            continue
        try:
            second = contender(variant)
            for number in range(2 if gpu_rows.REHEARSAL else 7):
                first.time_step(len(first.seconds))
                second.time_step(number)
            rows.append(second.measured(first, ceiling))
        except Exception:  # as of too little memory: the others go on
            traceback.print_exc()
            failed.append(variant)
        else:
            yield [first.measured(first, ceiling), *rows]
        second = None
        gc.collect()
        if gpu_rows.DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    if failed:
        raise RuntimeError(f"not measured: {', '.join(failed)}")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--variant", action="append", required=True, metavar="NAME=OPTIONS")
    args = parser.parse_args(words)
    for rows in rows_in_turns(args.variant):
        # Whole at any time: a call that is cut off has what came before.
        partial = args.out.with_suffix(".partial")
        partial.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        partial.replace(args.out)


if __name__ == "__main__":
    main()
