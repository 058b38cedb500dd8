"""Runs under torchrun whose ranks are killed again and again, and what must be equal then."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from training_runs import losses, metrics, same, tiny_flags, write_tokens

from fastlm.checkpoint import checkpoint_files, read_checkpoint

PARALLEL = ("ddp", "fsdp")
RUN = dict(
    total_steps=40, ckpt_every=4, eval_every=10, keep_last=2, batch_size=2, grad_accum=2,
    dropout=0.1,
)  # fmt: skip


def torchrun(directory: Path, plan: dict[str, Any], restarts: int, argv: list[str]) -> str:
    """What two ranks print that torchrun starts, and starts again; they must end well."""
    program = Path(__file__).with_name("rank_programs.py")
    result = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--max-restarts", str(restarts), program, json.dumps(plan), *argv,
        ],
        cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    return result.stdout


def undisturbed_run(parent: Path, parallel: str) -> Path:
    """The directory of a run that nobody kills."""
    directory = parent / f"undisturbed-{parallel}"
    directory.mkdir()
    write_tokens(directory)
    torchrun(directory, {}, 0, tiny_flags(**RUN, parallel=parallel))
    return directory


def killed_run(parent: Path, parallel: str, faults: list[dict[str, Any]]) -> tuple[int, Path]:
    """(how often it was killed, its directory) of a run of which each attempt suffers a fault."""
    directory = parent / f"killed-{parallel}"
    directory.mkdir()
    write_tokens(directory)
    torchrun(directory, {"faults": faults}, len(faults), tiny_flags(**RUN, parallel=parallel))
    return len(list(directory.glob("killed-*"))), directory


def random_faults(rng: random.Random, count: int, parallel: str) -> list[dict[str, Any]]:
    """In turn: in the middle of a step, inside an operation of a save, at any moment."""
    steps = sorted(rng.randrange(RUN["total_steps"]) for _ in range(count))
    faults: list[dict[str, Any]] = []
    for index, step in enumerate(steps):
        rank = rng.randrange(2)
        if index % 3 == 0:
            faults.append({"rank": rank, "what": "kill", "step": step})
        elif index % 3 == 1:
            # Of a file rank 0 does all, of a directory each syncs its part, and rank 0 commits.
            kind = rng.choice(("write", "fsync", "rename"))
            rank = rank if parallel == "fsdp" and kind == "fsync" else 0
            number = rng.randint(1, 3)
            faults.append({"rank": rank, "what": "operation", "kind": kind, "number": number})
        else:
            faults.append({"rank": rank, "what": "kill at", "seconds": rng.uniform(0, 2)})
    return faults


def assert_equal_runs(directory: Path, expected: Path) -> None:
    """Bit for bit: tensors, loss log, validation; nothing half-written left behind."""
    runs = directory / "run", expected / "run"
    states = []
    for run in runs:
        payload = read_checkpoint(checkpoint_files(run / "checkpoints")[0])
        states.append({name: payload[name] for name in ("model_state", "optimizer_state")})
        assert payload["iteration"] == RUN["total_steps"]
    assert same(*states)
    assert losses(runs[0]) == losses(runs[1])
    for event in ("val", "summary"):
        rows, wanted = ([(r["step"], r["val_loss"]) for r in metrics(run, event)] for run in runs)
        assert rows == wanted, event
    names, wanted = ({str(p.relative_to(run)) for p in run.rglob("*")} for run in runs)
    names.discard("logs/metrics.jsonl_abandoned")  # killed before the first checkpoint
    assert names == wanted, names ^ wanted
