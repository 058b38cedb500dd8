"""Measures ours and its peers interleaved in one process, against what the machine itself can do.

A round runs every peer once and ours once, in an order that turns, so that whatever else the
machine does hits all of them; ratios are medians over rounds of the times within one round. What
runs is checked first: a wrong result is never timed. pytest-benchmark measures ours, the harness
the peers, with the same clock and the same synchronisation.

The time is that of one call, from an idle device until it is idle again. On CUDA each candidate
also runs while the device still works on something else, so that the host is ahead and CUDA events
tell the device's own time, with nothing of the inputs in the L2 cache.
"""

import gc
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import fastlm
from fastlm import active_implementation
from fastlm.extension import extension
from fastlm.hardware import device_name, synchronize
from fastlm.measure import matmul_ceiling
from fastlm.ops.dispatch import IMPLEMENTATIONS

ROOT = Path(__file__).resolve().parents[1]
# --tiny: a rehearsal of every line, with shapes that take no time. Its figures say nothing.
TINY = False
OURS = "fastlm"
COPY, MATMUL = "copy", "matmul"  # what the machine itself does: as many bytes, as many FLOPs


@dataclass
class Candidate:
    """Something that does the work."""

    run: Callable[[], object]
    setup: Callable[[], object] | None = None  # before every run, not timed


@dataclass
class Work:
    """What the work cannot do without. It is compared with the machine's own time for as much."""

    formula: str  # how it was counted
    bytes: int = 0  # read + written; a copy of as many is timed in every round
    flops: int = 0  # the fastest matmul of `dtype` is measured before and after
    dtype: torch.dtype = torch.float32


@dataclass
class Row:
    name: str
    median_ms: float
    quartiles_ms: tuple[float, float]
    best_ms: float
    ratio_to_ours: float  # median over the rounds; above 1: slower than ours
    best_to_ours: float  # of the best rounds: what is left where the machine was busy otherwise
    rate: float  # GB/s or TFLOP/s, at the median
    device_ms: float | None = None  # CUDA: median of the events' time
    device_ratio_to_ours: float | None = None


