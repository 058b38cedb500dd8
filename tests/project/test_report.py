"""bench/report.py: RESULTS.md and README's table say what bench/results holds."""

import copy
import json
from pathlib import Path

import pytest
import report
import report_gpu

ROOT = Path(__file__).parents[2]


def test_the_report_is_that_of_the_stored_results():
    page = report.results_page(report.load(), report.races(), report_gpu.load(report.RESULTS))
    assert (ROOT / "bench" / "RESULTS.md").read_text() == page, (
        "bench/RESULTS.md is stale: make report"
    )


def test_readmes_table_is_that_of_the_stored_results():
    readme = (ROOT / "README.md").read_text()
    table = report.readme_table(report.load(), report_gpu.load(report.RESULTS))
    assert table in readme, "README.md is stale: make report"


@pytest.fixture
def run() -> dict:
    def row(name: str, ratio: float) -> dict:
        return {
            "name": name,
            "median_ms": 10 * ratio,
            "rate": 3.0,
            "ratio_to_ours": ratio,
            "device_ratio_to_ours": None,
        }

    comparison = {
        "op": "adamw",
        "case": "a step",
        "note": "",
        "unit": "GB/s",
        "device": "some CPU, 2 threads",
        "rows": [row("fastlm", 1.0), row("torch fused", 1.5), row("copy", 0.5)],
    }
    return {
        "date": "2026-01-02 03:04:05 +0000",
        "command": "pytest bench --benchmark-only",
        "commit": "abc1234",
        "cpu": "some CPU, 2 threads",
        "cpu_features": ["avx2", "avx512", "amx_bf16"],
        "isa": "avx512",
        "allocator": "as-is",
        "versions": {"torch": "2.13.0", "cuda": None},
        "comparisons": [comparison],
    }


def page(folder: Path, *runs: dict) -> str:
    for number, run in enumerate(runs):
        (folder / f"{number}.json").write_text(json.dumps(run))
    gpu_runs = report_gpu.load(folder)
    return report.results_page(report.load(folder), report.races(folder), gpu_runs)


def test_each_case_stands_once_for_each_state_of_the_allocator(tmp_path, run):
    kept = copy.deepcopy(run) | {"allocator": "kept"}
    kept["comparisons"][0]["rows"][1]["ratio_to_ours"] = 1.75
    text = page(tmp_path, run, kept)
    assert "## some CPU, 2 threads (AVX512, AMX)" in text
    assert "| case | memory | run | ms | GB/s | torch fused | copy |" in text
    assert "| a step | as is | 1 | 10 | 3 | 1.50 | 0.50 |" in text
    assert "| a step | kept | 2 | 10 | 3 | 1.75 | 0.50 |" in text
    assert "| 1 | 0.json | 2026-01-02 03:04:05 +0000 | abc1234 |" in text


def test_the_newest_result_counts_whatever_its_file_is_called(tmp_path, run):
    newer = copy.deepcopy(run) | {"date": "2026-02-02 03:04:05 +0000"}
    newer["comparisons"][0]["rows"][1]["ratio_to_ours"] = 2.0
    text = page(tmp_path, newer, run)
    assert "| a step | as is | 1 | 10 | 3 | 2.00 | 0.50 |" in text
    assert "1.50" not in text


def test_machines_are_apart(tmp_path, run):
    without = copy.deepcopy(run) | {"cpu_features": ["avx2", "avx512"]}
    on_gpu = copy.deepcopy(run)
    on_gpu["comparisons"][0]["device"] = "NVIDIA X"
    on_gpu["comparisons"][0]["rows"][1]["device_ratio_to_ours"] = 1.25
    text = page(tmp_path, run, without, on_gpu)
    assert "## some CPU, 2 threads (AVX512, AMX)" in text
    assert "## some CPU, 2 threads (AVX512, no AMX)" in text
    assert "## NVIDIA X" in text and "| 1.50 (1.25) |" in text


def test_a_steps_time_is_split_by_kind_of_work(tmp_path, run):
    step = run["comparisons"][0]
    step |= {"op": "train_step", "split_ms": {"matmul": 126.0, "other": 1.21}}
    step["rows"].append({**step["rows"][0], "name": "matmul", "ratio_to_ours": 0.856})
    text = page(tmp_path, run)
    assert "| case | memory | ms | MFU | matmul | other |" in text
    assert "| a step | as is | 127.2 | 86% | 126 | 1.2 |" in text


def test_a_race_is_shown_and_no_run_of_benches(tmp_path):
    end = {"trainer": "fastlm", "options": ["--lr-max", "1"], "minutes": 4.0, "steps": 1000}
    end |= {"bits_per_byte": 1.25, "tokens_per_second": 1e4, "compile_seconds": 31.2}
    (tmp_path / "race-2026-01-02.json").write_text(json.dumps({"machine": "A", "runs": [end]}))
    text = page(tmp_path)
    assert "![" in text and "](results/race-2026-01-02.png)" in text
    assert "| fastlm --lr-max 1 | 4 | 1.2500 | 10,000 | 1,000 | 31 |" in text


def gpu_part(folder: Path, run: dict, part: str, **found) -> None:
    name = "NVIDIA H100 80GB HBM3"
    told = {"gpu": name, "part": part, "rows": [], "steps": [], "comparisons": [], **found}
    path = folder / f"gpu-h100-80gb-hbm3-2026-01-03-{part}.json"
    path.write_text(json.dumps(run | {"date": "2026-01-03 00:00:00 +0000"} | told))


