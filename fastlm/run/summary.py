"""What a run says of itself: at the start what it will do, at the end what was measured."""

import time
from dataclasses import dataclass

import torch

from fastlm.config import TrainingConfig
from fastlm.data.files import Data
from fastlm.evaluate import Evaluation
from fastlm.hardware import device_name, matmul_ceiling, peak_memory_bytes, synchronize
from fastlm.model import TransformerLM, count_parameters
from fastlm.step import TrainStep

FLOP_FORMULA = "6 * matmul weights + 6 * layers * context_len * d_model"


class Clock:
    """Time spent in training steps: from `start` to `pause`, which both wait for the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self._before = 0.0  # seconds until the last pause
        self._started: float | None = None

    def start(self) -> None:
        synchronize(self.device)
        self._started = time.perf_counter()

    def pause(self) -> None:
        synchronize(self.device)
        self._before = self.seconds
        self._started = None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._before + running


def describe(data: Data, cfg: TrainingConfig, model: TransformerLM, runner: TrainStep) -> None:
    """What the run does, on what, for how long."""
    compiled = "compiled" if cfg.compile else "not compiled (--compile is faster)"
    length = (
        f"as many steps as take {cfg.train_minutes:g} minutes"
        if cfg.train_minutes is not None
        else f"{cfg.total_steps:,} steps"
    )
    print(
        f"[run] model: {count_parameters(model) / 1e6:.2f} M parameters ({cfg.num_layers} layers, "
        f"d_model {cfg.d_model}, {cfg.num_heads} heads, vocabulary {cfg.vocab_size})"
    )
    print(
        f"[run] data: {len(data.train):,} training and {len(data.val):,} validation tokens, "
        f"fingerprint {data.fingerprint[:16]}"
    )
    print(
        f"[run] on {runner.device} ({device_name(runner.device)}), torch {torch.__version__}, "
        f"{str(runner.dtype).removeprefix('torch.')}, {compiled}"
    )
    print(
        f"[run] {length} of {runner.tokens:,} tokens, seed {cfg.seed}, into {cfg.target_dir}",
        flush=True,
    )


@dataclass
class RunFigures:
    """What was measured; seconds are wall-clock."""

    steps: int
    tokens: int
    step_seconds: float  # compilation, evaluation and saving not counted
    run_seconds: float  # everything since the run began
    compile_seconds: float
    recompiles: int
    flops_per_token: int
    final: Evaluation  # on the validation data
    bits_per_byte: float | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds if self.step_seconds else 0.0


def print_summary(figures: RunFigures, device: torch.device, dtype: torch.dtype) -> dict:
    """Measures ceiling and peak memory, prints the summary, returns it for metrics.jsonl."""
    dtype_name = str(dtype).removeprefix("torch.")
    peak = peak_memory_bytes(device)
    achieved = figures.tokens_per_second * figures.flops_per_token
    # Apple's GPU is not measured: the project has none to check the figure on.
    ceiling = None if device.type == "mps" else matmul_ceiling(device, dtype)
    mfu = achieved / ceiling if ceiling else None

    print(
        f"[summary] training    {figures.steps:,} steps, {figures.tokens:,} tokens in "
        f"{figures.step_seconds:.1f} s: {figures.tokens_per_second:,.0f} tokens/s in steps, "
        f"{figures.tokens / figures.run_seconds:,.0f} over the whole run"
    )
    if figures.compile_seconds:
        print(
            f"[summary] compilation {figures.compile_seconds:.1f} s before the clock ran, "
            f"{figures.recompiles} recompilations during the run"
        )
    print(
        f"[summary] model FLOPs {figures.flops_per_token / 1e6:.1f} M a token ({FLOP_FORMULA}): "
        f"{achieved / 1e12:.3g} TFLOP/s"
    )
    print(
        "[summary] MFU         "
        + (
            f"{mfu:.1%} of {ceiling / 1e12:.3g} TFLOP/s, the best of several matmul shapes "
            f"measured just now in {dtype_name}"
            if mfu is not None
            else "unknown (no matmul ceiling is measured on this device)"
        )
    )
    print(
        "[summary] peak memory "
        + (f"{peak / 2**30:.2f} GiB" if peak is not None else "unknown")
        + (" on the device" if device.type == "cuda" else " of the process")
    )
    in_bytes = (
        f", {figures.bits_per_byte:.4f} bits/byte"
        if figures.bits_per_byte is not None
        else " (bits/byte unknown: the data has no manifest)"
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
        "tokens_per_second": round(figures.tokens_per_second, 1),
        "compile_seconds": round(figures.compile_seconds, 2),
        "recompiles": figures.recompiles,
        "flops_per_token": figures.flops_per_token,
        "matmul_ceiling_flops": ceiling,
        "mfu": mfu,
        "peak_memory_bytes": peak,
        "val_loss": figures.final.loss,
        "val_targets": figures.final.targets,
        "bits_per_byte": figures.bits_per_byte,
    }
