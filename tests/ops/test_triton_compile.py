"""The Triton kernels of cross-entropy, compiled for GPUs that need not be there: some of their
configurations by default, all of them among the exhaustive tests.

This file is also the program that compiles (aot.py).
"""

import itertools
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
    needs_tool,
    of_target,
    targets,
)

# Argument types of the kernels; rows are of the case's own type.
ROWS = ("logits", "out", "x")
INT64 = ("targets", "bad_label")
INT32 = (
    "row_units", "out_units", "units", "loss_stride", "lse_stride", "ignore_index", "N", "V",
    "kind", "programs", "all_lse",
)  # fmt: skip
FLOATS = ("smoothing", "z_loss", "softcap")


# The most instructions an element that a thread issues: in both passes together; and for a row that
# is read once, whose two reductions over all threads are 4 to 8 of them.
CEILINGS = {
    # (bytes an element, SOFTCAP, aligned): (two passes, one read)
    (2, 0, True): (20, 22), (2, 2, True): (60, 62), (4, 0, True): (28, 48), (4, 1, True): (80, 92),
}  # fmt: skip


def in_sample(target: str, dtype: str, softcap: bool, aligned: bool) -> bool:
    """Is it among the configurations that are compiled by default?"""
    if target == "sm_90":
        return aligned or (dtype == "bf16" and not softcap)
    return aligned and dtype == "bf16"


def cases(everything: bool) -> list[dict]:
    """What is compiled, and how many accesses of 16 bytes a thread must have at least."""
    from fastlm.kernels import configs

    found = []

    def add(target, kernel, dtype, constants, num_warps, elements=0, loads=0, stores=0, **more):
        wide = elements * ELEMENT[dtype] // (16 * num_warps * TARGETS[target][2])
        found.append({
            "target": target, "kernel": kernel, "dtype": dtype, "constants": constants,
            "num_warps": num_warps, "loads": loads * wide, "stores": stores * wide,
            "disassemble": False, "expect_spills": False, **more,
        })  # fmt: skip

    def add_rows(target, dtype, config, unit, softcap, **more):
        # Two passes read a row in three places of the code, losses alone in two: before a block is
        # worked on, the next one is on its way.
        reads = 1 if config.one_read else 3
        softcap = 0 if not softcap else 2 if ELEMENT[dtype] == 2 else 1
        constants = {"UNIT": unit, **config.constants, "SOFTCAP": softcap}
        elements = config.block if unit > 1 else 0
        more = {"disassemble": target.startswith("sm_"), **more, **config.options}
        del more["num_warps"]
        # The zeros of an ignored row are stored in one place of the code, with losses in two.
        for gradient, loads, stores in ((False, max(reads - 1, 1), 0), (True, reads, 3)):
            if gradient or everything:  # which has all that losses alone have, and more
                add(
                    target, "row_losses_kernel", dtype, {**constants, "GRADIENT": gradient},
                    config.num_warps, elements, loads, stores, **more,
                )  # fmt: skip
        add(
            target, "row_gradients_kernel", dtype, constants, config.num_warps, elements, reads, 2,
            **more,
        )  # fmt: skip

    for target in targets(everything):
        rocm = TARGETS[target][0] == "hip"
        for dtype, softcap in itertools.product(("bf16", "fp32"), (False, True)):
            itemsize = ELEMENT[dtype]
            for aligned in (True, False):
                if not (everything or in_sample(target, dtype, softcap, aligned)):
                    continue
                unit = 16 // itemsize if aligned else 1
                chosen = configs.row_configs(itemsize, rocm, softcap=softcap, aligned=aligned)
                for _, config in chosen:
                    add_rows(target, dtype, config, unit, softcap)
            # Of float16, which differs from bfloat16 in its conversions alone, the widest block.
            if dtype == "bf16" and (everything or softcap):
                chosen = configs.row_configs(2, rocm, softcap=softcap)
                config = max((c for _, c in chosen if c.one_read), key=lambda c: c.block)
                add_rows(target, "fp16", config, 8, softcap)
        labels = dict(configs.labels_config(rocm))
        num_warps = labels.pop("num_warps")
        for num_items in ("i64", "fp32"):
            add(
                target, "denominator_scale_kernel", "fp32", labels, num_warps, num_items=num_items
            )  # fmt: skip
        add(target, "sum_rows_kernel", "fp32", labels, num_warps)
        scale = dict(configs.scale_config(rocm)[0])
        num_warps = scale.pop("num_warps")
        for dtype, unit in itertools.product(ELEMENT, (True, False)):
            unit = 16 // ELEMENT[dtype] if unit else 1
            elements = scale["BLOCK"] if unit > 1 else 0
            add(target, "scale_kernel", dtype, {"UNIT": unit, **scale}, num_warps, elements, 1, 1)
        # Must be seen to spill: 128 elements for each of 1024 threads.
        spilling = {"UNIT": 8, "BLOCK": 131072, "LANES": 1024, "ONE_READ": True}
        add(
            target, "row_losses_kernel", "bf16", {**spilling, "SOFTCAP": 0, "GRADIENT": True},
            1024 // TARGETS[target][2], disassemble=True, expect_spills=True,
        )  # fmt: skip
    return found