def trained(name: str, speed: float, *, full: bool, program: str = "fastlm") -> dict:
    return {
        "name": name, "program": program, "options": "", "full": full, "mfu": 0.5,
        "tokens_per_second": speed, "flops_per_token": 1e9, "peak_memory_bytes": 2**31,
        "loss": 3.25, "compile_seconds": 30.0,
    }  # fmt: skip


def test_what_a_gpu_told_is_shown(tmp_path, run):
    step = {"name": "Triton cases", "command": "pytest", "seconds": 61.0, "limit": 200.0,
            "exit_code": 1, "cut_off": False, "tests": {"passed": 240, "failed": 1, "names": []},
            "tail": ""}  # fmt: skip
    late = {**step, "name": "racecheck", "exit_code": None, "cut_off": True, "seconds": 0.0}
    del late["tests"]
    ended = {**late, "name": "killed and resumed", "exit_code": 0, "cut_off": False}
    gpu_part(tmp_path, run, "correctness", steps=[step, late])
    rows = [
        {"name": "machine", "copy_bytes_per_second": 3e12, "matmul_bfloat16_flops": 7.9e14,
         "matmul_float32_flops": 5e13},
        trained("nanoGPT, the preset's step", 4e5, full=True, program="nanogpt"),
        trained("fastlm, the preset's step", 5e5, full=True),
        trained("guard off", 2e5, full=False),
        {**trained("steps: guard off", 5e5, full=True, program="steps"), "speed_to_first": 1.0125},
        {"name": "profile of fastlm", "program": "fastlm", "options": "", "full": False,
         "top_kernels": {"busy_ms": 30.0, "top": [
             {"name": "a<|b>", "ms": 3.0, "calls": 12.0, "share": 0.1}]}},
        {"name": "killed and resumed", "program": "kill", "kills": 2, "bit_equal": True},
    ]  # fmt: skip
    kernels = copy.deepcopy(run["comparisons"])
    kernels[0] |= {"device": "NVIDIA H100 80GB HBM3", "op": "adamw"}
    kernels[0]["case"] = "norm + clip + step, 124 M parameters in 75 fp32 tensors"
    kernels[0]["rows"][1] |= {"name": "clip_grad_norm_ + torch fused", "device_ratio_to_ours": 1.2}
    gpu_part(tmp_path, run, "trainer", rows=rows, steps=[ended], comparisons=kernels)
    text = page(tmp_path, run)
    assert "a copy 3.00 TB/s" in text and "bfloat16 790 TFLOP/s" in text
    assert (
        "| fastlm, the preset's step |  | 500,000 | 1.25 |  | 50.0% | 50.6% | 2.0 | 3.2500 |"
        in text
    )
    assert "| guard off |  | 200,000 |  |  | 50.0% |" in text
    assert "| steps: guard off |  | 500,000 |  | 1.012 | 50.0% |" in text
    assert "30.0 ms of kernels" in text and "| `a<\\|b>` | 3.000 | 12 | 10.0% |" in text
    assert "| Triton cases | **exit code 1**: 240 passed, 1 failed | 61 |" in text
    assert "| racecheck | not begun | 0 |" in text
    assert "| killed and resumed | ended: 2 SIGKILLs, bit-equal | 0 |" in text
    table = report.readme_table(report.load(tmp_path), report_gpu.load(tmp_path))
    assert table.startswith("| work | peer |\n")  # no row of README's is among the CPU's
    gpu = "NVIDIA H100 80GB HBM3, torch 2.13.0, 2026-01-03, by CUDA events (wall clock)"
    assert f"\n\n| work | peer | {gpu} |\n|---|---|---|\n" in table
    name = "norm, clip and AdamW step, 124 M parameters"
    assert f"| {name} | clip_grad_norm_ + torch fused | 1.20 (1.50) |" in table
    assert "| a training step, gpt2-124m | nanoGPT's model and loop, compiled | (1.25) |" in table


def test_a_rehearsal_is_no_result(tmp_path, run):
    gpu_part(tmp_path, run, "trainer", gpu=None, rows=[trained("fastlm", 1.0, full=False)])
    assert "gpu.sh" not in page(tmp_path, run)


def test_readmes_table_has_the_last_two_cpus_plain_and_kept(tmp_path, run):
    op, case, peer, name = report.HEADLINES[3]
    comparison = run["comparisons"][0]
    comparison |= {"op": op, "case": case}
    comparison["rows"][1]["name"] = peer
    older, kept, oldest = copy.deepcopy(run), copy.deepcopy(run), copy.deepcopy(run)
    for number, (cpu, ratio, changed) in enumerate(
        [("B", 1.5, run), ("A", 2.5, older), ("A", 3.5, kept), ("C", 4.5, oldest)]
    ):
        changed |= {"cpu": cpu, "date": f"2026-01-0{4 - number}"}
        changed["comparisons"][0]["device"] = cpu
        changed["comparisons"][0]["rows"][1]["ratio_to_ours"] = ratio
    kept["allocator"] = "kept"
    page(tmp_path, run, older, kept, oldest)
    table = report.readme_table(report.load(tmp_path))
    assert "| B (AVX512, AMX), torch 2.13.0, 2026-01-04 | A (AVX512, AMX), torch" in table
    assert f"| {name} | {peer} | 1.50 / pending | 2.50 / 3.50 |" in table
    assert "4.50" not in table
