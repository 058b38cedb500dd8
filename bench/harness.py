"""Measures ours and its peers interleaved in one process, against what the machine itself can do.

A round runs every peer once and ours once, in an order that turns, so that whatever else the
machine does hits all of them; ratios are medians over rounds of the times within one round. What
runs is checked first: a wrong result is never timed. pytest-benchmark measures ours, the harness
the peers, with the same clock and the same synchronisation.
"""

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from fastlm.hardware import (
    back_heap_with_huge_pages,
    device_name,
    matmul_ceiling,
    synchronize,
)

OURS, LIMIT = "fastlm", "limit"


@dataclass
class Candidate:
    """Something that does the work."""

    run: Callable[[], object]
    setup: Callable[[], object] | None = None  # before every run, not timed


@dataclass
class Work:
    """What the work cannot do without, by which its physical limit is known."""

    formula: str  # how it was counted
    bytes: int = 0  # read + written; the limit is a copy of as many, timed in every round
    flops: int = 0  # the limit is the fastest matmul of `dtype`, measured before and after
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
    share_of_limit: float  # median over the rounds


@dataclass
class Comparison:
    title: str
    device: str
    work: str  # the formula, and the count
    rounds: int
    load_average: float  # of the minute before
    unit: str  # of the rate
    rows: list[Row] = field(default_factory=list)

    def table(self) -> str:
        lines = [
            f"### {self.title} ({self.device})",
            "",
            f"{self.work}; {self.rounds} rounds",
            "",
            f"| | median ms | best ms | time / ours | best / ours | {self.unit} | of the limit |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            lines.append(
                f"| {row.name} | {row.median_ms:.4g} | {row.best_ms:.4g} | "
                f"{row.ratio_to_ours:.2f} | {row.best_to_ours:.2f} | {row.rate:.3g} | "
                f"{row.share_of_limit:.0%} |"
            )
        return "\n".join(lines)


COMPARISONS: list[Comparison] = []  # of this run; conftest.py prints and saves them


def compare(
    benchmark,  # pytest-benchmark's fixture
    title: str,
    device: torch.device,
    ours: Candidate,
    peers: dict[str, Candidate],
    work: Work,
    *,
    seconds: float = 5.0,  # of measuring
    least_rounds: int = 5,
) -> Comparison:
    """Times all candidates; the caller has checked their results."""
    gc.collect()  # a process that holds the memory of the last comparison measures the allocator
    peers = dict(peers)
    if work.bytes:
        peers[LIMIT] = copy_of(work.bytes, device)
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

    for candidate in (*peers.values(), ours):  # warm caches, compiled graphs, optimizer states
        timed(candidate)
    if device.type == "cpu":
        back_heap_with_huge_pages()  # as the trainer does, here for all alike
    load_average = os.getloadavg()[0]
    begin = time.perf_counter()
    for candidate in (*peers.values(), ours):
        timed(candidate)
    a_round = time.perf_counter() - begin
    rounds = max(least_rounds, min(500, int(seconds / a_round)))

    times: dict[str, list[float]] = {name: [] for name in peers}
    order = list(peers)

    def time_the_peers() -> None:
        order.append(order.pop(0))
        for name in order:
            times[name].append(timed(peers[name]))
        if ours.setup:
            ours.setup()
        synchronize(device)

    benchmark.pedantic(run_ours, setup=time_the_peers, rounds=rounds, iterations=1)
    times = {OURS: list(benchmark.stats.stats.data), **times}
    comparison = _compared(title, device, times, work, load_average)
    benchmark.extra_info["comparison"] = title
    COMPARISONS.append(comparison)
    return comparison


def _compared(
    title: str,
    device: torch.device,
    times: dict[str, list[float]],
    work: Work,
    load_average: float,
) -> Comparison:
    seconds = {name: np.array(values) for name, values in times.items()}
    ours = seconds[OURS]
    if work.bytes:
        unit, count = "GB/s", work.bytes / 1e9
        counted = f"{work.formula}: {work.bytes / 1e6:,.4g} MB"
    else:
        unit, count = "TFLOP/s", work.flops / 1e12
        counted = f"{work.formula}: {count:.4g} TFLOP"
        seconds[LIMIT] = np.full(len(ours), work.flops / matmul_limit(device, work.dtype))
    result = Comparison(title, device_name(device), counted, len(ours), load_average, unit)
    for name, values in seconds.items():
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        result.rows.append(
            Row(
                name=name,
                median_ms=1e3 * median,
                quartiles_ms=(1e3 * low, 1e3 * high),
                best_ms=1e3 * values.min(),
                ratio_to_ours=float(np.median(values / ours)),
                best_to_ours=values.min() / ours.min(),
                rate=count / median,
                share_of_limit=float(np.median(seconds[LIMIT] / values)),
            )
        )
    return result


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
    measured = matmul_ceiling(device, dtype)
    _MATMUL_LIMITS[device, dtype] = max(measured, _MATMUL_LIMITS.get((device, dtype), 0.0))
    return _MATMUL_LIMITS[device, dtype]
