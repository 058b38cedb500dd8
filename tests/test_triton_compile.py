"""Every Triton kernel in every configuration that its launcher can choose, compiled without a GPU.

For sm_80, sm_90, sm_100 and gfx942: nothing spills, and rows whose bytes divide by 16 are moved 16
bytes at a time. This file is also the program that compiles, `python test_triton_compile.py PART
OF`: in processes of its own, where TRITON_INTERPRET is not set and Triton's cache is new.
"""

import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}  # bytes

# Argument types of the kernels; rows are of the case's own type.
ROWS = ("logits", "out", "x")
INT64 = ("targets", "bad_label")
INT32 = (
    "row_units", "out_units", "units", "loss_stride", "lse_stride", "ignore_index", "N", "V",
    "kind", "programs",
)  # fmt: skip
FLOATS = ("smoothing", "z_loss", "softcap")


def cases() -> list[dict]:
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
        # Two passes read a row in two places of the code, losses alone in one.
        reads = 1 if config.one_read else 2
        constants = {
            "UNIT": unit, "BLOCK": config.block, "LANES": config.lanes,
            "ONE_READ": config.one_read, "SOFTCAP": softcap,
        }  # fmt: skip
        elements = config.block if unit > 1 else 0
        for gradient, loads, stores in ((False, 1, 0), (True, reads, 1)):
            add(
                target, "row_losses_kernel", dtype, {**constants, "GRADIENT": gradient},
                config.num_warps, elements, loads, stores, **more,
            )  # fmt: skip
        add(
            target, "row_gradients_kernel", dtype, constants, config.num_warps, elements, reads, 1,
            **more,
        )  # fmt: skip

    for target, (backend, _, _) in TARGETS.items():
        rocm = backend == "hip"
        for dtype, softcap in itertools.product(("bf16", "fp32"), (False, True)):
            itemsize = ELEMENT[dtype]
            for aligned in (True, False):
                unit = 16 // itemsize if aligned else 1
                chosen = configs.row_configs(itemsize, rocm, softcap=softcap, aligned=aligned)
                for _, config in chosen:
                    add_rows(target, dtype, config, unit, softcap)
            # Of float16, which differs from bfloat16 in its conversions alone, the widest block;
            # its machine code is searched for spills, too.
            if dtype == "bf16":
                chosen = configs.row_configs(2, rocm, softcap=softcap)
                config = max((c for _, c in chosen if c.one_read), key=lambda c: c.block)
                add_rows(target, "fp16", config, 8, softcap, disassemble=True)
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
        spilling = {"UNIT": 8, "BLOCK": 131072, "LANES": 131072, "ONE_READ": True}
        add(
            target, "row_losses_kernel", "bf16", {**spilling, "SOFTCAP": False, "GRADIENT": True},
            1024 // TARGETS[target][2], disassemble=True, expect_spills=True,
        )  # fmt: skip
    return found


def compile_case(case: dict):
    """The compiled kernel, for a launch whose tensors all start at multiples of 16 bytes."""
    import triton
    from fastlm.kernels import cross_entropy
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(cross_entropy, case["kernel"])
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in case["constants"]:
            signature[name] = "constexpr"
        elif name in INT32:
            signature[name] = "i32"
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            element = case["dtype"] if name in ROWS else "i64" if name in INT64 else "fp32"
            element = case.get("num_items", element) if name == "num_items" else element
            signature[name] = f"*{element}"
            attributes[(i,)] = [["tt.divisibility", 16]]
            if case["target"].startswith("gfx"):
                # What the launcher adds for tensors below 2 GiB: other instructions are chosen.
                attributes[(i,)] += [["tt.pointer_range", 32]]
    source = ASTSource(kernel, signature, case["constants"], attributes)
    options = {"num_warps": case["num_warps"]}
    return triton.compile(source, target=GPUTarget(*TARGETS[case["target"]]), options=options)


def nvidia_tool() -> str | None:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


