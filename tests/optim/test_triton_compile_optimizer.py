"""The optimizer's Triton kernels, compiled for GPUs that need not be there: a sample of the
configurations by default, all of them among the exhaustive tests.

This file is also the program that compiles (aot.py).
"""

import json
import sys

import pytest

pytest.importorskip("triton")

from aot import (
    ELEMENT,
    TARGETS,
    assert_a_spill_is_seen,
    assert_few_instructions,
    assert_nothing_spills,
    assert_wide,
    compile_all,
    compile_kernel,
    compile_part,
    each_target,
    name,
    of_target,
    targets,
)

DTYPES = ("fp32", "bf16", "fp16", "fp64", "split")  # by the table's code
SUPPORTED = [(p, g) for p in (0, 1, 2, 4) for g in (0, 1, 2)] + [(3, 3)]  # parameter, gradient
# The sample: the most common pairs and the one with the most instructions.
SAMPLE = {
    "sm_80": [(4, 1)], "sm_90": [(0, 0), (1, 1), (4, 1), (3, 3)], "sm_100": [(0, 0), (4, 1)],
    "gfx942": [(0, 0), (4, 1)],
}  # fmt: skip
# The most instructions an element in the loop over whole chunks, by the parameter's code: IEEE root
# and quotient are 20 of them; a split parameter is taken apart and put together.
CEILINGS = (43, 44, 44, 60, 52)


def ceiling(result: dict) -> int | None:
    if result["kernel"] == "step_kernel":
        return CEILINGS[result["constants"]["P"]]
    return {"square_sums_kernel": 9, "scale_gradients_kernel": 14}.get(result["kernel"])


TYPES = {
    "rows": "*i64", "chunk_rows": "*i32", "pointers": "*i64", "sums": "*fp64", "out": "*fp64",
    "bad": "*i64", "factor": "*fp64", "hyper": "*fp64", "square_sum": "*fp64",
    "grad_scale": "*fp32", "found_inf": "*fp32", "constants": "*fp64", "skip": "*fp64",
    "skip_out": "*fp64", "norm_out": "*fp32", "n": "i32", "k": "i32", "groups": "i32",
    "first": "i32",
}  # fmt: skip


