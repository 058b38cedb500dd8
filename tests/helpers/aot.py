"""Kernels compiled for GPUs that need not be there: registers, spills, accesses of 16 bytes,
programs an SM, instructions an element.

A test file's cases are compiled by the file itself, run as a program, `python FILE PART OF`: in
processes of their own, where TRITON_INTERPRET is not set and Triton's cache is new. All that is
known of them, as a table: `python tests/helpers/aot.py [sm_90]`.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from sass import Sass

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
    # Cards that a person has, T4 and RTX 20, RTX 40, RTX 50: among the exhaustive tests.
    "sm_75": ("cuda", 75, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_120": ("cuda", 120, 32),
}
# Of an SM: warps, and KB of shared memory.
SM = {"sm_75": (32, 64), "sm_80": (64, 164), "sm_89": (48, 100), "sm_120": (48, 100)}
MORE = ("sm_75", "sm_89", "sm_120")
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}  # bytes


def targets(everything: bool) -> list[str]:
    return [target for target in TARGETS if everything or target not in MORE]


def each_target(prefix: str = "", *, more: bool = True):
    """For tests of one target's results: of the sample by default, of all that is compiled else.
    more: also of MORE."""
    sample = [target for target in targets(False) if target.startswith(prefix)]
    everything = [target for target in targets(more) if target.startswith(prefix)]
    return pytest.mark.parametrize(
        "target, everything",
        [(target, False) for target in sample]
        + [pytest.param(target, True, marks=pytest.mark.exhaustive) for target in everything],
    )


def compile_kernel(
    kernel, target: str, types: dict[str, str], constants: dict, options: dict, divisible=()
):
    """The compiled kernel, for a launch whose tensors all start at multiples of 16 bytes.

    types: of the arguments that are not constants. divisible: numbers that are multiples of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types[name]
        if signature[name].startswith("*"):
            attributes[(i,)] = [["tt.divisibility", 16]]
            if target.startswith("gfx"):
                # What the launcher adds for tensors below 2 GiB: other instructions are chosen.
                attributes[(i,)] += [["tt.pointer_range", 32]]
        elif name in divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def nvidia_tool() -> str | None:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


