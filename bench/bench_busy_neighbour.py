"""Beside one other process that never rests, on one of the cores: what waits for a thread that the
system does not run loses whole time slices. The same cases without it: the ops' own benches."""

import os
import subprocess
import sys

import numpy as np
import peers
import pytest
import torch
from harness import Candidate, Work, compare

from fastlm import AdamW, get_batch

CPU = torch.device("cpu")


@pytest.fixture
def neighbour():
    """A process that spins on the last of this process's cores."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        pytest.skip("needs Linux and two cores")
    script = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
print(flush=True)
while True:
    pass
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(cores[-1])], stdout=subprocess.PIPE
    )
    process.stdout.readline()  # it runs
    yield process
    assert process.poll() is None, "the neighbour has ended early"
    process.kill()
    process.communicate()


@pytest.mark.parametrize("B, T", [(64, 1024), (512, 1024)])
def bench_get_batch_beside_a_busy_process(benchmark, neighbour, B, T):
    tokens = np.random.default_rng(0).integers(0, 50257, 50_000_000, dtype=np.uint16)

    def candidate(make) -> Candidate:
        return Candidate(lambda: make(tokens, B, T, CPU))

    compare(
        benchmark,
        "gather_batch",
        f"get_batch, {B} x {T} uint16, beside a busy process",
        CPU,
        candidate(get_batch),
        {
            "nanoGPT's get_batch": candidate(peers.nanogpt_batch),
            "NumPy fancy indexing": candidate(peers.numpy_batch),
        },
        Work("B(T + 1) tokens of 2 bytes read, 2BT of 8 written", B * (T + 1) * 2 + 2 * B * T * 8),
        seconds=3,
    )


def bench_small_tensors_beside_a_busy_process(benchmark, neighbour):
    def candidate(make) -> Candidate:
        params = peers.random_parameters([(1000,)] * 2000, CPU)
        return Candidate(make(params).step)

    compare(
        benchmark,
        "adamw",
        "2,000 tensors of 1,000, step, beside a busy process",
        CPU,
        candidate(AdamW),
        {"torch fused": candidate(lambda params: torch.optim.AdamW(params, fused=True))},
        Work("p, g, m, v read; p, m, v written", 28 * 2_000_000),
        seconds=3,
        least_rounds=2,  # torch's step can take 17 s beside it
    )
