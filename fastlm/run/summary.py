"""What a run says of itself: at the start what it will do, at the end what was measured."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fastlm.config import TrainingConfig
from fastlm.data.files import Data
from fastlm.data.mixture import Mixture
from fastlm.evaluate import Evaluation, bits_per_byte
from fastlm.generate import sample_texts
from fastlm.hardware import device_name, has_fast_bfloat16, synchronize
from fastlm.measure import matmul_ceiling
from fastlm.model import count_parameters, flop_formula
from fastlm.model_interface import describe_model, model_class
from fastlm.run.backends import attention_kernel
from fastlm.step import TrainStep, graphs_compiled


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
        self.knows_all = stored is not None  # another program's checkpoint has no clock
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


_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon and AdamW"}


def describe(data: Data, cfg: TrainingConfig, model: nn.Module, runner: TrainStep) -> None:
    """What the run does, on what, for how long."""
    compiled = "compiled" if cfg.compile else "not compiled (--compile is faster)"
    kernels = ""
    if runner.device.type == "cuda":
        if model_class(model) is None:
            kernels = f", attention by {attention_kernel(cfg, runner.device, runner.dtype)}"
            kernels += ", joint projections" * cfg.joint_projections
        if runner.dtype == torch.float32 and not has_fast_bfloat16(runner.device):
            kernels += " (this GPU has no bfloat16; --dtype float16 is faster)"
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
    if cfg.train_minutes is None:
        note_on_warmup(cfg)
    print(
        f"[run] {length}, {_OPTIMIZERS[cfg.optimizer]}, seed {cfg.seed}, into {cfg.target_dir}",
        flush=True,
    )


def note_on_warmup(cfg: TrainingConfig) -> None:
    if cfg.warmup_iters >= cfg.total_steps:
        print(
            f"[run] note: the rate rises for {cfg.warmup_iters} steps, and the run has "
            f"{cfg.total_steps}: it does not reach its peak; lower --warmup-iters"
        )


def precision(runner: TrainStep) -> str:
    """What the matmuls read, in words."""
    name = str(runner.dtype).removeprefix("torch.")
    by_tf32 = runner.device.type == "cuda" and runner.dtype == torch.float32
    by_tf32 = by_tf32 and has_fast_bfloat16(runner.device)  # Ampere brought both
    by_tf32 = by_tf32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return f"{name} (TF32)" if by_tf32 else name


def measured_ceiling(runner: TrainStep) -> float | None:
    """FLOP/s. Apple's GPU is not measured: the project has none to check the figure on."""
    if runner.device.type == "mps":
        return None
    return matmul_ceiling(runner.device, runner.dtype)


def print_samples(model: Callable[[], nn.Module], data: Data, cfg: TrainingConfig) -> list[str]:
    """Five samples, the first five: none is chosen. Returns them; without a tokenizer, none, and
    `model` is not asked for."""
    if data.tokenizer_json is None:
        print("[sample] none: the data has no tokenizer to turn ids into text")
        return []
    texts = sample_texts(
        model(), data.tokenizer_json, num_samples=5, seed=cfg.seed, context_len=cfg.context_len,
        end_of_text=data.end_of_text,
    )  # fmt: skip
    for index, text in enumerate(texts):
        print(f"[sample {index + 1} of {len(texts)}]\n{text.strip()}\n")
    return texts


def print_summary(
    run: Any,  # fastlm.loop.Run
    final: Evaluation,  # on the validation data
    ceiling: float | None,  # FLOP/s; None if not known
    run_seconds: float,  # everything since the run began
    peaks: list[int | None],  # bytes of memory of each process
) -> dict[str, Any]:
    """Prints what was measured; returns it for the metrics. Seconds are wall-clock."""
    runner, clock, processes = run.runner, run.clock, len(peaks)
    whole = clock.knows_all  # else what follows is of this piece of the run
    steps = run.completed - (0 if whole else run.start_step)
    piece_tokens = run.tokens_seen - run.start_tokens
    tokens = run.tokens_seen if whole else piece_tokens
    step_seconds = clock.all_seconds  # without compilation, evaluations and saves
    speed = tokens / step_seconds if tokens and step_seconds else None  # of all processes
    # Other pieces may have had another number of processes.
    now = piece_tokens / clock.seconds if piece_tokens else None
    of_piece = " in this piece" if run.start_step and whole else ""
    achieved = None if now is None else now * run.flops_per_token
    mfu = achieved / ceiling / processes if achieved and ceiling else None
    recompiles = graphs_compiled() - run.graphs if run.cfg.compile else 0
    skipped, rolled_back = run.watch.report.skipped, runner.guard.rolled_back
    waited, peak = runner.step_loader.waited, None if None in peaks else max(peaks)
    in_bytes = None
    if size := run.data.val_bytes:
        in_bytes = bits_per_byte(final.loss, final.of_targets, size)

    covers = ""
    if run.start_step:
        begin = f"from step {run.start_step} on"
        covers = f"; all pieces, this one {begin}"
        if not whole:
            covers = f"; of this piece, {begin}, the time of others is not known"
    print(
        f"[summary] training    {steps:,} steps, {tokens:,} tokens in {step_seconds:.1f} s: "
        + ("an unknown number of" if speed is None else f"{speed:,.0f}")
        + f" tokens/s in steps, {tokens / run_seconds:,.0f} over the whole run{covers}"
    )
    if processes > 1:
        each = "" if now is None else f", {now / processes:,.0f} tokens/s in steps each{of_piece}"
        print(f"[summary] processes   {processes}{each}")
    if clock.seconds:
        share = waited / clock.seconds
        print(f"[summary] data        {share:.2%} of the steps' time was waiting for batches")
    if skipped or rolled_back:
        print(
            f"[summary] guard       {skipped:,} steps skipped, {rolled_back:,} times back to a "
            f"checkpoint"
        )
    if runner.compile_seconds:
        print(
            f"[summary] compilation {runner.compile_seconds:.1f} s before the clock ran, "
            f"{recompiles} recompilations during the run"
        )
    print(
        f"[summary] model FLOPs {run.flops_per_token / 1e6:.1f} M a token "
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
        + f" {run.memory.what}"
        + f"; the most of {processes}" * (processes > 1)
    )
    said = (
        f", {in_bytes:.4f} bits/byte"
        if in_bytes is not None
        else " (bits/byte unknown: no manifest, several validation sets, or conversations)"
    )
    print(f"[summary] validation  loss {final.loss:.4f} nats/token{said}, {final.extent}")
    return {
        "steps": steps,
        "tokens": tokens,
        "step_seconds": round(step_seconds, 3),
        "run_seconds": round(run_seconds, 3),
        "whole_run": whole,
        "data_wait_seconds": round(waited, 4),
        "tokens_per_second": None if speed is None else round(speed, 1),
        "compile_seconds": round(runner.compile_seconds, 2),
        "recompiles": recompiles,
        "flops_per_token": run.flops_per_token,
        "matmul_ceiling_flops": ceiling,
        "mfu": mfu,
        "peak_memory_bytes": peak,
        "processes": processes,
        "peak_memory_bytes_each": peaks,
        "skipped": skipped,
        "rolled_back": rolled_back,
        "val_loss": final.loss,
        "val_targets": final.targets,
        "bits_per_byte": in_bytes,
    }
