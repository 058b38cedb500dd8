"""bench/report.py: RESULTS.md and README's table say what bench/results holds."""

import copy
import json
from pathlib import Path

import pytest
import report

ROOT = Path(__file__).parents[2]


def test_the_report_is_that_of_the_stored_results():
    page = report.results_page(report.load(), report.races())
    assert (ROOT / "bench" / "RESULTS.md").read_text() == page, (
        "bench/RESULTS.md is stale: make report"
    )


def test_readmes_table_is_that_of_the_stored_results():
    readme = (ROOT / "README.md").read_text()
    assert report.readme_table(report.load()) in readme, "README.md is stale: make report"


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
    return report.results_page(report.load(folder), report.races(folder))


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