def compile_case(case: dict):
    """The compiled kernel, for a launch whose tensors all start at multiples of 16 bytes."""
    from fastlm.kernels import cross_entropy

    kernel = getattr(cross_entropy, case["kernel"])
    types = {}
    for name in kernel.arg_names:
        if name in INT32:
            types[name] = "i32"
        elif name in FLOATS:
            types[name] = "fp32"
        else:
            element = case["dtype"] if name in ROWS else "i64" if name in INT64 else "fp32"
            element = case.get("num_items", element) if name == "num_items" else element
            types[name] = f"*{element}"
    options = {key: case[key] for key in ("num_warps", "maxnreg") if key in case}
    return compile_kernel(kernel, case["target"], types, case["constants"], options)


def an_element(result: dict) -> float | None:
    """Instructions an element: of a row's two loops together, or of all a row's that is read once,
    without label smoothing and other branches for what is rare."""
    constants = result["constants"]
    if not result["kernel"].startswith("row_"):
        return None
    threads = 32 * result["num_warps"]
    if constants["ONE_READ"]:
        return result["issued"] * threads / constants["BLOCK"]
    size = ELEMENT[result["dtype"]]
    moved = constants["BLOCK"] // threads * size
    loops = [loop for loop in result["loops"] if loop["loaded"] >= moved]
    assert len(loops) == (2 if constants.get("GRADIENT", True) else 1), loops
    return sum(loop["instructions"] * size / loop["loaded"] for loop in loops)


def results(everything: bool) -> list[dict]:
    return compile_all(__file__, *["all"] * everything)


def test_every_case_is_compiled(everything):
    expected = cases(everything)
    assert len(results(everything)) == len(expected)
    assert len({json.dumps(case) for case in expected}) == len(expected)
    kernels = {case["kernel"] for case in expected}
    from fastlm.kernels import cross_entropy

    assert kernels == {name for name in vars(cross_entropy) if name.endswith("_kernel")}


@each_target()
def test_nothing_spills(target, everything):
    assert_nothing_spills(results(everything), target)


@each_target()
def test_a_spill_would_be_seen(target, everything):
    assert_a_spill_is_seen(results(everything), target)


@each_target()
def test_16_bytes_at_a_time(target, everything):
    assert_wide(results(everything), target)
    found = of_target(results(everything), target)
    assert sum(r["loads"] > 0 for r in found) > (50 if everything else 12)
    # And rows that need not start at multiples of 16 bytes are not read as if they did.
    assert not any(r["wide_loads"] for r in found if r["constants"].get("UNIT") == 1)


@each_target("sm_", more=False)
def test_instructions_an_element(target, everything):
    def ceiling(result):
        constants = result["constants"]
        kind = ELEMENT[result["dtype"]], constants["SOFTCAP"], constants["UNIT"] > 1
        two_passes, one_read = CEILINGS.get(kind, (None, None))
        return one_read if constants["ONE_READ"] else two_passes

    assert_few_instructions(results(everything), target, ceiling)


@each_target("sm_")
def test_two_programs_an_sm(target, everything):
    """Of rows up to 32768 elements."""
    needs_tool(target)
    rows = [r for r in of_target(results(everything), target) if r["kernel"].startswith("row_")]
    assert rows and all(r["programs"] >= (2 if r["num_warps"] < 32 else 1) for r in rows)


if __name__ == "__main__":
    compile_part(cases("all" in sys.argv), compile_case, an_element)
