"""Writes RESULTS.md and the table in README.md from results/*.json: python bench/report.py

The newest result of each case counts, for each kind of machine and state of the allocator.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import report_gpu

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
OURS, COPY, MATMUL = "fastlm", "copy", "matmul"  # the names of harness.py, which imports torch

ALLOCATORS = {"as-is": "as is", "kept": "kept"}
TITLES = {
    "cross_entropy": "cross_entropy_loss, forward and backward",
    "linear_cross_entropy": "linear_cross_entropy_loss, forward and backward",
    "adamw": "AdamW",
    "clip_grad_norm": "clip_gradients",
    "gather_batch": "get_batch and the scan of token ids",
    "train_step": "A whole training step",
}
NOTEBOOK = "notebook: 6 layers, D 512, V 10000, 16 x 256 tokens"
DEMO = "demo: 4 layers, D 128, V 4096, 8 x 256 tokens"
COMPOSITION = "torch.compile, SDPA, fused AdamW"
NANOGPT = "nanoGPT's model, compiled, fused AdamW"
# The rows of README's table: op, case, peer, README's name for the work.
HEADLINES = [
    ("cross_entropy", "2048 x 50304 bfloat16", "F.cross_entropy, compiled",
     "loss of 2048 x 50304 bf16 logits and its gradient"),
    ("cross_entropy", "2048 x 50304 float32, in place", "F.cross_entropy, compiled",
     "the same in fp32, the gradient in the logits' memory"),
    ("linear_cross_entropy", "2048 x 768 x 50304 bf16, default budget",
     "linear + F.cross_entropy in fp32, compiled", "head and loss in one, 2048 x 768 x 50304 bf16"),
    ("adamw", "norm + clip + step, 124 M parameters in 75 fp32 tensors",
     "clip_grad_norm_ + torch fused", "norm, clip and AdamW step, 124 M parameters"),
    ("gather_batch", "get_batch, 64 x 1024 uint16", "NumPy fancy indexing",
     "a batch of 64 x 1024 tokens"),
    ("train_step", NOTEBOOK, COMPOSITION, "a training step, notebook preset (29 M parameters)"),
    ("train_step", NOTEBOOK, NANOGPT, "the same"),
    ("train_step", DEMO, COMPOSITION, "a training step, demo preset (1.9 M parameters)"),
]  # fmt: skip

README_CPUS = 2  # the last so many machines

Run = dict[str, Any]  # one JSON file: the circumstances of its comparisons
Key = tuple[str, str, str]  # op, case, allocator


def load(folder: Path = RESULTS) -> dict[str, dict[Key, tuple[Run, dict[str, Any]]]]:
    """{machine: {(op, case, allocator): (run, comparison)}}: the newest of each."""
    machines: dict[str, dict[Key, tuple[Run, dict[str, Any]]]] = defaultdict(dict)
    runs = [
        json.loads(path.read_text()) | {"file": path.name}
        for path in folder.glob("*.json")
        if not path.name.startswith("race-")
    ]
    for run in sorted(runs, key=lambda run: (run["date"], run["file"])):
        for comparison in run["comparisons"]:
            key = comparison["op"], comparison["case"], run["allocator"]
            machines[machine(run, comparison["device"])][key] = run, comparison
    return dict(sorted(machines.items()))


def races(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """{name: what bench/race.py has written}: the newest first."""
    paths = sorted(folder.glob("race-*.json"), reverse=True)
    return {path.stem: json.loads(path.read_text()) for path in paths}


def machine(run: Run, device: str) -> str:
    features = set(run["cpu_features"])
    if device != run["cpu"]:
        return device
    amx = "AMX" if any(name.startswith("amx") for name in features) else "no AMX"
    return f"{device} ({run['isa'].upper()}, {amx})"


def ratio(comparison: dict[str, Any], peer: str) -> str:
    """Time of `peer` over ours; in brackets by the device's own clock, if it has one."""
    for row in comparison["rows"]:
        if row["name"] == peer:
            text = f"{row['ratio_to_ours']:.2f}"
            if row["device_ratio_to_ours"] is not None:
                text += f" ({row['device_ratio_to_ours']:.2f})"
            return text
    return ""


def results_page(
    machines: dict[str, dict[Key, tuple[Run, dict[str, Any]]]],
    races: dict[str, dict[str, Any]],
    gpu_runs: dict[str, dict[str, Any]] | None = None,
) -> str:
    lines = [
        "# Results",
        "",
        "Written by `make report` from `bench/results/*.json`. Do not edit.",
        "",
        "Every column but the first five is **time of a peer / time of fastlm**, the median over",
        "rounds in which each ran once in the same process: above 1, fastlm is faster. Memory:",
        '"as is" is a plain process; "kept" is one that called `fastlm.keep_freed_memory()`.',
        '"copy" is a copy of as many bytes as the work must read and write, "matmul" the fastest',
        "matmul's time for as many FLOPs. On a GPU the ratio in brackets is that of CUDA events,",
        "the other that of a call from an idle device until it is idle again.",
    ]
    for name, race in races.items():
        lines += ["", f"## Quality over time: {race['machine']}", "", *race_table(name, race)]
    lines += report_gpu.page(gpu_runs or {})
    for name, cases in machines.items():
        runs = sorted({run["file"]: run for run, _ in cases.values()}.items())
        numbers = {file: number for number, (file, _) in enumerate(runs, 1)}
        lines += ["", f"## {name}"]
        for op, title in TITLES.items():
            tables: dict[tuple[str, ...], list[Key]] = defaultdict(list)
            for key in sorted(cases):
                if key[0] == op:
                    peers = [row["name"] for row in cases[key][1]["rows"] if row["name"] != OURS]
                    tables[tuple(peers)].append(key)
            if not tables:
                continue
            lines += ["", f"### {title}"]
            for peers, keys in tables.items():
                unit = cases[keys[0]][1]["unit"]
                header = ("case", "memory", "run", "ms", unit, *peers)
                lines += ["", row_of(header), "|---" * len(header) + "|"]
                for key in keys:
                    run, comparison = cases[key]
                    ours = next(row for row in comparison["rows"] if row["name"] == OURS)
                    note = f" ({comparison['note']})" if comparison["note"] else ""
                    lines.append(
                        row_of((
                            key[1] + note,
                            ALLOCATORS[key[2]],
                            str(numbers[run["file"]]),
                            f"{ours['median_ms']:.3g}",
                            f"{ours['rate']:.3g}",
                            *(ratio(comparison, peer) for peer in peers),
                        ))
                    )  # fmt: skip
            lines += split_table([(*cases[key], key) for keys in tables.values() for key in keys])
        header = ("run", "file", "date", "commit", "command", "versions")
        lines += ["", "### Runs", "", row_of(header), "|---" * len(header) + "|"]
        for file, run in runs:
            versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items() if v)
            command = f"`{run['command']}`"
            lines.append(
                row_of((str(numbers[file]), file, run["date"], run["commit"], command, versions))
            )
    return "\n".join(lines) + "\n"


