"""What bench/gpu.sh has found, as tables: the part of report.py that is about GPUs."""

import json
from pathlib import Path
from typing import Any

# Dense bf16 FLOP/s of the data sheets. Others of the name (PCIe, NVL) have lower ones.
PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
NANOGPT, FASTLM = "nanoGPT, the preset's step", "fastlm, the preset's step"
# The rows of README's table, once there are figures: op, case, peer, README's name for the work.
HEADLINES = [
    ("cross_entropy", "8192 x 32000 bfloat16", "F.cross_entropy, compiled",
     "loss of 8192 x 32000 bf16 logits and its gradient"),
    ("cross_entropy", "8192 x 50304 bfloat16", "Liger", "the same, vocabulary of 50,304"),
    ("cross_entropy", "8192 x 128256 bfloat16", "Liger", "the same, vocabulary of 128,256"),
    ("linear_cross_entropy", "8192 x 4096 x 128256 bf16, default budget", "Liger",
     "head and loss in one, 8192 x 4096 x 128256 bf16"),
    ("adamw", "norm + clip + step, 124 M parameters in 75 fp32 tensors",
     "clip_grad_norm_ + torch fused", "norm, clip and AdamW step, 124 M parameters"),
]  # fmt: skip


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """{file: run}: what gpu.sh has written on GPUs, oldest first."""
    runs = {path.name: json.loads(path.read_text()) for path in folder.glob("gpu-*.json")}
    found = {file: run for file, run in runs.items() if run["gpu"] is not None}
    return dict(sorted(found.items(), key=lambda item: (item[1]["date"], item[0])))


def rows_of(runs: dict[str, dict[str, Any]], gpu: str) -> dict[str, dict[str, Any]]:
    """{name: row}: the newest of each that was measured on this GPU."""
    return {row["name"]: row for run in runs.values() if run["gpu"] == gpu for row in run["rows"]}


def page(runs: dict[str, dict[str, Any]]) -> list[str]:
    """The sections of RESULTS.md."""
    lines: list[str] = []
    for gpu in sorted({run["gpu"] for run in runs.values()}):
        rows = rows_of(runs, gpu)
        lines += ["", f"## {gpu}: bench/gpu.sh"]
        for table in (machine_table(rows), trainer_table(rows, gpu), kernel_table(rows)):
            lines += table
        lines += steps_table({file: run for file, run in runs.items() if run["gpu"] == gpu})
    return lines


def machine_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    if (row := rows.get("machine")) is None:
        return []
    rates = [f"a copy {row['copy_bytes_per_second'] / 1e12:.2f} TB/s (read + written)"]
    for dtype in ("bfloat16", "float32"):
        rates.append(f"matmuls in {dtype} {row[f'matmul_{dtype}_flops'] / 1e12:.0f} TFLOP/s")
    return ["", f"The machine: {', '.join(rates)}."]


def trainer_table(rows: dict[str, dict[str, Any]], gpu: str) -> list[str]:
    """The trainer's rows, each beside nanoGPT's of the same tokens a step."""
    found = [row for row in rows.values() if "tokens_per_second" in row]
    if not found:
        return []
    peak = PEAKS.get(gpu)
    header = (
        "row", "options", "tokens/s", "of nanoGPT's", "of the first in turns",
        "MFU (measured ceiling)",
        "MFU (dense bf16 peak)", "peak GiB", "loss", "bits/byte", "s of compilation",
    )  # fmt: skip
    lines = [
        "",
        "### The trainer",
        "",
        "gpt2-124m: the preset's step has 524,288 tokens, those in turns (steps: …) 131,072, or",
        "what they say; the others 16,384, and their loss is that after 500 steps on the same",
        "batches (nanoGPT's of another model). In turns the loss is the last step's, of the first,",
        "which every other runs with, a later one; speeds are compared round by round.",
        "",
        _row(header),
        "|---" * len(header) + "|",
    ]
    for row in found:
        peer = rows.get(NANOGPT if row["full"] else "nanoGPT", {}).get("tokens_per_second")
        speed = row["tokens_per_second"]
        is_gpt = row["program"] in ("fastlm", "nanogpt")
        flops = speed * row["flops_per_token"]
        bits = row.get("bits_per_byte")
        lines.append(
            _row((
                row["name"],
                row["options"] and f"`{row['options']}`",
                f"{speed:,.0f}",
                f"{speed / peer:.2f}" if peer and is_gpt else "",
                f"{row['speed_to_first']:.3f}" if "speed_to_first" in row else "",
                f"{row['mfu']:.1%}",
                f"{flops / peak:.1%}" if peak else "",
                f"{row['peak_memory_bytes'] / 2**30:.1f}",
                f"{row['loss']:.4f}",
                f"{bits:.4f}" if bits is not None and row["program"] == "demo" else "",
                f"{row['compile_seconds']:.0f}",
            ))
        )  # fmt: skip
    return lines


