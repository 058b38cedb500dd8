"""The steps of bench/gpu.sh's parts: runs them, each with a limit, and writes what they found.

    python bench/gpu_steps.py PART OUT_DIR

OUT_DIR/gpu-NAME-DATE-PART.json is written anew after every step. A step that takes longer than its
limit, or than what is left of the part's minutes, is ended and said so; the next one runs. The exit
code is 1 if one failed or was cut off.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
REHEARSAL = os.environ.get("DEVICE") == "cpu"
DEVICE = "cpu" if REHEARSAL else "cuda"
PATIENCE = 10 if REHEARSAL else 1  # limits are a GPU machine's
TAIL = 3000  # characters of a step's output that are kept


@dataclass
class Step:
    """A command of a part."""

    name: str
    command: list[str]
    seconds: float  # at most
    # What it found, from its output and the folder that $STEP names; merged into the part's JSON.
    read: Callable[[str, Path], dict[str, Any]] = lambda output, folder: {}
    environment: dict[str, str] | None = None


# --- what is read from a step ---


def of_pytest(output: str, folder: Path) -> dict[str, Any]:
    """{"tests": {...}} from pytest's last line, and the names of what failed."""
    # Not the last line of all: a sanitizer has words of its own behind it.
    (*_, last) = [line for line in output.splitlines() if re.search(r" in \d[\d.]*s", line)]
    counts = {kind: int(number) for number, kind in _COUNTS.findall(last)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S.*)$", output, re.MULTILINE)
    return {"tests": {**counts, "names": failed[:40]}}


_COUNTS = re.compile(r"(\d+) (passed|failed|skipped|deselected|errors?|xfailed)")


def of_benches(output: str, folder: Path) -> dict[str, Any]:
    """The comparisons, also of benches that were ended early."""
    found = [json.loads(path.read_text()) for path in folder.glob("bench-*.json")]
    return {"comparisons": [comparison for run in found for comparison in run["comparisons"]]}


def of_program(output: str, folder: Path) -> dict[str, Any]:
    """What a program beside this one has written to $STEP/found.json."""
    path = folder / "found.json"
    return json.loads(path.read_text()) if path.exists() else {}


# --- the parts ---


