"""What this machine has, and what a run would take on it: python -m fastlm.doctor [settings]

The settings are those of python -m fastlm.train, which this command does not start. It writes
nothing and takes about 15 seconds.

Exit codes
    0    nothing was found that would stop the run
    1    something was: the last lines say what, and what to do
    2    a setting cannot be, as the trainer would say
"""

import contextlib
import io
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastlm.checkpoint_reading import read_values
from fastlm.config import TrainingConfig
from fastlm.corpus import VOCAB_SIZE
from fastlm.data.files import Data, open_data
from fastlm.errors import CompileError, OutputError, UserError, run_command
from fastlm.extension import extension
from fastlm.hardware import (
    DTYPES,
    check_compiler,
    cxx_compiler,
    device_name,
    select_device,
    select_dtype,
)
from fastlm.measure import copy_rate, free_memory, matmul_ceiling
from fastlm.model_interface import describe_model
from fastlm.ops.dispatch import IMPLEMENTATIONS, active_implementation
from fastlm.parallel.world import ALONE
from fastlm.run.backends import backends
from fastlm.run.cli import Invocation, parse
from fastlm.run.directory import RunDirectory
from fastlm.run.environment import environment
from fastlm.run.estimate import Memory, Sizes, StepTime, memory_needed, step_time
from fastlm.run.resume import Resumed, load_weights
from fastlm.run.track import check_trackers
from fastlm.step import create_model, restart_at_documents

_PROGRAM = "#include <Python.h>\n#include <omp.h>\n#include <vector>\nstd::vector<int> v(3);\n"


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    problems: list[str] = []

    def command() -> None:
        invocation = parse(
            argv,
            read_values,  # of a checkpoint not the tensors
            prog="python -m fastlm.doctor",
            description="Tell what this machine has, and what a run with these settings takes.",
        )
        problems.extend(examine(invocation))
        for problem in problems:
            _say("PROBLEM", problem)
        if not problems:
            _say("result", "nothing was found that would stop this run")

    return run_command(command) or int(bool(problems))


def examine(invocation: Invocation) -> list[str]:
    """Prints what there is. Returns what would stop the run, each with what to do."""
    cfg, problems = invocation.config, []

    def attempt(action: Callable[[], Any]) -> Any:
        """The action's result; None, and a problem, if the user must mend something first."""
        try:
            return action()
        except UserError as error:
            problems.append(" ".join(str(error).splitlines()))
            return None

    print(f"[doctor] settings: preset {invocation.preset}; --print-config shows them all")
    device = attempt(lambda: select_device(cfg.device))
    if (error := compiler_error(device or torch.device("cpu"))) and cfg.compile:
        problems.append(error)
    if attempt(extension) is None or device is None:
        return problems
    dtype = select_dtype(cfg.dtype, device)
    _tell_machine(cfg, device, dtype)
    data, cfg = attempt(lambda: _with_data(cfg, invocation.origins)) or (None, cfg)
    if data is not None:
        attempt(lambda: data.check_windows(cfg.context_len, training=not cfg.eval_only))
    attempt(lambda: _check_model(cfg, data, invocation.resumed))
    attempt(lambda: check_trackers(cfg.track))
    if invocation.origins["target_dir"] != "time" and not cfg.eval_only:  # else it is a new one
        attempt(RunDirectory(cfg, invocation.resumed).check_owner)

    with contextlib.ExitStack() as stack:
        known = len(problems)
        # Nothing that is timed here is compiled.
        attempt(lambda: stack.enter_context(backends(replace(cfg, compile=False))))
        if len(problems) > known:  # kernels that are not there
            cfg = replace(cfg, fp8_head=False, attention="auto", residual_dtype="auto")
        ceiling = _tell_rates(device, dtype)
        attempt(lambda: _tell_run(cfg.accumulated(1), device, ceiling, problems))
    return problems