def cases(everything: bool) -> list[dict]:
    """What is compiled, and how many accesses of 16 bytes a thread must have at least."""
    from fastlm.kernels import configs

    found = []

    def add(target, kernel, dtype, config, constants, loads=(), stores=(), **more):
        """loads, stores: the sizes of an element of all that a block reads and writes."""
        constants = {**constants, **config}
        num_warps = constants.pop("num_warps")
        fusion = constants.pop("enable_fp_fusion", True)
        threads = num_warps * TARGETS[target][2]

        def wide(sizes):
            return sum(constants["BLOCK"] * size // (16 * threads) for size in sizes)

        found.append({
            "target": target, "kernel": kernel, "dtype": dtype, "constants": constants,
            "num_warps": num_warps, "fusion": fusion, "loads": wide(loads), "stores": wide(stores),
            "disassemble": bool(loads) and target.startswith("sm_"), "expect_spills": False,
            "read": loads, **more,
        })  # fmt: skip

    for target in targets(everything):
        rocm = TARGETS[target][0] == "hip"
        for p, g in SUPPORTED if everything else SAMPLE[target]:
            state = 8 if p == 3 else 4
            param = [2, 2] if p == 4 else [ELEMENT[DTYPES[p]]]
            add(
                target, "step_kernel", f"{DTYPES[p]} {DTYPES[g]}", configs.step_config(p, g, rocm),
                {"P": p, "G": g}, [*param, ELEMENT[DTYPES[g]], state, state],
                [*param, state, state], stored=sum(param) + 2 * state,
            )  # fmt: skip
        for g in range(4) if everything else (1, 3):
            size = [ELEMENT[DTYPES[g]]]
            config = configs.gradients_config(rocm)
            for kernel, stores in (("square_sums_kernel", []), ("scale_gradients_kernel", size)):
                if everything or target in ("sm_90", "gfx942"):
                    add(target, kernel, DTYPES[g], config, {"G": g}, size, stores)
        add(target, "add_sums_kernel", "any", configs.sums_config(rocm), {})
        bare = {"square_sum": None, "grad_scale": None, "found_inf": None, "norm_out": None}
        add(target, "prepare_kernel", "bare", configs.prepare_config(rocm), bare)
        for norm in ("fp32", "fp64"):
            add(target, "prepare_kernel", norm, configs.prepare_config(rocm), {}, norm_out=norm)
        # Must be seen to spill: 64 elements of four operands, of two registers each, a thread.
        spilling = {**configs.step_config(3, 3, rocm), "BLOCK": 8192}
        add(
            target, "step_kernel", "fp64 fp64", spilling, {"P": 3, "G": 3}, disassemble=True,
            expect_spills=True,
        )  # fmt: skip
    return found


def compile_case(case: dict):
    from fastlm.kernels import adamw, clip_grad_norm
    from fastlm.kernels.device_table import ELEMENTS

    kernel = getattr(adamw, case["kernel"], None) or getattr(clip_grad_norm, case["kernel"])
    types = {**TYPES, "norm_out": f"*{case.get('norm_out', 'fp32')}"}
    options = {"num_warps": case["num_warps"], "enable_fp_fusion": case["fusion"]}
    constants = {k: ELEMENTS[v] if k in ("P", "G") else v for k, v in case["constants"].items()}
    return compile_kernel(kernel, case["target"], types, constants, options)


def an_element(result: dict) -> float | None:
    """Instructions an element in the loop over whole chunks. The other loop, for the ends of rows,
    moves elements one by one; what few accesses of 16 bytes it has are of moments."""
    if not result["read"]:
        return None
    loop = max(result["loops"], key=lambda loop: loop["wide_loads"])
    return loop["instructions"] * sum(result["read"]) / loop["loaded"]


def results(everything: bool) -> list[dict]:
    return compile_all(__file__, *["all"] * everything)


def test_every_case_is_compiled(everything):
    from fastlm.kernels import adamw, clip_grad_norm

    expected = cases(everything)
    assert len(results(everything)) == len(expected)
    assert len({json.dumps(case) for case in expected}) == len(expected)
    kernels = {name for name in {**vars(adamw), **vars(clip_grad_norm)} if name.endswith("_kernel")}
    assert {case["kernel"] for case in expected} == kernels


@each_target()
def test_nothing_spills(target, everything):
    assert_nothing_spills(results(everything), target)


@each_target()
def test_a_spill_would_be_seen(target, everything):
    assert_a_spill_is_seen(results(everything), target)


@each_target()
def test_16_bytes_at_a_time(target, everything):
    found = of_target(results(everything), target)
    assert_wide(found, target)
    assert sum(r["loads"] > 0 and r["stores"] > 0 for r in found) >= (17 if everything else 1)


@each_target("sm_", more=False)
def test_instructions_an_element(target, everything):
    assert_few_instructions(results(everything), target, ceiling)
    steps = [r for r in of_target(results(everything), target) if r["kernel"] == "step_kernel"]
    assert len(steps) == len(SUPPORTED if everything else SAMPLE[target])
    for result in steps:
        loop = max(result["loops"], key=lambda loop: loop["wide_loads"])
        elements = loop["loaded"] / sum(result["read"])
        assert elements == result["constants"]["BLOCK"] / (32 * result["num_warps"]), loop
        assert elements in (4, 8) and loop["wide_loads"] >= result["loads"], loop
        assert loop["stored"] == elements * result["stored"], loop
        assert result["programs"] >= 5, (name(result), result["registers"])


if __name__ == "__main__":
    compile_part(cases("all" in sys.argv), compile_case, an_element)