def inspect_cuda(case: dict, assembly: dict) -> dict:
    ptx = assembly["ptx"]
    found = {
        "wide_loads": len(re.findall(r"ld\.global\S*\.v[48]\.b?(?:32|64)\b", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v[48]\.b?(?:32|64)\b", ptx)),
    }
    found["wide_loads"] += len(re.findall(r"ld\.global\S*\.v2\.b64\b", ptx))
    found["wide_stores"] += len(re.findall(r"st\.global\S*\.v2\.b64\b", ptx))
    if nvidia_tool():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(assembly["cubin"])
            file.flush()
            found |= cuobjdump(file.name, case["disassemble"])
    return found


def cuobjdump(cubin: str, disassemble: bool) -> dict:
    def output(option: str) -> str:
        command = [nvidia_tool(), option, cubin]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    usage = output("--dump-resource-usage")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    found = {"registers": int(registers), "spills": int(stack)}
    if disassemble:
        found["spill_instructions"] = len(re.findall(r"\bSTL\b", output("-sass")))
    return found


def inspect_amd(case: dict, assembly: dict) -> dict:
    text = assembly["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    # Scalar registers that do not fit go to lanes of vector registers, not to memory: not counted.
    found = {"registers": number("vgpr_count"), "spills": number("vgpr_spill_count")}
    found["spills"] = max(found["spills"], number("private_segment_fixed_size"))
    if case["disassemble"]:
        found["spill_instructions"] = len(re.findall(r"\bscratch_store_", text))
    for name in ("load", "store"):
        found[f"wide_{name}s"] = len(re.findall(rf"\b(?:global|buffer)_{name}_dwordx4\b", text))
    return found


def compile_part(part: int, of: int) -> None:
    for case in cases()[part::of]:
        compiled = compile_case(case)
        inspect = inspect_amd if case["target"].startswith("gfx") else inspect_cuda
        print(json.dumps({**case, **inspect(case, compiled.asm)}), flush=True)


@functools.cache
def results() -> list[dict]:
    """Every case with what was found in its code; two processes compile."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    of = min(2, len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as cache:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(part), str(of)],
                env={**environment, "TRITON_CACHE_DIR": str(Path(cache) / str(part))},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for part in range(of)
        ]  # fmt: skip
        outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [json.loads(line) for output, _ in outputs for line in output.splitlines()]


def of_target(target: str, *, spilling: bool = False) -> list[dict]:
    return [r for r in results() if r["target"] == target and r["expect_spills"] == spilling]


def name(result: dict) -> str:
    return " ".join(str(result[key]) for key in ("kernel", "dtype", "constants", "num_warps"))


def needs_tool(target: str) -> None:
    if target.startswith("sm_") and not nvidia_tool():
        pytest.skip("Triton's package holds no cuobjdump, which tells registers and spills")


def test_every_case_is_compiled():
    expected = cases()
    assert len(results()) == len(expected)
    assert len({json.dumps(case) for case in expected}) == len(expected)
    kernels = {case["kernel"] for case in expected}
    from fastlm.kernels import cross_entropy

    assert kernels == {name for name in vars(cross_entropy) if name.endswith("_kernel")}


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(target):
    needs_tool(target)
    bad = [
        f"{name(r)}: {r['spills']}"
        for r in of_target(target)
        if r["spills"] or r.get("spill_instructions")
    ]
    assert not bad, "\n".join(bad)
    assert all(0 < r["registers"] <= 255 for r in of_target(target))


@pytest.mark.parametrize("target", TARGETS)
def test_a_spill_would_be_seen(target):
    needs_tool(target)
    (result,) = of_target(target, spilling=True)
    assert result["spills"] > 0 and result["spill_instructions"] > 0


@pytest.mark.parametrize("target", TARGETS)
def test_16_bytes_at_a_time(target):
    bad = [
        f"{name(r)}: {r['wide_loads']} loads, {r['wide_stores']} stores of 16 bytes; "
        f"{r['loads']} and {r['stores']} expected"
        for r in of_target(target)
        if r["wide_loads"] < r["loads"] or r["wide_stores"] < r["stores"]
    ]
    assert not bad, "\n".join(bad)
    assert sum(r["loads"] > 0 for r in of_target(target)) > 50
    # And rows that need not start at multiples of 16 bytes are not read as if they did.
    assert not any(r["wide_loads"] for r in of_target(target) if r["constants"].get("UNIT") == 1)


if __name__ == "__main__":
    compile_part(int(sys.argv[1]), int(sys.argv[2]))