def compiler_error(device: torch.device) -> str | None:
    """Says which compiler torch.compile would take. None if it works; else why not."""
    try:
        check_compiler(device)
        compiler = cxx_compiler()
        if compiler is not None:
            with tempfile.TemporaryDirectory() as directory:
                done = subprocess.run(
                    [
                        compiler, "-x", "c++", "-std=c++17", "-shared", "-fPIC", "-fopenmp",
                        f"-I{sysconfig.get_path('include')}", "-", "-o", f"{directory}/a.so",
                    ],
                    input=_PROGRAM, capture_output=True, text=True,
                )  # fmt: skip
            if done.returncode:
                reason = [line for line in done.stderr.splitlines() if "error" in line]
                raise CompileError(
                    f"{compiler} cannot build what --compile needs "
                    f"({(reason or ['no reason'])[0][:200]}); install a C++ compiler with OpenMP "
                    f"(Debian, Ubuntu: apt-get install g++), or drop --compile"
                )
            version = subprocess.run([compiler, "--version"], capture_output=True, text=True)
            name = version.stdout.splitlines()[0] if version.stdout else compiler
            _say("compiler", f"{name}, builds what --compile needs")
    except CompileError as error:
        _say("compiler", f"none for --compile: {error}")
        return str(error)
    return None


def _with_data(cfg: TrainingConfig, origins: dict[str, str]) -> tuple[Data | None, TrainingConfig]:
    """Says what the data is. Returns it, None for what the run makes itself, and `cfg` with its
    vocabulary. Raises UserError."""
    if not cfg.data:
        _say("data", "the Python standard library's source, tokenised when it is first used")
        return None, cfg.with_vocabulary(VOCAB_SIZE, origins["vocab_size"])
    with contextlib.redirect_stdout(io.StringIO()):  # a line for each file
        data = open_data(cfg.data, cfg.val_data, dtype=cfg.data_dtype, verify=False)
    _say("data", f"{len(data.train):,} training and {len(data.val):,} validation tokens")
    if data.manifest is not None:
        cfg = cfg.with_vocabulary(data.manifest.vocab_size, origins["vocab_size"])
    return data, cfg


def _check_model(cfg: TrainingConfig, data: Data | None, resumed: Resumed | None) -> None:
    """Raises UserError if a model of these settings cannot train on this data, or not begin with
    the weights that --resume or --init-from name."""
    model = create_model(cfg, meta=True)
    if data is not None:
        restart_at_documents(model, data, cfg)
    with contextlib.redirect_stdout(io.StringIO()):  # what the trainer says of it
        tokenizer = None if data is None else data.tokenizer_json
        load_weights(model, cfg, resumed, ALONE, tokenizer=tokenizer)
        if resumed and data is not None and not cfg.eval_only:
            resumed.check(data, cfg)


def _tell_machine(cfg: TrainingConfig, device: torch.device, dtype: torch.dtype) -> None:
    now = environment(device, dtype, compiled=cfg.compile)
    has = [name for name, there in extension().cpu_features().items() if there]
    versions = [f"{name} {now[name] or 'missing'}" for name in ("fastlm", "torch", "numpy")]
    _say("machine", f"{device} ({device_name(device)}), {_gib(free_memory(device))} GiB free")
    capability = torch.backends.cpu.get_cpu_capability()
    _say("CPU", f"{', '.join(has) or 'portable code'}; torch uses {capability}")
    _say(
        "versions",
        f"Python {platform.python_version()}, {', '.join(versions)}, triton {now['triton']}",
    )
    ops = {op: active_implementation(op, device, dtype) for op in IMPLEMENTATIONS}
    _say("ops", ", ".join(f"{op}: {name}" for op, name in ops.items()))


def _tell_rates(device: torch.device, dtype: torch.dtype) -> float | None:
    """Measures. Returns the FLOP/s of matmuls in `dtype`."""
    if device.type == "mps":
        _say("matmul", "not measured on Apple's GPU")
        return None
    rates = {name: matmul_ceiling(device, d, seconds=0.05) for name, d in DTYPES.items()}
    _say(
        "matmul",
        ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in rates.items())
        + f" TFLOP/s; this run computes in {str(dtype).removeprefix('torch.')}",
    )
    _say("copy", f"{copy_rate(device) / 1e9:.1f} GB/s, read and written")
    return next(rate for name, rate in rates.items() if DTYPES[name] == dtype)


