"""Runs whose disk is full: a small tmpfs under the checkpoints, the log, or stdout. Needs root."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from in_process import checkpoint
from training_runs import losses, same, state, tiny_flags, write_tokens

RUN = dict(total_steps=40, ckpt_every=8, dropout=0.1, eval_every=0)
PLACES = ("checkpoints", "logs", "stdout")


@contextlib.contextmanager
def small_disk(place: Path, kib: int) -> Iterator[None]:
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "fastlm", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def _train(directory: Path, argv: list[str], stdout: Path) -> subprocess.CompletedProcess:
    with open(stdout, "w") as file:
        return subprocess.run(
            [sys.executable, "-m", "fastlm.train", *argv],
            cwd=directory, stdout=file, stderr=subprocess.PIPE, text=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def run_on_full_disk(directory: Path, what: str) -> str:
    """Trains with `what`, one of PLACES, on a disk that fills up. The run goes on to its last step,
    exits 1 and says what is missing; with room it is resumed to the end.

    Returns the line that says it. CalledProcessError if no file system can be mounted.
    """
    write_tokens(directory)
    straight = _train(directory, tiny_flags(**RUN, target_dir="straight"), directory / "out")
    assert straight.returncode == 0, straight.stderr
    run, full = directory / "run", directory / "full"
    flags = tiny_flags(**RUN)
    place = {"checkpoints": run / "checkpoints", "logs": run / "logs", "stdout": full}[what]
    size = checkpoint(directory / "straight").stat().st_size
    # Room for two checkpoints, or for the first lines.
    with small_disk(place, size * 5 // 2 // 1024 if what == "checkpoints" else 4):
        stdout = full / "out" if what == "stdout" else directory / "out"
        result = _train(directory, flags, stdout)
        told = result.stderr + stdout.read_text(errors="replace")
        lines = [line for line in told.splitlines() if line.startswith("[train] missing")]
        assert result.returncode == 1, told
        assert "Traceback" not in told, told
        assert len(lines) == 1, told
        if what != "logs":
            assert losses(run) == losses(directory / "straight")
        if what == "checkpoints":
            assert not list(place.glob(".*")), "half a file is left"
            subprocess.run(["mount", "-o", "remount,size=20m", place], check=True)
            result = _train(directory, ["--resume", "run", "--device", "cpu"], directory / "out")
            assert result.returncode == 0, result.stderr
        final = state(checkpoint(run))
    assert same(final, state(checkpoint(directory / "straight")))
    return lines[0]