def kernel_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows.values():
        if profile := row.get("top_kernels"):
            busy = f"{profile['busy_ms']:.1f} ms of kernels"
            lines += [
                "",
                f"#### {row['name']}: {busy} in a step of 16,384 tokens",
                "",
                _row(("kernel", "ms", "calls", "share")),
                "|---|---|---|---|",
            ]
            for kernel in profile["top"][:10]:
                name = kernel["name"].replace("|", "\\|")
                share = f"{kernel['share']:.1%}"
                lines.append(
                    _row((f"`{name}`", f"{kernel['ms']:.3f}", f"{kernel['calls']:.0f}", share))
                )
    return lines


def steps_table(runs: dict[str, dict[str, Any]]) -> list[str]:
    """How every step went, also those that were cut off."""
    header = ("file", "commit", "step", "outcome", "s")
    lines = ["", "### Steps", "", _row(header), "|---" * len(header) + "|"]
    for file, run in runs.items():
        for step in run["steps"]:
            lines.append(
                _row((file, run["commit"], step["name"], outcome(run, step),
                      f"{step['seconds']:.0f}"))
            )  # fmt: skip
    return lines


def outcome(run: dict[str, Any], step: dict[str, Any]) -> str:
    if step["cut_off"]:
        told = f"cut off after {step['seconds']:.0f} s" if step["seconds"] else "not begun"
    else:
        told = "ended" if step["exit_code"] == 0 else f"**exit code {step['exit_code']}**"
    if tests := step.get("tests"):
        told += ": " + ", ".join(f"{n} {kind}" for kind, n in tests.items() if kind != "names")
    for row in run["rows"]:
        if row["name"] == step["name"] and "kills" in row:
            equal = "bit-equal" if row["bit_equal"] else "**not** bit-equal"
            told += f": {row['kills']} SIGKILLs, {equal}"
    return told


def readme_table(
    runs: dict[str, dict[str, Any]], cases: dict[str, dict[Any, tuple[Any, dict[str, Any]]]]
) -> list[str]:
    """The GPU's rows of README's table, for the GPU of the newest run; none without one.

    cases: report.py's {machine: {(op, case, allocator): (run, comparison)}}.
    """
    if not runs:
        return []
    newest = list(runs.values())[-1]
    gpu, rows = newest["gpu"], rows_of(runs, newest["gpu"])
    when = (
        f"torch {newest['versions']['torch']}, {newest['date'][:10]}, by CUDA events (wall clock)"
    )
    lines = ["", _row(("work", "peer", f"{gpu}, {when}")), "|---|---|---|"]
    for op, case, peer, name in HEADLINES:
        _, comparison = cases.get(gpu, {}).get((op, case, "as-is"), (None, {"rows": []}))
        ratios = [
            f"{row['device_ratio_to_ours']:.2f} ({row['ratio_to_ours']:.2f})"
            for row in comparison["rows"]
            if row["name"] == peer
        ]
        name += " (each alone)" if "each alone" in comparison.get("note", "") else ""
        lines += [_row((name, peer, ratio)) for ratio in ratios]
    if "steps: nanoGPT" in rows:
        ratio = 1 / rows["steps: nanoGPT"]["speed_to_first"]
        name = "a training step, gpt2-124m, in turns"
        lines.append(_row((name, "nanoGPT's model and loop, compiled", f"({ratio:.3f})")))
    if NANOGPT in rows and FASTLM in rows:
        ratio = rows[FASTLM]["tokens_per_second"] / rows[NANOGPT]["tokens_per_second"]
        peer = "nanoGPT's model and loop, compiled"
        lines.append(_row(("a training step, gpt2-124m", peer, f"({ratio:.2f})")))
    return lines


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
