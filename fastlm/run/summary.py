"""What a run says of itself: at the start what it will do, at the end what was measured."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlm.config import TrainingConfig
from fastlm.data.files import Data
from fastlm.data.mixture import Mixture
from fastlm.evaluate import Evaluation
from fastlm.generate import sample_texts
from fastlm.hardware import PeakMemory, device_name, matmul_ceiling, synchronize
from fastlm.model import count_parameters, flop_formula
from fastlm.model_interface import describe_model, model_class
from fastlm.run.backends import attention_kernel
from fastlm.step import TrainStep


class Clock:
    """Time spent in training steps: from `start` to `pause`, which both wait for the device."""

    def __init__(
        self,
        device: torch.device,
        begin: float,  # time.perf_counter() when this piece of the run began
        resumed: Mapping[str, Any] | None = None,  # the checkpoint it goes on from
    ):
        self.device, self._begin = device, begin
        self._before = 0.0  # seconds until the last pause
        self._started: float | None = None
        stored = {"step_seconds": 0.0, "run_seconds": 0.0} if resumed is None else None
        if resumed is not None and isinstance(resumed.get("clock"), Mapping):
            stored = resumed["clock"]
        self.knows_all = stored is not None  # an older version's checkpoint has no clock
        self._earlier, self._earlier_run = (
            float(stored[name]) if stored else 0.0 for name in ("step_seconds", "run_seconds")
        )

    def start(self) -> None:
        synchronize(self.device)
        self._started = time.perf_counter()

    def pause(self) -> None:
        synchronize(self.device)
        self._before = self.seconds
        self._started = None

    @property
    def seconds(self) -> float:
        """In steps, in this process."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._before + running

    @property
    def all_seconds(self) -> float:
        """In steps, in all pieces of the run that are known."""
        return self._earlier + self.seconds

    @property
    def run_seconds(self) -> float:
        """Everything since the run began, in all pieces of it."""
        return self._earlier_run + time.perf_counter() - self._begin

    def state_dict(self) -> dict[str, float]:
        return {"step_seconds": self.all_seconds, "run_seconds": self.run_seconds}


def describe(data: Data, cfg: TrainingConfig, model: nn.Module, runner: TrainStep) -> None:
    """What the run does, on what, for how long."""
    compiled = "compiled" if cfg.compile else "not compiled (--compile is faster)"
    kernels = ""
    if runner.device.type == "cuda" and model_class(model) is None:
        kernels = f", attention by {attention_kernel(cfg, runner.device, runner.dtype)}"
    if cfg.train_minutes is None:
        length = f"{cfg.total_steps:,} steps of {runner.tokens:,} tokens"
    else:
        length = f"as many steps of {runner.tokens:,} tokens as take {cfg.train_minutes:g} minutes"
        if cfg.max_epochs is not None:
            length += f" or {cfg.max_epochs:g} passes over the data"
    print(
        f"[run] model: {count_parameters(model) / 1e6:.2f} M parameters ({describe_model(model)})"
    )
    print(
        f"[run] data: {len(data.train):,} training and {len(data.val):,} validation tokens, "
        f"fingerprint {data.fingerprint[:16]}"
    )
    if isinstance(data.train, Mixture):
        shares = (f"{s.weight:.1%} {s.name}" for s in data.train.sources)
        print(f"[run] samples: {', '.join(shares)}")
    print(
        f"[run] on {runner.device} ({device_name(runner.device)}), torch {torch.__version__}, "
        f"{precision(runner)}, {compiled}{kernels}"
    )
    each = ""
    if runner.world.size > 1:
        each = f"{runner.world.size} processes, {cfg.parallel}, "
    if each or cfg.grad_accum > 1:
        print(
            f"[run] {each}{cfg.grad_accum} micro-batch{'es' * (cfg.grad_accum > 1)} "
            f"of {cfg.batch_size} x {cfg.context_len} tokens{' each' * bool(each)} in a step"
        )
    print(
        f"[run] {length}, seed {cfg.seed}, into {cfg.target_dir}",
        flush=True,
    )


def precision(runner: TrainStep) -> str:
    """What the matmuls read, in words."""
    name = str(runner.dtype).removeprefix("torch.")
    by_tf32 = runner.device.type == "cuda" and runner.dtype == torch.float32
    by_tf32 = by_tf32 and torch.get_float32_matmul_precision() != "highest"
    return f"{name} (TF32)" if by_tf32 else name


@dataclass
class RunFigures:
    """What was measured; seconds are wall-clock."""

    steps: int
    tokens: int
    step_seconds: float  # compilation, evaluation and saving not counted
    run_seconds: float  # everything since the run began
    piece_tokens: int  # in this piece of it, whose processes are known
    piece_seconds: float  # in steps, likewise
    waited_seconds: float  # of them, for batches
    start_step: int  # of this piece of it
    whole: bool  # the four above are those of all pieces, not of this one
    compile_seconds: float
    recompiles: int
    flops_per_token: int
    final: Evaluation  # on the validation data
    peak_memory: PeakMemory
    peaks: list[int | None]  # bytes of each process
    skipped: int
    rolled_back: int
    bits_per_byte: float | None

    @property
    def tokens_per_second(self) -> float | None:
        """None: this piece of the run had no step, and the time of the others is not known."""
        return self.tokens / self.step_seconds if self.tokens and self.step_seconds else None

    @property
    def piece_speed(self) -> float | None:
        """Tokens/s of this piece; None: it had no step."""
        return self.piece_tokens / self.piece_seconds if self.piece_tokens else None

    @property
    def covers(self) -> str:
        if not self.start_step:
            return ""
        if self.whole:
            return f"; all pieces, this one from step {self.start_step} on"
        return f"; of this piece, from step {self.start_step} on, the time of others is not known"


