"""Launch configurations of the kernels, as data. Imports nothing but dataclasses.

V vocabulary, that is the length of a row.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RowConfig:
    """How one program works through one row of logits."""

    block: int  # elements taken at once, a power of two
    num_warps: int  # of 32 threads, or of 64 on ROCm
    one_read: bool  # the row fits one block: it stays in registers and is read from memory once
    lanes: int  # else: running maxima and sums in the first pass, a divisor of block


# What decides is registers: the fp32 values of a block live at once, and of 1024 threads each has
# 64 registers, of 512 128. tests/ops/test_triton_compile.py compiles every line for every target
# and refuses spills. A thread should have 32 to 64 bytes on the way: about 32 KB an SM are what
# hides the latency of an H100's memory. No GPU has measured any of these yet.
#
# Two passes: the second one starts from the end of the row, which L2 read last, and finds what L2
# still holds. So few rows should be in flight: that is why the threads are many.
#
# (bytes per element, kind of rows) -> (largest V or None for any, block, threads, lanes or None for
# one read); threads, because a warp has 32 or 64 of them.
_ROWS = {
    (2, "plain"): (
        (512, 512, 32, None),  # one warp, no barrier; 16 elements a thread, two 128-bit loads
        (2048, 2048, 128, None),  # the same 16; small blocks, so that many rows are in flight
        (4096, 4096, 256, None),  # the same
        (8192, 8192, 256, None),  # 32 elements: half as many threads meet at the barriers
        (16384, 16384, 512, None),  # the same, at 60 to 104 registers
        (32768, 32768, 1024, None),  # 32 elements in 64 registers; 64 elements spill everywhere
        # 64 registers (sm_90) are two rows an SM: at V = 50304 27 MB, which an L2 of 50 MB holds.
        (65536, 8192, 512, 4096),
        # One row an SM: at V = 128256 34 MB, where two would be more than that L2.
        (None, 16384, 1024, 8192),
    ),
    # The softcap's derivative needs tanh beside exp: twice the registers, half the block. The
    # small lines are fewer: models with a softcap have vocabularies of 50 000 and more.
    (2, "softcap"): (
        (1024, 1024, 64, None),
        (4096, 4096, 256, None),
        (16384, 16384, 512, None),  # 32 elements in 128 registers; at 64, 32768 would spill
        # 8 elements: 16 in one of 1024 threads spill, and in one of 512 with Triton 3.6.
        (None, 8192, 1024, 8192),
    ),
    # Rows that do not start or end at multiples of 16 bytes (V = 50257) move element by element,
    # each with an address and a predicate of its own: smaller blocks.
    (2, "unaligned"): (
        (1024, 1024, 64, None),
        (4096, 4096, 256, None),
        (16384, 16384, 512, None),  # 32768 spills on gfx942 and sm_100
        (None, 8192, 1024, 8192),
    ),
    (4, "plain"): (
        (512, 512, 64, None),  # 8 elements a thread are two 128-bit loads
        (2048, 2048, 256, None),  # the same
        (8192, 8192, 512, None),  # 16 elements
        (16384, 16384, 1024, None),  # 16 in 64 registers; 32 spill
        (None, 8192, 1024, 8192),  # one row an SM: at V = 50304 27 MB, at 128256 68 MB
    ),
    (4, "softcap"): (
        (1024, 1024, 128, None),
        (4096, 4096, 256, None),
        (16384, 16384, 1024, None),
        (None, 8192, 1024, 8192),
    ),
    (4, "unaligned"): (
        (1024, 1024, 64, None),  # 128 threads spill a register on sm_80
        (4096, 4096, 256, None),
        (8192, 8192, 512, None),  # 16384 spill one on sm_90
        (None, 4096, 512, 4096),  # 8192 in 1024 threads spill two on sm_80
    ),
}


def row_configs(
    itemsize: int, rocm: bool, *, softcap: bool = False, aligned: bool = True
) -> list[tuple[int | None, RowConfig]]:
    """Every (largest V or None, configuration) for such rows, shortest first."""
    kind = "unaligned" if not aligned else "softcap" if softcap else "plain"
    warp = 64 if rocm else 32  # the same number of threads in wavefronts of 64 (gfx9)
    return [
        (largest, RowConfig(block, max(threads // warp, 1), lanes is None, lanes or block))
        for largest, block, threads, lanes in _ROWS[itemsize, kind]
    ]


def row_config(
    V: int, itemsize: int, rocm: bool, *, softcap: bool = False, aligned: bool = True
) -> RowConfig:
    """The configuration for rows of V elements of `itemsize` bytes (2 or 4).

    `aligned`: rows start and end at multiples of 16 bytes.
    """
    configs = row_configs(itemsize, rocm, softcap=softcap, aligned=aligned)
    return next(config for largest, config in configs if largest is None or largest >= V)


def labels_config(rocm: bool) -> dict[str, int]:
    """For the one program that goes over all labels, or losses, in a fixed order."""
    # 4096 in 512 threads are 64 bytes of labels on the way for each; 8192 rows are two steps.
    return {"BLOCK": 4096, "num_warps": 8 if rocm else 16}


def scale_config(rocm: bool) -> tuple[dict[str, int], int]:
    """For x *= factor: a step of a program, and the largest number of programs."""
    # As many as keep any GPU busy and no more: mostly all they do is to read a factor of 1.
    return {"BLOCK": 4096, "num_warps": 4 if rocm else 8}, 2048


# How many elements of one tensor a program of the optimizer's kernels works on. It first waits for
# three loads in a row, where its tensor is, before any element comes: 8 or 16 blocks make up for
# that. At 8192, 10 M parameters are still 1200 programs, several for each of an H100's 132 SMs, and
# the last, smaller chunk of a tensor is little work.
OPTIMIZER_CHUNK = 8192


def step_config(param: int, gradient: int, rocm: bool) -> dict[str, object]:
    """For elements of AdamW's step, by the table's codes of parameter and gradient."""
    # The fewest elements a thread with which every operand moves 16 bytes at a time: 4, or 8 where
    # one has 16 bits (codes 1, 2 and 4). An element has four operands or five: 64 to 128 bytes on
    # the way for a thread, and more elements would take registers from threads. Of 128 threads,
    # because then the least of an SM's registers is left over.
    # No contraction but what the kernel writes: every combination of dtypes computes the same bits.
    elements = 8 if {param, gradient} & {1, 2, 4} else 4
    warps = 2 if rocm else 4
    # At the end of a row, and in rows that start anywhere, elements move one by one, each with a
    # predicate of its own: 4 a thread.
    return {
        "BLOCK": 128 * elements, "TAIL_BLOCK": 512, "num_warps": warps, "enable_fp_fusion": False
    }  # fmt: skip


def square_sums_config(rocm: bool) -> dict[str, object]:
    """For sums of squares of a chunk."""
    # 16 elements a thread: 64 bytes of fp32 on the way, 32 of 16-bit types.
    return {"BLOCK": 4096, "num_warps": 4 if rocm else 8}


def scale_gradients_config(rocm: bool) -> dict[str, object]:
    """For gradient *= factor."""
    return {"BLOCK": 4096, "num_warps": 4 if rocm else 8}


def sums_config(rocm: bool) -> dict[str, object]:
    """For adding up the sums of chunks: one program goes over all of them in a fixed order."""
    # 8 sums a thread are 64 bytes on the way.
    return {"BLOCK": 2048, "num_warps": 4 if rocm else 8}


def prepare_config(rocm: bool) -> dict[str, object]:
    """For what a step needs once: rows a program."""
    # One row a thread: powers in float64, which a GPU with few such units computes slowly, take
    # the threads of several SMs when rows are thousands.
    return {"BLOCK": 256, "num_warps": 4 if rocm else 8}