@dataclass
class Comparison:
    op: str  # as its files are called, or "train_step"
    case: str  # stays the same from one commit to the next
    note: str  # what may change: chunks, bytes
    impl: str | None
    device: str
    work: str  # the formula, and the count
    rounds: int
    load_average: float  # of the minute before
    unit: str  # of the rate
    rows: list[Row] = field(default_factory=list)
    # A training step's time by kind of work, of step_profile.py; that of other ops is not split.
    split_ms: dict[str, float] | None = None

    def table(self) -> str:
        lines = [
            f"### {self.op}: {self.case} ({self.device})",
            "",
            "; ".join(
                part
                for part in (
                    self.note,
                    self.impl and f'impl "{self.impl}"',
                    self.work,
                    f"{self.rounds} rounds",
                )
                if part
            ),
            "",
            f"| | median ms | best ms | time / ours | best / ours | {self.unit} | device ms |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            on_device = "" if row.device_ms is None else f"{row.device_ms:.4g}"
            lines.append(
                f"| {row.name} | {row.median_ms:.4g} | {row.best_ms:.4g} | "
                f"{row.ratio_to_ours:.2f} | {row.best_to_ours:.2f} | {row.rate:.3g} | "
                f"{on_device} |"
            )
        if self.split_ms:
            parts = ", ".join(f"{kind} {ms:.4g}" for kind, ms in self.split_ms.items())
            lines += ["", f"ms of ours, under the profiler: {parts}"]
        return "\n".join(lines)


COMPARISONS: list[Comparison] = []  # of this run; conftest.py prints and saves them


def compare(
    benchmark,  # pytest-benchmark's fixture
    op: str,
    case: str,
    device: torch.device,
    ours: Candidate,
    peers: dict[str, Candidate],
    work: Work,
    *,
    note: str = "",
    seconds: float = 5.0,  # of measuring
    least_rounds: int = 5,
) -> Comparison:
    """Times all candidates; the caller has checked their results."""
    if TINY:
        seconds, least_rounds = 0.0, 1
    elif device.type == "cuda":
        seconds = min(seconds, 1.0)  # tens of rounds, whose times differ little
    gc.collect()  # a process that holds the memory of the last comparison measures the allocator
    peers = dict(peers)
    if work.bytes:
        peers[COPY] = copy_of(work.bytes, device)
    else:
        matmul_limit(device, work.dtype)

    def timed(candidate: Candidate) -> float:
        if candidate.setup:
            candidate.setup()
        synchronize(device)
        start = time.perf_counter()
        candidate.run()
        synchronize(device)
        return time.perf_counter() - start

    def run_ours() -> None:
        ours.run()
        synchronize(device)

    # Both clocks: a rehearsal without CUDA goes through the lines of the device's, too.
    two_clocks = device.type == "cuda" or TINY
    leads: dict[str, float] = {}  # seconds that the host takes to enqueue a run
    for name, candidate in (*peers.items(), (OURS, ours)):
        timed(candidate)  # warm caches, compiled graphs, optimizer states
        if two_clocks:
            leads[name] = seconds_to_enqueue(candidate, device)
    load_average = os.getloadavg()[0]
    begin = time.perf_counter()
    for candidate in (*peers.values(), ours):
        timed(candidate)
    a_round = time.perf_counter() - begin
    rounds = max(least_rounds, min(500, int(seconds / a_round)))

    times: dict[str, list[float]] = {name: [] for name in peers}
    device_times: dict[str, list[float]] = {name: [] for name in (OURS, *peers)}
    order = list(peers)

    def time_the_peers() -> None:
        order.append(order.pop(0))
        for name in order:
            times[name].append(timed(peers[name]))
        if two_clocks:
            for name in order:
                device_times[name].append(device_time(peers[name], device, leads[name]))
            device_times[OURS].append(device_time(ours, device, leads[OURS]))
        if ours.setup:
            ours.setup()
        synchronize(device)

    benchmark.pedantic(run_ours, setup=time_the_peers, rounds=rounds, iterations=1)
    times = {OURS: list(benchmark.stats.stats.data), **times}
    comparison = Comparison(
        op=op,
        case=case,
        note=note,
        impl=active_implementation(op, device) if op in IMPLEMENTATIONS else None,
        device=device_name(device),
        work=work.formula,
        rounds=rounds,
        load_average=load_average,
        unit="GB/s" if work.bytes else "TFLOP/s",
    )
    _fill(comparison, times, device_times if two_clocks else {}, work, device)
    COMPARISONS.append(comparison)
    return comparison


def _fill(
    comparison: Comparison,
    times: dict[str, list[float]],
    device_times: dict[str, list[float]],
    work: Work,
    device: torch.device,
) -> None:
    seconds = {name: np.array(values) for name, values in times.items()}
    ours = seconds[OURS]
    if work.bytes:
        count = work.bytes / 1e9
        comparison.work += f": {work.bytes / 1e6:,.4g} MB"
    else:
        count = work.flops / 1e12
        comparison.work += f": {count:.4g} TFLOP"
        seconds[MATMUL] = np.full(len(ours), work.flops / matmul_limit(device, work.dtype))
    for name, values in seconds.items():
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        row = Row(
            name=name,
            median_ms=1e3 * median,
            quartiles_ms=(1e3 * low, 1e3 * high),
            best_ms=1e3 * values.min(),
            ratio_to_ours=float(np.median(values / ours)),
            best_to_ours=values.min() / ours.min(),
            rate=count / median,
        )
        if name in device_times:
            on_device = np.array(device_times[name])
            row.device_ms = 1e3 * float(np.median(on_device))
            row.device_ratio_to_ours = float(np.median(on_device / device_times[OURS]))
        comparison.rows.append(row)


def seconds_to_enqueue(candidate: Candidate, device: torch.device) -> float:
    """How long the host is busy with a run, of a candidate that is warm."""
    if candidate.setup:
        candidate.setup()
    synchronize(device)
    start = time.perf_counter()
    candidate.run()
    seconds = time.perf_counter() - start
    synchronize(device)
    return seconds


def device_time(candidate: Candidate, device: torch.device, lead: float) -> float:
    """Seconds between two events around a run that the host has enqueued beforehand.

    lead: seconds_to_enqueue, which the device is kept busy for (50 ms at most). Of a candidate that
    waits for the device inside, the host's time from there on counts, too.
    """
    if candidate.setup:
        candidate.setup()
    flush = 1 << (12 if TINY else 28)
    torch.empty(flush, dtype=torch.int8, device=device).zero_()  # nothing of ours is left in L2
    if device.type == "cuda":
        # In cycles of at most 2 GHz; half as long again, and the least that two events want.
        torch.cuda._sleep(int(2e9 * min(0.05, 1.5 * lead + 5e-4)))
    start, end = _event(device), _event(device)
    start.record()
    candidate.run()
    end.record()
    synchronize(device)
    return 1e-3 * start.elapsed_time(end)


class HostEvent:
    """torch.cuda.Event's interface by the host's clock, for a rehearsal without CUDA."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: "HostEvent") -> float:
        return 1e3 * (end.time - self.time)


def _event(device: torch.device) -> "torch.cuda.Event | HostEvent":
    return torch.cuda.Event(enable_timing=True) if device.type == "cuda" else HostEvent()


def copy_of(num_bytes: int, device: torch.device) -> Candidate:
    """A copy that reads and writes `num_bytes` in all: in pieces of at most 1 GB of traffic."""
    words = num_bytes // 16  # of 8 bytes, each read and written
    size = min(words, 1 << 26)
    source = torch.ones(size, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    whole, rest = divmod(words, size)

    def run() -> None:
        for _ in range(whole):
            target.copy_(source)
        target[:rest].copy_(source[:rest])

    return Candidate(run)


_MATMUL_LIMITS: dict[tuple[torch.device, torch.dtype], float] = {}


def matmul_limit(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s: the best of what was measured in this run, now and before."""
    measured = matmul_ceiling(device, dtype, seconds=0.001 if TINY else 0.25)
    _MATMUL_LIMITS[device, dtype] = max(measured, _MATMUL_LIMITS.get((device, dtype), 0.0))
    return _MATMUL_LIMITS[device, dtype]


def circumstances(arguments: list[str]) -> dict[str, object]:
    """What a figure means nothing without. arguments: of the command."""
    cuda = torch.cuda.is_available()
    packages = ("torch", "numpy", "triton", "pytest-benchmark")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(arguments),
        "commit": _commit(),
        "cpu": device_name(torch.device("cpu")),
        "cpu_features": [name for name, has in extension().cpu_features().items() if has],
        "isa": extension().isa(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "system": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        "load_average": os.getloadavg(),
        "versions": {
            "fastlm": fastlm.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
            "cuda": torch.version.cuda if cuda else None,
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit, with "+changes" where what is measured differs; "unknown" outside git, unless the
    variable COMMIT says it."""
    if commit := os.environ.get("COMMIT"):
        return commit

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "fastlm", "csrc", "kernels")
        return commit + ("+changes" if changed else "") or "unknown"
    except OSError:
        return "unknown"