def measured_ceiling(runner: TrainStep) -> float | None:
    """FLOP/s. Apple's GPU is not measured: the project has none to check the figure on."""
    if runner.device.type == "mps":
        return None
    return matmul_ceiling(runner.device, runner.dtype)


def print_samples(
    model: nn.Module,
    tokenizer: str | None,
    seed: int,
    context_len: int | None = None,
    end_of_text: int | None = None,
) -> list[str]:
    """Five samples, the first five: none is chosen. Returns them; without a tokenizer, none."""
    if tokenizer is None:
        print("[sample] none: the data has no tokenizer to turn ids into text")
        return []
    texts = sample_texts(
        model, tokenizer, num_samples=5, seed=seed, context_len=context_len, end_of_text=end_of_text
    )
    for index, text in enumerate(texts):
        print(f"[sample {index + 1} of {len(texts)}]\n{text.strip()}\n")
    return texts


def print_summary(figures: RunFigures, runner: TrainStep, ceiling: float | None) -> dict:
    """Prints the summary; returns it for the metrics. ceiling: FLOP/s, None if not known."""
    speed = figures.tokens_per_second  # of all processes
    now, processes = figures.piece_speed, len(figures.peaks)  # other pieces may have had others
    of_piece = " in this piece" if figures.start_step and figures.whole else ""
    peak = None if None in figures.peaks else max(figures.peaks)
    achieved = None if now is None else now * figures.flops_per_token
    mfu = achieved / ceiling / processes if achieved and ceiling else None

    print(
        f"[summary] training    {figures.steps:,} steps, {figures.tokens:,} tokens in "
        f"{figures.step_seconds:.1f} s: "
        + ("an unknown number of" if speed is None else f"{speed:,.0f}")
        + f" tokens/s in steps, {figures.tokens / figures.run_seconds:,.0f} over the whole run"
        + figures.covers
    )
    if processes > 1:
        each = "" if now is None else f", {now / processes:,.0f} tokens/s in steps each{of_piece}"
        print(f"[summary] processes   {processes}{each}")
    if figures.piece_seconds:
        share = figures.waited_seconds / figures.piece_seconds
        print(f"[summary] data        {share:.2%} of the steps' time was waiting for batches")
    if figures.skipped or figures.rolled_back:
        print(
            f"[summary] guard       {figures.skipped:,} steps skipped, {figures.rolled_back:,} "
            f"times back to a checkpoint"
        )
    if figures.compile_seconds:
        print(
            f"[summary] compilation {figures.compile_seconds:.1f} s before the clock ran, "
            f"{figures.recompiles} recompilations during the run"
        )
    print(
        f"[summary] model FLOPs {figures.flops_per_token / 1e6:.1f} M a token "
        f"({flop_formula(runner.model)})"
        + ("" if achieved is None else f": {achieved / 1e12:.3g} TFLOP/s{of_piece}")
    )
    print(
        "[summary] MFU         "
        + (
            f"{mfu:.1%} of {ceiling / 1e12:.3g} TFLOP/s, the best of several matmul shapes "
            f"measured just now in {precision(runner)}{' by one process' * (processes > 1)}"
            if mfu is not None
            else "unknown (no speed or no matmul ceiling was measured)"
        )
    )
    print(
        "[summary] peak memory "
        + (f"{peak / 2**30:.2f} GiB" if peak is not None else "unknown")
        + f" {figures.peak_memory.what}"
        + f"; the most of {processes}" * (processes > 1)
    )
    in_bytes = (
        f", {figures.bits_per_byte:.4f} bits/byte"
        if figures.bits_per_byte is not None
        else " (bits/byte unknown: no manifest, several validation sets, or conversations)"
    )
    print(
        f"[summary] validation  loss {figures.final.loss:.4f} nats/token{in_bytes}, "
        f"{figures.final.extent}"
    )
    return {
        "steps": figures.steps,
        "tokens": figures.tokens,
        "step_seconds": round(figures.step_seconds, 3),
        "run_seconds": round(figures.run_seconds, 3),
        "whole_run": figures.whole,
        "data_wait_seconds": round(figures.waited_seconds, 4),
        "tokens_per_second": None if speed is None else round(speed, 1),
        "compile_seconds": round(figures.compile_seconds, 2),
        "recompiles": figures.recompiles,
        "flops_per_token": figures.flops_per_token,
        "matmul_ceiling_flops": ceiling,
        "mfu": mfu,
        "peak_memory_bytes": peak,
        "processes": processes,
        "peak_memory_bytes_each": figures.peaks,
        "skipped": figures.skipped,
        "rolled_back": figures.rolled_back,
        "val_loss": figures.final.loss,
        "val_targets": figures.final.targets,
        "bits_per_byte": figures.bits_per_byte,
    }
