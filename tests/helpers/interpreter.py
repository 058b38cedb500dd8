"""Test files of the Triton kernels: on a GPU where there is one, else in Triton's interpreter.

The interpreter needs TRITON_INTERPRET=1 before kernels are imported, and where that is set nothing
can be compiled (aot.py): each file runs in a process of its own.
"""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Where the Triton kernels run in this process. tests/interpreted/ has no other word about devices:
# its conftest.py makes tensors there.
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"


def run_kernel_cases(*files: str, **selection: str) -> tuple[int, str]:
    """run_interpreted for files of tests/interpreted, which a GPU runs where there is one."""
    return run_interpreted("interpreted", *files, interpret=DEVICE == "cpu", **selection)


def run_interpreted(
    folder: str,
    *files: str,
    keyword: str = "",
    marks: str = "not exhaustive",
    interpret: bool = True,
) -> tuple[int, str]:
    """Runs test files of tests/`folder` with the interpreter, of them what pytest's -k and -m
    select; (how many passed, the summary line)."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        keyword,
        "-m",
        marks,
    ]
    command += [str(TESTS / folder / file) for file in files]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if interpret:  # of CPU tensors alone: tables hold addresses, which it follows on the host
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_ADDOPTS", None)
    run = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    summary = run.stdout.splitlines()[-1]
    return int(re.search(r"(\d+) passed", summary)[1]), summary


def sampled(chosen: Callable[..., bool], names: str, *values: Iterable):
    """Parametrizes with every combination of `values`; what is not `chosen` is exhaustive."""
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(*case, marks=() if chosen(*case) else pytest.mark.exhaustive)
            for case in itertools.product(*values)
        ],
    )
