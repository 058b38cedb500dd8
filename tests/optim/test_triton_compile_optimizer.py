"""Every configuration of the optimizer's Triton kernels, compiled for GPUs that need not be there.

This file is also the program that compiles (aot.py).
"""

import functools
import json
import sys

import pytest

pytest.importorskip("triton")

from aot import (
    ELEMENT,
    TARGETS,
    assert_a_spill_is_seen,
    assert_nothing_spills,
    assert_wide,
    compile_all,
    compile_kernel,
    compile_part,
    of_target,
)

DTYPES = ("fp32", "bf16", "fp16", "fp64", "split")  # by the table's code
SUPPORTED = [(p, g) for p in (0, 1, 2, 4) for g in (0, 1, 2)] + [(3, 3)]  # parameter, gradient
TYPES = {
    "rows": "*i64", "chunk_rows": "*i32", "pointers": "*i64", "sums": "*fp64", "bad_rows": "*i64",
    "out": "*fp64", "bad": "*i64", "factor": "*fp64", "hyper": "*fp64", "lrs": "*i64",
    "grad_scale": "*fp32", "found_inf": "*fp32", "constants": "*i64", "skip": "*i32",
    "skip_out": "*i32", "norm_out": "*fp32", "bad_out": "*i64",
    "n": "i32", "count": "i32", "groups": "i32", "flags": "i32", "first": "i32",
}  # fmt: skip


def cases() -> list[dict]:
    """What is compiled, and how many accesses of 16 bytes a thread must have at least."""
    from fastlm.kernels import configs

    found = []

    def add(target, kernel, dtype, config, constants, loads=(), stores=(), **more):
        """loads, stores: the sizes of an element of all that a block reads and writes."""
        constants = {**constants, **config}
        num_warps, fusion = constants.pop("num_warps"), constants.pop("enable_fp_fusion")
        assert not fusion  # a product of a pair would lose its tail
        threads = num_warps * TARGETS[target][2]

        def wide(sizes):
            return sum(constants["BLOCK"] * size // (16 * threads) for size in sizes)

        found.append({
            "target": target, "kernel": kernel, "dtype": dtype, "constants": constants,
            "num_warps": num_warps, "loads": wide(loads), "stores": wide(stores),
            "disassemble": False, "expect_spills": False, **more,
        })  # fmt: skip

    chunk = {"CHUNK": configs.OPTIMIZER_CHUNK}
    for target, (backend, _, _) in TARGETS.items():
        rocm = backend == "hip"
        for p, g in SUPPORTED:
            state = 8 if p == 3 else 4
            param = [2, 2] if p == 4 else [ELEMENT[DTYPES[p]]]
            add(
                target, "step_kernel", f"{DTYPES[p]} {DTYPES[g]}", configs.step_config(p, g, rocm),
                {"P": p, "G": g, **chunk},
                [*param, ELEMENT[DTYPES[g]], state, state], [*param, state, state],
                disassemble=p == 4 and g == 1,
            )  # fmt: skip
        elements = [ELEMENT[dtype] for dtype in DTYPES[:4]]
        add(
            target, "square_sums_kernel", "any", configs.square_sums_config(rocm), chunk, elements
        )  # fmt: skip
        add(
            target, "scale_gradients_kernel", "any", configs.scale_gradients_config(rocm), chunk,
            elements, elements,
        )  # fmt: skip
        add(target, "class_sums_kernel", "any", configs.sums_config(rocm), {})
        for norm in ("fp32", "fp64"):
            add(target, "prepare_kernel", norm, configs.prepare_config(rocm), {}, norm_out=norm)
        # Must be seen to spill: 32 elements of four operands, of two registers each, a thread.
        # gfx942 has twice the registers.
        spilling = {**configs.step_config(3, 3, rocm), "BLOCK": 8192 if rocm else 4096}
        add(
            target, "step_kernel", "fp64 fp64", spilling, {"P": 3, "G": 3, **chunk},
            disassemble=True, expect_spills=True,
        )  # fmt: skip
    return found


def compile_case(case: dict):
    from fastlm.kernels import adamw, clip_grad_norm

    kernel = getattr(adamw, case["kernel"], None) or getattr(clip_grad_norm, case["kernel"])
    types = {**TYPES, "norm_out": f"*{case.get('norm_out', 'fp32')}"}
    options = {"num_warps": case["num_warps"], "enable_fp_fusion": False}
    return compile_kernel(kernel, case["target"], types, case["constants"], options)


@functools.cache
def results() -> list[dict]:
    return compile_all(__file__)


def test_every_case_is_compiled():
    from fastlm.kernels import adamw, clip_grad_norm

    expected = cases()
    assert len(results()) == len(expected)
    assert len({json.dumps(case) for case in expected}) == len(expected)
    kernels = {name for name in {**vars(adamw), **vars(clip_grad_norm)} if name.endswith("_kernel")}
    assert {case["kernel"] for case in expected} == kernels


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(target):
    assert_nothing_spills(results(), target)


@pytest.mark.parametrize("target", TARGETS)
def test_a_spill_would_be_seen(target):
    assert_a_spill_is_seen(results(), target)


@pytest.mark.parametrize("target", TARGETS)
def test_16_bytes_at_a_time(target):
    assert_wide(results(), target)
    assert sum(r["loads"] > 0 and r["stores"] > 0 for r in of_target(results(), target)) > 12


if __name__ == "__main__":
    compile_part(cases(), compile_case, int(sys.argv[1]), int(sys.argv[2]))