def inspect(target: str, kernel, num_warps: int, disassemble: bool) -> dict:
    """Registers, spills, `wide_loads` and `wide_stores` in the code, programs an SM; with
    `disassemble`, which takes a second, the instructions that spill, and for CUDA what is `issued`
    (Sass.issued) and `loops` (Sass.loops), too."""
    amd = target.startswith("gfx")
    found = (_inspect_amd if amd else _inspect_cuda)(kernel.asm, disassemble)
    if "registers" in found:
        # By waves a SIMD, of whose 512 registers each takes a multiple of 8, or by an SM's 65,536;
        # and by shared memory.
        registers = -(-found["registers"] // 8) * 8
        if amd:
            by_registers, memory, reserved = 4 * min(8, 512 // registers) // num_warps, 64, 0
        else:
            warps, memory = SM.get(target, (64, 228))
            by_registers = min(65536 // (32 * registers), warps) // num_warps
            reserved = 0 if target == "sm_75" else 1024
        shared = kernel.metadata.shared + reserved
        found["programs"] = min(by_registers, 32, memory * 1024 // max(shared, 1))
    return found


def _inspect_cuda(assembly: dict, disassemble: bool) -> dict:
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
            found |= _cuobjdump(file.name, disassemble)
    return found


def _cuobjdump(cubin: str, disassemble: bool) -> dict:
    command = [nvidia_tool(), "--dump-resource-usage", *["-sass"] * disassemble, cubin]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", output).groups()
    found = {"registers": int(registers), "spills": int(stack)}
    if disassemble:
        sass = Sass(output)
        found |= {"spill_instructions": sass.spills(), "issued": sass.issued()}
        found["loops"] = sass.loops()
    return found


def _inspect_amd(assembly: dict, disassemble: bool) -> dict:
    text = assembly["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    # Scalar registers that do not fit go to lanes of vector registers, not to memory: not counted.
    found = {"registers": number("vgpr_count"), "spills": number("vgpr_spill_count")}
    found["spills"] = max(found["spills"], number("private_segment_fixed_size"))
    if disassemble:
        found["spill_instructions"] = len(re.findall(r"\bscratch_store_", text))
    for name in ("load", "store"):
        found[f"wide_{name}s"] = len(re.findall(rf"\b(?:global|buffer)_{name}_dwordx4\b", text))
    return found


def compile_part(cases: list[dict], compile_case: Callable, an_element: Callable) -> None:
    """What a process of `compile_all` does: a line of JSON for each case. an_element(result): the
    instructions that a thread issues for an element, or None."""
    part, of, *options = sys.argv[1:]
    chosen = set(TARGETS).intersection(options) or TARGETS
    cases = [case for case in cases if case["target"] in chosen]
    for case in cases[int(part) :: int(of)]:
        kernel = compile_case(case)
        result = {**case, **inspect(case["target"], kernel, case["num_warps"], case["disassemble"])}
        result["an_element"] = an_element(result) if "loops" in result else None
        print(json.dumps(result), flush=True)


@functools.cache
def compile_all(file: str, *options: str) -> list[dict]:
    """Every case of a test file with what was found in its code; two processes compile, each run as
    `python FILE PART OF *options`."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    # This module, as pytest finds it.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    of = min(2, len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as cache:
        processes = [
            subprocess.Popen(
                [sys.executable, file, str(part), str(of), *options],
                env={**environment, "TRITON_CACHE_DIR": str(Path(cache) / str(part))},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for part in range(of)
        ]  # fmt: skip
        outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [json.loads(line) for output, _ in outputs for line in output.splitlines()]


def of_target(results: list[dict], target: str, *, spilling: bool = False) -> list[dict]:
    return [r for r in results if r["target"] == target and r["expect_spills"] == spilling]


def name(result: dict) -> str:
    constants = " ".join(f"{key}={value}" for key, value in result["constants"].items())
    return f"{result['kernel']} {result['dtype']} {constants} num_warps={result['num_warps']}"


def needs_tool(target: str) -> None:
    if target.startswith("sm_") and not nvidia_tool():
        pytest.skip("Triton's package holds no cuobjdump, which tells registers and spills")


def allowed_spills() -> int:
    """Bytes a thread: 0 with constraints.txt's Triton, for which the configurations are chosen.

    Another version's assembler may put up to 8 scalars of a row (addresses, flags) on the stack
    until the row has been read. The elements of a row are at least 64 bytes a thread.
    """
    import triton

    pinned = re.search(r"^triton==([\d.]+)", CONSTRAINTS.read_text(), re.MULTILINE)[1]
    return 0 if triton.__version__.split("+")[0] == pinned else 32


def assert_nothing_spills(results: list[dict], target: str) -> None:
    needs_tool(target)
    # ptxas leaves four scalars of fp32 rows on the stack of an RTX 50.
    found, allowed = of_target(results, target), max(allowed_spills(), 16 * (target == "sm_120"))
    bad = [
        f"{name(r)}: {r['spills']} bytes"
        for r in found
        if r["spills"] > allowed or r.get("spill_instructions", 0) > allowed // 4
    ]
    assert not bad, "\n".join(bad)
    assert all(0 < r["registers"] <= 255 for r in found)


def assert_a_spill_is_seen(results: list[dict], target: str) -> None:
    needs_tool(target)
    (result,) = of_target(results, target, spilling=True)
    assert result["spills"] > 32 and result["spill_instructions"] > 8


def assert_wide(results: list[dict], target: str) -> None:
    """At least as many accesses of 16 bytes as each case says."""
    bad = [
        f"{name(r)}: {r['wide_loads']} loads, {r['wide_stores']} stores of 16 bytes; "
        f"{r['loads']} and {r['stores']} expected"
        for r in of_target(results, target)
        if r["wide_loads"] < r["loads"] or r["wide_stores"] < r["stores"]
    ]
    assert not bad, "\n".join(bad)


def assert_few_instructions(results: list[dict], target: str, ceiling: Callable) -> None:
    """ceiling(result): the most instructions an element, or None where they are not counted."""
    needs_tool(target)
    counted = [(r, ceiling(r)) for r in of_target(results, target) if r["an_element"]]
    counted = [(r, most) for r, most in counted if most is not None]
    bad = [f"{name(r)}: {r['an_element']:.1f}" for r, most in counted if r["an_element"] > most]
    assert not bad, "\n".join(bad)
    # A count of what is not there would be small.
    assert counted and all(r["an_element"] > 3 for r, _ in counted)


def table(results: list[dict]) -> str:
    lines = [f"{'':90} registers  spills  programs/SM  16-byte loads, stores  instructions/element"]
    for r in results:
        if not r["expect_spills"]:
            count = f"{r['an_element']:.1f}" if r["an_element"] else "-"
            lines.append(
                f"{r['target']:7} {name(r):110} {r['registers']:4} {r['spills']:4} "
                f"{r['programs']:3} {r['wide_loads']:4} {r['wide_stores']:3} {count:>6}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    tests = Path(__file__).resolve().parents[1]
    for file in (
        "ops/test_triton_compile",
        "ops/test_triton_compile_model",
        "optim/test_triton_compile_optimizer",
    ):
        print(table(compile_all(str(tests / f"{file}.py"), "all", *sys.argv[1:])))
