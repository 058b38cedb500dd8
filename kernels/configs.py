"""Launch configurations of the kernels, as data. Imports nothing but dataclasses.

V vocabulary, that is the length of a row.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RowConfig:
    """How one program works through one row of logits."""

    block: int  # elements taken at once, a power of two
    threads: int
    one_read: bool  # the row fits one block: it stays in registers and is read from memory once
    rocm: bool

    @property
    def num_warps(self) -> int:
        # The same number of threads in wavefronts of 64 (gfx9).
        return max(self.threads // (64 if self.rocm else 32), 1)

    @property
    def constants(self) -> dict[str, int | bool]:
        """For a kernel's constexpr parameters."""
        lanes = self.num_warps * (64 if self.rocm else 32)
        return {"BLOCK": self.block, "LANES": lanes, "ONE_READ": self.one_read}

    @property
    def options(self) -> dict[str, int]:
        """For Triton's launcher."""
        # Two programs an SM, so that one computes while the other waits for memory: a bound that
        # the compiler keeps to without spills. 1,024 threads have 64 registers in any case.
        bounded = not self.rocm and self.threads in (256, 512)
        bound = {"maxnreg": 32768 // self.threads} if bounded else {}
        return {"num_warps": self.num_warps, **bound}

    @property
    def launch(self) -> dict[str, int | bool]:
        return {**self.constants, **self.options}


# What decides is registers: of 1024 threads each has 64, of two programs of 512, too.
# tests/ops/test_triton_compile.py compiles every line for every target, refuses spills, and counts
# registers, programs an SM and instructions an element. A thread should have 32 to 64 bytes on the
# way: about 32 KB an SM are what hides the latency of an H100's memory. There bf16 rows of 32000,
# 50304 and 128256 run at 0.89 to 0.92 of a copy's rate (bench/LOG.md, with what was slower).
#
# Two passes: the second one starts from the end of the row and finds what the caches still hold: of
# rows up to 64 KB, two an SM, L1 of an H100 (256 KB) all. So few rows should be in flight beyond
# that: the largest take all threads of an SM.
#
# (bytes per element, kind of rows) -> (largest V or None for any, block, threads, one read?)
_ROWS = {
    (2, "plain"): (
        (512, 512, 32, True),  # one warp, no barrier; 16 elements a thread, two 128-bit loads
        (2048, 2048, 64, True),  # 32 elements: half of the threads' part in the reductions
        (4096, 4096, 128, True),
        (8192, 8192, 256, True),
        (16384, 16384, 512, True),  # in 64 registers
        # Two rows an SM: at V = 50304 27 MB, which an L2 of 50 MB holds.
        (65536, 8192, 512, False),
        # One row an SM: at V = 128256 34 MB, where two would be more than that L2.
        (None, 16384, 1024, False),
    ),
    # The softcap's tanh is half of the work. The small lines are fewer: models with a softcap have
    # vocabularies of 50 000 and more.
    (2, "softcap"): (
        (1024, 1024, 64, True),
        (4096, 4096, 256, True),
        (8192, 8192, 256, True),
        (65536, 4096, 512, False),  # 8192 spill two on sm_100
        (None, 8192, 1024, False),
    ),
    # Rows that do not start or end at multiples of 16 bytes (V = 50257) move element by element,
    # each with an address and a predicate of its own: smaller blocks.
    (2, "unaligned"): (
        (1024, 1024, 64, True),
        (4096, 4096, 256, True),
        (65536, 4096, 512, False),
        (None, 8192, 1024, False),
    ),
    (4, "plain"): (
        (512, 512, 64, True),  # 8 elements a thread are two 128-bit loads
        (2048, 2048, 256, True),  # the same
        (8192, 8192, 512, True),  # 16 elements
        (32768, 8192, 512, False),  # two rows an SM: 34 MB
        (None, 8192, 1024, False),  # one row an SM: at V = 50304 27 MB, at 128256 68 MB
    ),
    (4, "softcap"): (
        (1024, 1024, 128, True),
        (4096, 4096, 256, True),
        (32768, 4096, 512, False),
        (None, 8192, 1024, False),
    ),
    (4, "unaligned"): (
        (1024, 1024, 64, True),
        (4096, 4096, 256, True),
        (32768, 4096, 512, False),
        (None, 4096, 1024, False),
    ),
}


def row_configs(
    itemsize: int, rocm: bool, *, softcap: bool = False, aligned: bool = True
) -> list[tuple[int | None, RowConfig]]:
    """Every (largest V or None, configuration) for such rows, shortest first."""
    kind = "unaligned" if not aligned else "softcap" if softcap else "plain"
    return [
        (largest, RowConfig(block, threads, one_read, rocm))
        for largest, block, threads, one_read in _ROWS[itemsize, kind]
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
    # because then the least of an SM's registers is left over. (256 took an H100 1.2 % less time.)
    # No contraction but what the kernel writes: every combination of dtypes computes the same bits.
    elements = 8 if {param, gradient} & {1, 2, 4} else 4
    warps = 2 if rocm else 4
    # At the end of a row, and in rows that start anywhere, elements move one by one, each with a
    # predicate of its own: 4 a thread.
    return {
        "BLOCK": 128 * elements, "TAIL_BLOCK": 512, "num_warps": warps, "enable_fp_fusion": False
    }  # fmt: skip


def gradients_config(rocm: bool) -> dict[str, object]:
    """For the sum of squares of a chunk of gradients, and for gradient *= factor."""
    # 16 elements a thread: 64 bytes of fp32 on the way, 32 of 16-bit types.
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


def rope_config(d: int, rocm: bool) -> dict[str, int]:
    """For rotations of heads of width d: positions of a program, which goes over the heads."""
    # 16 elements a thread: two 16-byte loads of a head, and as many angles, which stay.
    width = max(1 << (d - 1).bit_length(), 2)
    return {"BLOCK": max(2048 // width, 1), "num_warps": 2 if rocm else 4}


def swiglu_config(F: int, rocm: bool) -> dict[str, int]:
    """For rows of F gates and F values."""
    # 8 elements a thread: 16 bytes of each operand.
    block = min(1 << max(F - 1, 0).bit_length(), 2048)
    return {"BLOCK": block, "num_warps": max(block // 512, 1) if rocm else max(block // 256, 1)}
