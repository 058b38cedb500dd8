"""The Slurm script of docs/distributed.md, with stand-ins for Slurm's commands: two nodes, here."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import losses, tiny_flags, write_tokens

from fastlm.run.log import metrics_path

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
SCRIPT = re.search(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
COMMANDS = {
    # A task on each of two nodes; the worst exit code, as Slurm's.
    "srun": '"$@" & first=$!\n"$@" & second=$!\nwait $first; a=$?\nwait $second; b=$?\n'
    "exit $(( a > b ? a : b ))\n",
    "scontrol": "echo 127.0.0.1\necho other\n",
}


def sbatch(directory: Path, port: int, *flags: str) -> subprocess.CompletedProcess:
    commands = directory / "bin"
    commands.mkdir(exist_ok=True)
    for name, text in COMMANDS.items():
        path = commands / name
        path.write_text(f"#!/bin/sh\n{text}")
        path.chmod(0o755)
    script = directory / "train.sh"
    script.write_text(SCRIPT)
    path = os.pathsep.join((str(commands), str(Path(sys.executable).parent), os.environ["PATH"]))
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    return subprocess.run(
        ["bash", str(script), *flags],
        cwd=directory,
        env={**os.environ, **slurm, "PATH": path, "GPUS": "1", "PORT": str(port)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_it_has_ten_lines():
    assert len(SCRIPT.splitlines()) <= 10


@pytest.mark.exhaustive
def test_two_nodes_train_and_a_requeued_job_goes_on(tmp_path):
    write_tokens(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = dict(batch_size=2, grad_accum=2, total_steps=6, ckpt_every=2, target_dir=None)
    flags = [*tiny_flags(**settings), "--no-compile", "--cosine-iters", "12"]
    done = sbatch(tmp_path, port, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[run] 2 processes, ddp" in done.stdout
    again = sbatch(tmp_path, port, *flags, "--total-steps", "12")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "[resume] at step 6" in again.stdout
    assert metrics_path(tmp_path / "runs" / "77" / "logs").exists()

    alone = tiny_flags(**settings | dict(batch_size=4, total_steps=12, target_dir="alone"))
    command = [sys.executable, "-m", "fastlm.train", "--preset", "gpt2-124m", *alone]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    expected, found = losses(tmp_path / "alone"), losses(tmp_path / "runs" / "77")
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5)