def race_table(name: str, race: dict[str, Any]) -> list[str]:
    """The picture and the ends of the curves of a race."""
    header = ("trainer", "minutes", "bits/byte", "tokens/s", "steps", "s of compilation before")
    return [
        f"![held-out bits per byte over seconds in training steps](results/{name}.png)",
        "",
        row_of(header),
        "|---" * len(header) + "|",
        *(
            row_of((
                " ".join((run["trainer"], *run["options"])),
                f"{run['minutes']:g}",
                f"{run['bits_per_byte']:.4f}",
                f"{run['tokens_per_second']:,.0f}",
                f"{run['steps']:,}",
                f"{run['compile_seconds']:.0f}",
            ))
            for run in race["runs"]
        ),
    ]  # fmt: skip


def split_table(measured: list[tuple[Run, dict[str, Any], Key]]) -> list[str]:
    """Where a training step's time goes: a row for each case that was profiled."""
    split = [(comparison, key) for _, comparison, key in measured if comparison.get("split_ms")]
    if not split:
        return []
    kinds = list(split[0][0]["split_ms"])
    header = ("case", "memory", "ms", "MFU", *kinds)
    lines = [
        "",
        "Milliseconds of a step of ours by kind of work, under torch.profiler, in the thread that",
        'runs the step; "ms" is their sum. "other": Python, autograd, small operations, idling.',
        "MFU: the model FLOPs over the step's time, without the profiler, as a share of what the",
        "fastest matmul reaches in the same run.",
        "",
        row_of(header),
        "|---" * len(header) + "|",
    ]
    for comparison, (_, case, allocator) in sorted(split, key=lambda found: found[1]):
        parts = comparison["split_ms"]
        mfu = next(row["ratio_to_ours"] for row in comparison["rows"] if row["name"] == MATMUL)
        numbers = (
            f"{parts[kind]:.0f}" if parts[kind] >= 100 else f"{parts[kind]:.2g}" for kind in kinds
        )
        total = f"{sum(parts.values()):,.1f}"
        lines.append(row_of((case, ALLOCATORS[allocator], total, f"{mfu:.0%}", *numbers)))
    return lines


def row_of(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def readme_table(
    machines: dict[str, dict[Key, tuple[Run, dict[str, Any]]]],
    gpu_runs: dict[str, dict[str, Any]] | None = None,
) -> str:
    """HEADLINES on the CPUs of the last runs, a column each, and the rows of the last GPU.

    A cell: the ratio in a plain process / after keep_freed_memory().
    """
    on_cpus = []
    for name, cases in machines.items():
        keys = [(op, case, a) for op, case, *_ in HEADLINES for a in ALLOCATORS]
        runs = [cases[key][0] for key in keys if key in cases]
        if runs and all(comparison["device"] == run["cpu"] for run, comparison in cases.values()):
            on_cpus.append((sorted(run["date"][:10] for run in runs), name, cases))
    newest = sorted(on_cpus, key=lambda found: found[0][-1], reverse=True)[:README_CPUS]
    columns = []
    for dates, name, cases in newest:
        torches = sorted({run["versions"]["torch"] for run, _ in cases.values()})
        columns.append(f"{name}, torch {', '.join(torches)}, {', '.join(sorted(set(dates)))}")
    lines = [row_of(("work", "peer", *columns)), "|---" * (2 + len(columns)) + "|"]
    for op, case, peer, name in HEADLINES:
        cells = []
        for _, _, cases in newest:
            found = [cases.get((op, case, allocator)) for allocator in ALLOCATORS]
            ratios = [ratio(one[1], peer) if one else "" for one in found]
            cells.append(" / ".join(value or "pending" for value in ratios))
        lines.append(row_of((name, peer, *cells)))
    return "\n".join([*lines, *report_gpu.readme_table(gpu_runs or {}, machines)])


def put_between_markers(text: str, table: str) -> str:
    """`text` with `table` between README's two markers."""
    begin, end = "<!-- written by make report -->\n", "<!-- end -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}{table}\n{end}{after}"


def main() -> None:
    machines, gpu_runs = load(), report_gpu.load(RESULTS)
    (ROOT / "bench" / "RESULTS.md").write_text(results_page(machines, races(), gpu_runs))
    readme, table = ROOT / "README.md", readme_table(machines, gpu_runs)
    readme.write_text(put_between_markers(readme.read_text(), table))


if __name__ == "__main__":
    main()