def _tell_run(
    cfg: TrainingConfig, device: torch.device, ceiling: float | None, problems: list[str]
) -> None:
    """Prints what the run takes; adds to `problems` what is not there."""
    sizes = Sizes.of(cfg)
    described = describe_model(create_model(cfg, meta=True))
    _say("model", f"{sizes.parameters / 1e6:.2f} M parameters ({described})")
    memory, free = memory_needed(cfg, sizes, device), free_memory(device)
    _tell_memory(memory, device, free)
    if free is not None and memory.on(device) > free:
        # Compiled, gpt2-124m took an H200 0.63 to 0.74 of what its gradients and activations are
        # estimated at: a run that needs less than 0.6 of them may fit.
        least = memory.on(device) - (int(0.4 * memory.working) if cfg.compile else 0)
        if least > free:
            advice = (
                "lower --batch-size (raise --grad-accum to keep the step's tokens) or "
                "--context-len, or add --activation-checkpointing"
            )
            if memory.weights + memory.moments > free:
                advice = "choose a smaller model, or several devices with --parallel fsdp"
            problems.append(
                f"memory: a step takes {'at least' if cfg.compile else 'about'} {_gib(least)} GiB "
                f"and {_gib(free)} GiB are free; {advice}"
            )
        timed = None
    else:
        timed = step_time(cfg, device, ceiling, free) if ceiling else None
    steps = _tell_time(cfg, sizes, ceiling, timed)
    _tell_disk(replace(cfg, total_steps=steps), sizes, problems)


def _tell_memory(memory: Memory, device: torch.device, free: int | None) -> None:
    parts = [
        f"weights {_gib(memory.weights)}",
        f"moments {_gib(memory.moments)}",
        f"gradients and activations {_gib(memory.working)}",
    ]
    host = [f"a copy for checkpoints {_gib(memory.copy)}", f"the process {_gib(memory.process)}"]
    parts += [] if device.type == "cuda" else host
    _say(
        "memory",
        f"about {_gib(memory.on(device))} GiB of {_gib(free)} that are free, less with --compile: "
        f"{', '.join(parts)}",
    )


def _tell_time(
    cfg: TrainingConfig, sizes: Sizes, ceiling: float | None, timed: StepTime | None
) -> int:
    """Returns how many steps the run has; where its minutes decide, no less than it will have."""
    tokens = cfg.batch_size * cfg.grad_accum * cfg.context_len
    least = sizes.flops_per_token * tokens / ceiling if ceiling else None
    if timed is not None:
        _say(
            "step",
            f"{timed.seconds:.3g} s for {tokens:,} tokens, not compiled: "
            f"{tokens / timed.seconds:,.0f} tokens/s (from models of "
            f"{' and '.join(map(str, timed.layers))} of {cfg.num_layers} layers, "
            f"{timed.batch_size} of {cfg.batch_size} windows)",
        )
    elif least is not None:
        _say("step", "not timed: too large a model to try a step of it here in a few seconds")
    slowest = timed.seconds if timed else None
    if cfg.train_minutes is not None:
        most, few = (
            max(10, round(cfg.train_minutes * 60 / seconds)) if seconds else None
            for seconds in (least, slowest)
        )
        about = f": about {few:,} of them, not compiled" if few else ""
        passes = f" or {cfg.max_epochs:g} passes over the data" if cfg.max_epochs else ""
        _say("time", f"{cfg.train_minutes:g} minutes of steps{passes}, as asked{about}")
        return most or cfg.total_steps
    known = [
        f"{_duration(cfg.total_steps * seconds)} {what}"
        for seconds, what in ((slowest, "not compiled"), (least, "for the matmuls alone"))
        if seconds is not None
    ]
    _say("time", f"{cfg.total_steps:,} steps: {', '.join(known) or 'unknown'}")
    return cfg.total_steps


def _tell_disk(cfg: TrainingConfig, sizes: Sizes, problems: list[str]) -> None:
    place = Path(cfg.ckpt_dir).absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"{place}: cannot be written; choose another --target-dir")
    status = os.statvfs(place)
    free = (status.f_bfree if os.geteuid() == 0 else status.f_bavail) * status.f_frsize
    needed = sizes.disk(cfg)
    _say(
        "checkpoints",
        f"{sizes.checkpoint / 1e6:,.0f} MB each, at most {needed / 1e6:,.0f} MB at a time; "
        f"{free / 1e6:,.0f} MB are free under {place}",
    )
    if status.f_blocks and needed > free:
        problems.append(
            f"disk: the run's checkpoints take up to {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} "
            f"MB are free under {place}; make room, choose another --target-dir, or keep fewer "
            f"(--keep-last)"
        )


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.2f}"


def _say(name: str, text: str) -> None:
    print(f"[doctor] {name:<11} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
