"""Runs that are killed with SIGKILL, at any moment or inside an operation on a file, and gone on
with until they end; and what must be equal then.
"""

import builtins
import collections
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from command_server import commands
from in_process import checkpoint
from training_runs import metrics, same, state, tiny_flags, write_tokens

# Two micro-batches or dropout, whatever takes part in a step's bits.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": dict(dtype="bfloat16"),
    "dropout": dict(dropout=0.2),
    "accumulated": dict(grad_accum=2, dropout=0.1, dtype="bfloat16"),
    "compiled": dict(compile=True, dropout=0.1),
}
RUN = dict(total_steps=60, ckpt_every=7, eval_every=20, log_every=1, keep_last=2)
OPERATIONS = ("write", "fsync", "rename")


class Operations:
    """Counts the writes, fsyncs and renames of this process, and kills it inside one of them.

    A write is killed with half of its bytes written; an fsync and a rename before or after.
    """

    def __init__(self, kind: str | None, number: int):
        self.kind, self.number = kind, number
        self.counts: collections.Counter[str] = collections.Counter()

    def install(self) -> None:
        open_, fdopen = builtins.open, os.fdopen
        inside = str(Path("run").resolve())

        def open_counted(file, mode="r", *arguments, **options):
            opened = open_(file, mode, *arguments, **options)
            is_path = isinstance(file, str | os.PathLike)
            writes = set(mode) & set("wax+")
            if is_path and writes and os.path.abspath(file).startswith(inside):
                return _CountedFile(opened, self)
            return opened

        builtins.open = open_counted
        os.fdopen = lambda *a, **o: _CountedFile(fdopen(*a, **o), self)
        os.fsync = self._counted("fsync", os.fsync)
        for name in ("rename", "replace"):
            setattr(os, name, self._counted("rename", getattr(os, name)))

    def is_fatal(self, kind: str) -> bool:
        self.counts[kind] += 1
        return kind == self.kind and self.counts[kind] == self.number

    def _counted(self, kind: str, function):
        def call(*arguments, **options):
            fatal = self.is_fatal(kind)
            if fatal and self.number % 2:
                kill()
            result = function(*arguments, **options)
            if fatal:
                kill()
            return result

        return call


class _CountedFile:
    """A file whose writes count."""

    def __init__(self, file, operations: Operations):
        self._file, self._operations = file, operations

    def write(self, data):
        if self._operations.is_fatal("write"):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            kill()
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(argv: list[str]) -> int:
    """In a process of its own: the trainer. argv[0] is JSON: {"kind", "number"} of the operation to
    die in, or null; a run that ends leaves its counts in counts.json."""
    from fastlm.train import main

    operations = Operations(**(json.loads(argv[0]) or {"kind": None, "number": 0}))
    operations.install()
    code = main(argv[1:])
    Path("counts.json").write_text(json.dumps(operations.counts))
    return code


def start(directory: Path, argv: list[str], fatal: dict | None = None):
    # Compiled in the process itself, which is forked: no pool of compilers comes along.
    env = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    argv = [json.dumps(fatal), *argv]
    return commands().start(argv, directory, call="killed_runs:train", env=env)


class Undisturbed:
    """The run of a variant without an interruption: what a killed one is compared with."""

    def __init__(self, directory: Path, variant: str):
        self.directory, self.flags = directory, tiny_flags(**RUN, **VARIANTS[variant])
        write_tokens(directory)
        begin = time.monotonic()
        result = start(directory, self.flags).wait(300)
        assert result.returncode == 0, result.output
        self.seconds = time.monotonic() - begin
        self.counts = json.loads((directory / "counts.json").read_text())


def killed_run(
    undisturbed: Undisturbed, directory: Path, rng: random.Random, kills: int
) -> collections.Counter[str]:
    """Kills a run at `kills` moments, or as many as there are until it ends; then lets it end.

    Of two kills one is inside an operation. Returns how often it was killed, by kind.
    """
    write_tokens(directory)
    told: collections.Counter[str] = collections.Counter()
    while True:
        fatal = None
        done = sum(told.values()) >= kills
        if not done and sum(told.values()) % 2:
            kind = rng.choice(OPERATIONS)
            # Early ones, so that there is a rest of the run to kill again.
            fatal = {
                "kind": kind,
                "number": rng.randint(1, max(1, undisturbed.counts[kind] // kills)),
            }
        command = start(directory, _next_argv(undisturbed, directory), fatal)
        if fatal is None and not done:
            command.until(r"\[run\]|complete|error")
            time.sleep(rng.uniform(0, undisturbed.seconds / kills))
            command.signal(signal.SIGKILL)
        result = command.wait(300)
        if result.returncode == 0:
            return told
        assert result.returncode == -signal.SIGKILL, result.output
        told[fatal["kind"] if fatal else "any moment"] += 1


def _next_argv(undisturbed: Undisturbed, directory: Path) -> list[str]:
    """Killed before its first checkpoint, a run is started again; else it is resumed."""
    found = list(directory.glob("run/checkpoints/checkpoint_*.pt"))
    return ["--resume", "run", "--device", "cpu"] if found else undisturbed.flags


def assert_equal_runs(directory: Path, undisturbed: Undisturbed) -> None:
    """Bit for bit: tensors, loss log, validation; every step once; nothing hidden left behind."""
    run, expected = directory / "run", undisturbed.directory / "run"
    assert same(state(checkpoint(run)), state(checkpoint(expected)))
    for event, value in (("train", "loss"), ("val", "val_loss")):
        rows, wanted = (
            [(row["step"], row[value]) for row in metrics(place, event)]
            for place in (run, expected)
        )
        assert rows == wanted, event
    last = [metrics(place, "summary")[-1]["val_loss"] for place in (run, expected)]
    assert last[0] == last[1]
    names, wanted = ({str(p.relative_to(d)) for p in d.rglob("*")} for d in (run, expected))
    names.discard("logs/metrics.jsonl_abandoned")  # killed before the first checkpoint
    assert names == wanted, names ^ wanted