def pytest_step(
    name: str, seconds: float, *arguments: str, before: list[str] | None = None, workers: int = 0,
    **environment: str,
) -> Step:  # fmt: skip
    parallel = ["-n", str(workers)] if workers and not REHEARSAL else []
    command = [*(before or []), sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return Step(name, [*command, *parallel, *arguments], seconds, of_pytest, environment)


def bench_step(name: str, seconds: float, keyword: str = "") -> Step:
    """The benches of bench/bench_<name>.py on the device; of a file of several calls a part."""
    selected = f"{DEVICE} and ({keyword})" if keyword else DEVICE
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only"]
    command += [f"bench/bench_{name}.py", "-k", selected, "--results", "$STEP/bench"]
    command += ["--tiny"] if REHEARSAL else []
    return Step(f"bench {name} {keyword}".strip(), command, seconds, of_benches)


def program(name: str, seconds: float, *arguments: str) -> Step:
    """A row of bench/gpu_rows.py."""
    command = [sys.executable, "bench/gpu_rows.py", *arguments, "--name", name]
    return Step(name, [*command, "--out", "$STEP/found.json"], seconds, of_program)


def correctness() -> list[Step]:
    found = sorted(ROOT.glob("tests/interpreted/triton_*_cases.py"))
    cases = [str(path.relative_to(ROOT)) for path in found]
    interpreter = {"TRITON_INTERPRET": "1"} if REHEARSAL else {}
    sample = ["-k", "no_rows or no_decay"] if REHEARSAL else []
    # The sanitizer sees each tensor by itself only if it was allocated by itself.
    watched = {**interpreter, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    small = "test_options and (defaults or together) or anywhere or lengths or many_rows or no_rows"
    small = "no_rows" if REHEARSAL else small

    def sanitizer(tool: str) -> list[str]:
        if REHEARSAL:
            return ["env"]
        return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99"]

    return [
        pytest_step("Triton cases", 200, *cases, *sample, workers=12, **interpreter),
        pytest_step("CUDA tests", 150, "tests/gpu", *_sampled("split or waits"), workers=6),
        pytest_step(
            "ops, optimizers, loader", 120, "tests/ops", "tests/optim",
            "tests/data/test_step_loader.py",
            "-k", "test_same_bits_every_time" if REHEARSAL else "cuda or gpu", workers=12,
        ),
        *(
            pytest_step(tool, 150, *cases, "-k", small, before=sanitizer(tool), **watched)
            for tool in ("memcheck", "racecheck")
        ),
    ]  # fmt: skip


def _sampled(keyword: str) -> list[str]:
    return ["-k", keyword] if REHEARSAL else []


# The cases of a file of benches in several steps, those of the goals first.
LOSSES = (
    ["fp32-0 and not inplace"]
    if REHEARSAL
    else ["bf16 and not inplace", "fp32 and not inplace", "inplace"]
)
HEADS = ["half"] if REHEARSAL else ["default", "small or half"]
OPTIMIZERS = ["split"] if REHEARSAL else ["124", "split or 2000"]


def kernels() -> list[Step]:
    return [
        program("machine", 40, "machine"),
        *(bench_step("cross_entropy", 90, keyword) for keyword in LOSSES),
        *(bench_step("linear_cross_entropy", 90, keyword) for keyword in HEADS),
        *(bench_step("adamw", 60, keyword) for keyword in OPTIMIZERS),
        bench_step("clip_grad_norm", 40),
        bench_step("gather_batch", 40, "32-256" if REHEARSAL else ""),
        bench_step("causal_attention", 120, "fp32 and query" if REHEARSAL else "bf16"),
    ]


@dataclass(frozen=True)
class Row:
    """A run of fastlm.train on gpt2-124m with these options beside the others."""

    name: str
    options: tuple[str, ...] = ()
    full: bool = False  # the preset's own step of 524,288 tokens; else 16 x 1024 tokens, 500 steps
    needs_cuda: bool = False  # a CPU refuses the options; a rehearsal goes without them
    in_turns: bool = True  # its steps are measured in turns with "fastlm", too


# Each switch alone against "fastlm", the ones that matter most first. Add a row for a new one here;
# ROWS chooses among them.
ROWS = [
    Row("fastlm, the preset's step", full=True),
    Row("fastlm, the preset's step in micro-batches of 16", ("--batch-size", "16"), full=True),
    Row("fastlm"),
    Row("separate projections", ("--no-joint-projections",)),
    Row("heads of 128", ("--num-heads", "6")),
    Row("fp8-head", ("--fp8-head",), needs_cuda=True),
    Row("micro-batches of 16", ("--batch-size", "16")),
    Row("residual-dtype float32", ("--residual-dtype", "float32")),
    # Not in turns: for another attention kernel a process compiles all anew.
    Row("attention flash", ("--attention", "flash"), needs_cuda=True, in_turns=False),
    Row("attention cudnn", ("--attention", "cudnn"), needs_cuda=True, in_turns=False),
    Row("compile-mode max-autotune", ("--compile-mode", "max-autotune-no-cudagraphs")),
    Row("no-prefetch", ("--no-prefetch",)),
    Row("guard off", ("--guard", "off")),
    Row("compile-scope block", ("--compile-scope", "block")),
    Row("deterministic", ("--deterministic",)),
    Row(
        "64 x 1024 tokens, 125 steps",
        ("--batch-size", "64", "--tokens-per-step", "65536", "--total-steps", "125"),
        in_turns=False,
    ),
    Row("dtype float32", ("--dtype", "float32")),
    Row("dtype float32, no-tf32", ("--dtype", "float32", "--no-tf32")),
    Row("no-compile", ("--no-compile",), in_turns=False),
]


def trainer() -> list[Step]:
    def options(row: Row) -> str:
        return "" if row.needs_cuda and REHEARSAL else shlex.join(row.options)

    def ours(row: Row) -> Step:
        arguments = [*["--full"] * row.full, f"--options={options(row)}"]
        return program(row.name, 240 if row.full else 150, "fastlm", *arguments)

    full, (plain, *switches) = [r for r in ROWS if r.full], [r for r in ROWS if not r.full]
    variants = [(plain.name, ""), ("nanoGPT", "nanogpt")]
    variants += [(row.name, options(row)) for row in switches if row.in_turns]
    turns = [sys.executable, "bench/gpu_turns.py", *(f"--variant={n}={o}" for n, o in variants)]
    return [
        program("machine", 40, "machine"),
        program("nanoGPT, the preset's step", 200, "nanogpt", "--full"),
        *map(ours, full),
        Step("in turns", [*turns, "--out", "$STEP/found.json"], 300, of_program),
        program("nanoGPT", 100, "nanogpt"),
        ours(plain),
        *(program(f"profile of {name}", 90, name, "--profile") for name in ("nanogpt", "fastlm")),
        *map(ours, switches),
    ]


def presets() -> list[Step]:
    doctor = [sys.executable, "-m", "fastlm.doctor", f"--device={DEVICE}"]
    doctor += ["--preset", "demo" if REHEARSAL else "gpt2-124m"]
    return [
        program("killed and resumed", 150, "kill"),
        Step("doctor", doctor, 60),  # its forecast is in the tail, to be held against trainer's
        program("demo-gpu", 420, "demo"),
        bench_step("train_step", 150, "demo" if REHEARSAL else "notebook"),
    ]


PARTS = {
    "setup": list,
    "correctness": correctness,
    "kernels": kernels,
    "trainer": trainer,
    "presets": presets,
}


def steps_of(part: str) -> list[Step]:
    chosen = re.compile(os.environ.get("ROWS", ""))
    return [step for step in PARTS[part]() if chosen.search(step.name)]


# --- running them ---


def run_step(step: Step, seconds: float) -> dict[str, Any]:
    """Runs it for `seconds` at most; how it went, and what it found also if it was ended."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        environment = {**os.environ, **(step.environment or {}), "STEP": directory}
        command = [word.replace("$STEP", directory) for word in step.command]
        begin = time.perf_counter()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
                stderr=subprocess.STDOUT, errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:  # a tool that this machine lacks
            told = {"name": step.name, "command": shlex.join(step.command), "exit_code": 127}
            print(f"[gpu] {step.name}: {error}", flush=True)
            told |= {"seconds": 0.0, "limit": round(seconds, 1), "cut_off": False}
            return {**told, "found": {}, "tail": str(error)}
        try:
            output, _ = process.communicate(timeout=max(1.0, seconds))
            cut_off = False
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # its children, too
            output, _ = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            cut_off = True
        told = {
            "name": step.name,
            "command": shlex.join(step.command),
            "seconds": round(time.perf_counter() - begin, 1),
            "limit": round(seconds, 1),
            "exit_code": None if cut_off else process.returncode,
            "cut_off": cut_off,
        }
        try:
            found = step.read(output or "", folder)
        except (ValueError, LookupError) as error:  # half a file, no last line
            found = {"unreadable": repr(error)}
    print(f"[gpu] {step.name}: {json.dumps(told)}", flush=True)
    if cut_off or process.returncode:
        print((output or "")[-TAIL:], flush=True)
    return {**told, "found": found, "tail": (output or "")[-TAIL:]}


def ask(expression: str) -> Any:
    """The value of an expression in a process of its own, which leaves no CUDA context behind."""
    code = f"import json, sys; sys.path.insert(0, {str(BENCH)!r}); import harness, torch; "
    code += f"print(json.dumps({expression}, default=str))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def run_part(part: str, out: Path, minutes: float, used: float) -> int:
    """used: seconds of the minutes that are gone."""
    deadline = time.perf_counter() + 60 * minutes - used
    results = ask(f"harness.circumstances({['bench/gpu.sh', part]!r})")
    gpu = results["gpu"] or "rehearsal"
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")
    path = out / f"gpu-{name}-{results['date'][:10]}-{part}.json"
    # report.py shows comparisons and rows; the rest tells how they came about.
    results |= {"part": part, "allocator": "as-is", "comparisons": [], "rows": [], "steps": []}

    def write() -> None:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1, default=str) + "\n")
        partial.replace(path)

    write()
    for step in steps_of(part):
        left = deadline - time.perf_counter()
        if left < 10:
            told = {"name": step.name, "exit_code": None, "cut_off": True, "seconds": 0.0}
            results["steps"].append({**told, "limit": 0.0, "command": shlex.join(step.command)})
            print(f"[gpu] {step.name}: not begun, {left:.0f} s are left", flush=True)
        else:
            told = run_step(step, min(step.seconds * PATIENCE, left - 5))
            found = told.pop("found")
            for kind in ("comparisons", "rows"):
                results[kind] += found.pop(kind, [])
            results["steps"].append({**told, **found})
        write()
    print(f"[gpu] {part}: {path}")
    return int(any(step["exit_code"] != 0 for step in results["steps"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--started", type=float, default=0.0, help="seconds that are gone")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # no step stays
    return run_part(args.part, args.out, float(os.environ.get("MINUTES", "9")), args.started)


if __name__ == "__main__":
    sys.exit(main())
