"""The model's own Triton kernels, rotary positions and SwiGLU, compiled for GPUs that need not be
there. This file is also the program that compiles (aot.py).
"""

import sys

import pytest

pytest.importorskip("triton")

from aot import (
    ELEMENT,
    TARGETS,
    assert_few_instructions,
    assert_nothing_spills,
    assert_wide,
    compile_all,
    compile_kernel,
    compile_part,
    each_target,
    needs_tool,
    of_target,
    targets,
)

ELEMENTS = ("x", "out", "h", "dh", "dx")
NUMBERS = ("positions", "T", "H", "F")
STRIDES = ("x_batch", "x_position", "x_head", "out_batch", "out_position", "out_head")
# Heads of 64 and 128, GPT-2's feed-forward width; what a thread issues for an element at most. Both
# are bound by memory, whose time is that of some 50 instructions an element of 4 to 10 bytes moved.
WIDTHS, F, CEILING = (64, 128), 2048, 32


def cases(everything: bool) -> list[dict]:
    from fastlm.kernels import configs

    found = []

    def add(target, dtype, kernel, config, constants, elements, loads, stores):
        constants = {**constants, "BLOCK": config["BLOCK"]}
        wide = elements * ELEMENT[dtype] // (16 * config["num_warps"] * TARGETS[target][2])
        found.append({
            "target": target, "kernel": kernel, "dtype": dtype, "constants": constants,
            "num_warps": config["num_warps"], "loads": loads * wide, "stores": stores * wide,
            "disassemble": target.startswith("sm_"), "expect_spills": False,
            "elements": elements // (config["num_warps"] * TARGETS[target][2]),
        })  # fmt: skip

    for target in targets(everything):
        rocm = TARGETS[target][0] == "hip"
        for dtype in ("bf16", "fp32") if everything else ("bf16",):
            for d in WIDTHS:
                config = configs.rope_config(d, rocm)
                for turn in (True, False):
                    constants = {"D": d, "WIDTH": d, "TURN": turn}
                    size = config["BLOCK"] * d
                    add(target, dtype, "rotate_kernel", config, constants, size, 1, 1)
            config = configs.swiglu_config(F, rocm)
            for kernel, loads, stores in (("swiglu", 2, 1), ("swiglu_gradient", 3, 2)):
                size = config["BLOCK"]
                add(target, dtype, f"{kernel}_kernel", config, {}, size, loads, stores)
    return found


def compile_case(case: dict):
    from fastlm.kernels import rope, swiglu

    kernel = getattr(rope if case["kernel"] == "rotate_kernel" else swiglu, case["kernel"])
    types = {name: "i32" for name in (*NUMBERS, *STRIDES)}
    types |= {name: f"*{case['dtype']}" for name in ELEMENTS}
    types |= {"cos": "*fp32", "sin": "*fp32", "sign": "fp32"}
    options = {"num_warps": case["num_warps"]}
    divisible = (*STRIDES, "F")
    return compile_kernel(
        kernel, case["target"], types, case["constants"], options, divisible=divisible
    )


def an_element(result: dict) -> float | None:
    """Of the loop over heads, or over a row, by the elements of a thread's iteration."""
    longest = max(result["loops"], key=lambda loop: loop["instructions"])
    return longest["instructions"] / result["elements"]


def results(everything: bool) -> list[dict]:
    return compile_all(__file__, *["all"] * everything)


@each_target()
def test_nothing_spills(target, everything):
    assert_nothing_spills(results(everything), target)


@each_target()
def test_16_bytes_at_a_time(target, everything):
    assert_wide(results(everything), target)
    found = of_target(results(everything), target)
    assert len(found) == (12 if everything else 6) and all(r["loads"] > 0 for r in found)


@each_target()
def test_several_programs_an_sm(target, everything):
    needs_tool(target)
    found = of_target(results(everything), target)
    assert found and all(r["programs"] >= 4 for r in found)


@each_target("sm_", more=False)
def test_instructions_an_element(target, everything):
    turning = [r for r in results(everything) if r["constants"].get("TURN", True)]
    assert_few_instructions(turning, target, lambda result: CEILING)


if __name__ == "__main__":
    compile_part(cases("all" in sys.argv), compile_case, an_element)
