"""What a device reaches and what is left of its memory, measured while the program runs."""

import resource
import sys
import time
from pathlib import Path

import torch

from fastlm.hardware import synchronize


def matmul_ceiling(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.25) -> float:
    """FLOP/s of the fastest of several large square and training-shaped matmuls, measured now.

    The denominator of model FLOP utilisation (MFU): what this machine reaches in the state it is
    in, not a data sheet's number. Each shape is repeated for `seconds`, and left out if one call
    would take more than 2 s at the rate of the shape before: CPUs that cannot multiply float16
    reach 0.1 GFLOP/s, some of them in large matrices only.
    """
    scale = 4 if device.type == "cuda" else 1
    shapes = [  # (M, K, N)
        (256, 256, 256),
        (1024, 1024, 1024),
        (2048, 2048, 2048),
        (4096, 1024, 1024),
        (2048, 512, 2048),
        (2048, 768, 3072),
        (4096, 512, 4096),
    ]
    best = rate = 0.0
    for m, k, n in shapes:
        flops = 2 * m * k * n * scale**3
        if rate and flops / rate > 2:
            continue
        a = torch.randn(m * scale, k * scale, device=device, dtype=dtype)
        b = torch.randn(k * scale, n * scale, device=device, dtype=dtype)
        start = time.perf_counter()
        out = a @ b
        synchronize(device)
        elapsed = time.perf_counter() - start
        if elapsed > 2 and device.type == "cpu":  # on a GPU a first call may load a library
            rate = flops / elapsed
            continue
        # Single calls on the CPU: its best moment is the ceiling. A queue of them on a GPU.
        calls = 1 if device.type == "cpu" else 10
        rate, deadline = 0.0, time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            start = time.perf_counter()
            for _ in range(calls):
                torch.matmul(a, b, out=out)
            synchronize(device)
            rate = max(rate, calls * flops / (time.perf_counter() - start))
        best = max(best, rate)
    return best


def copy_rate(device: torch.device, *, seconds: float = 0.3) -> float:
    """Bytes per second, read and written, of a copy far larger than any cache, measured now."""
    count = (256 << 20) if device.type == "cuda" else (32 << 20)
    source = torch.zeros(count, device=device)
    target = torch.zeros(count, device=device)
    calls, best, deadline = 1 if device.type == "cpu" else 10, 0.0, time.perf_counter() + seconds
    while True:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            target.copy_(source)
        synchronize(device)
        elapsed = time.perf_counter() - start
        best = max(best, calls * 2 * source.nbytes / elapsed)
        if time.perf_counter() > deadline:
            return best


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process may still have on `device`; None: not known.

    On Linux what the kernel calls available, and no more than its control group (a container's
    limit) has left.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept  # which this process's tensors may take
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (Path("/sys/fs/cgroup", name).read_text().strip() for name in (limit, used))
            free.append(int(most) - int(now))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(free, default=None)


class PeakMemory:
    """The most memory that was allocated, as far as `sample` saw.

    On a GPU the allocator's own peak. On Linux the process's anonymous memory: what it allocated,
    not the files that it maps, the token files for one; keep_freed_memory() keeps what a step has
    used, so that a sample between steps sees it. Elsewhere the peak of the process, with what it
    maps. None: not known.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None
        self.what = "on the device" if device.type == "cuda" else "of the process"

    def sample(self) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif (now := allocated_bytes()) is not None:
            self.what = "allocated by the process"
            self.bytes = max(now, self.bytes or 0)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            self.bytes = peak if sys.platform == "darwin" else peak * 1024


def allocated_bytes() -> int | None:
    """What this process has allocated in the host's memory; None where Linux does not tell."""
    try:
        status = Path("/proc/self/status").read_bytes()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith(b"RssAnon:"):
            return int(line.split()[1]) << 10
    return None
